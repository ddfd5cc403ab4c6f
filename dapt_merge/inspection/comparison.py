"""A base and its DAPT checkpoints measured: every shared tensor once, summed up by layer and group.

The idea: tensors are mapped, measured in threads and forgotten; what stays of each is a handful of sums, from which
any group of tensors is summarised. What this module does not know: how it is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dapt_merge.checkpoints.checkpoint import Checkpoint
from dapt_merge.checkpoints.groups import Kind, Stack, TensorGroup, tensor_group
from dapt_merge.checkpoints.threads import map_in_threads
from dapt_merge.errors import InputError
from dapt_merge.inspection.compatibility import Compatibility, comparable, compare_declarations
from dapt_merge.inspection.measures import (
    WEIGHTS,
    Difference,
    SignAgreement,
    measure_difference,
    measure_sign_agreement,
    no_difference,
)
from dapt_merge.inspection.rank import effective_rank
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.registry import get_method
from dapt_merge.methods.spherical import SMALLEST_NORM

KINDS: tuple[Kind, ...] = ("attention", "mlp", "norm", "embedding", "head", "other")


class Place(NamedTuple):
    """A layer of a stack; both None outside the layers."""

    stack: Stack | None
    layer: int | None

    @classmethod
    def of(cls, group: TensorGroup) -> Place:
        """Return the place of a tensor; all that lies outside the layers is one place."""
        return cls(None, None) if group.layer is None else cls(group.stack, group.layer)


@dataclass(frozen=True)
class TensorMeasures:
    """One tensor of one DAPT checkpoint against the base's; `effective_rank` is of δ, None where none was asked for."""

    name: str
    group: TensorGroup
    shape: tuple[int, ...]
    difference: Difference
    effective_rank: float | None

    @property
    def slerp_falls_back(self) -> bool:
        """Whether slerp, at its default threshold, would merge this tensor linearly."""
        cosine = self.difference.cosine
        squares = (self.difference.base_squares, self.difference.model_squares)
        if cosine is None or min(squares) ** 0.5 <= SMALLEST_NORM:
            return True
        return abs(cosine) > slerp_threshold()


@dataclass(frozen=True)
class Summary:
    """Several tensors as one: sums over all their elements, means over their matrices.

    Attributes:
        tensors: how many.
        difference: the sums.
        slerp_fallbacks: how many tensors slerp would merge linearly.
        effective_rank: mean over the matrices that it was computed for; None without any.
        rank_share: mean of the effective rank per smaller side.
        signs: agreement between the task vectors; None with fewer than two DAPT checkpoints.
    """

    tensors: int
    difference: Difference
    slerp_fallbacks: int
    effective_rank: float | None
    rank_share: float | None
    signs: SignAgreement | None

    def to_dict(self, weights: Sequence[float]) -> dict[str, Any]:
        """Return the summary as JSON-ready data; `weights` are those that the rounding was measured at."""
        found = self.difference
        return {
            "tensors": self.tensors,
            "elements": found.elements,
            "relative_norm": found.relative_norm,
            "cosine": found.cosine,
            "changed_share": found.changed_share,
            "sign_agreement": None if self.signs is None else self.signs.share,
            "effective_rank": self.effective_rank,
            "rank_share": self.rank_share,
            "slerp_fallbacks": self.slerp_fallbacks,
            "bfloat16": [
                {"weight": weight, "lost_share": loss.lost_share, "relative_error": loss.relative_error}
                for weight, loss in zip(weights, found.rounding, strict=True)
            ],
        }


@dataclass(frozen=True)
class Comparison:
    """One DAPT checkpoint against the base."""

    label: str
    compatibility: Compatibility
    tensors: tuple[TensorMeasures, ...]


@dataclass(frozen=True)
class Inspection:
    """Everything that was measured; `signs` maps tensors to the agreement between all the task vectors."""

    base: str
    comparisons: tuple[Comparison, ...]
    signs: Mapping[str, SignAgreement]
    weights: tuple[float, ...]

    @property
    def places(self) -> list[Place]:
        """The places that were met: outside the layers, then layer by layer, an encoder's before a decoder's."""
        met = {Place.of(tensor.group) for comparison in self.comparisons for tensor in comparison.tensors}
        stacks = (None, "encoder", "decoder")
        return sorted(met, key=lambda place: (stacks.index(place.stack), -1 if place.layer is None else place.layer))

    def place_name(self, place: Place) -> str:
        """Return "outside", the layer's number, or both stack and number where there are two stacks."""
        if place.layer is None:
            return "outside"
        two = len({other.stack for other in self.places if other.layer is not None}) > 1
        return f"{place.stack or ''} {place.layer}".strip() if two else str(place.layer)

    @property
    def kinds(self) -> list[Kind]:
        """The groups that were met, in the order of `KINDS`."""
        met = {tensor.group.kind for comparison in self.comparisons for tensor in comparison.tensors}
        return [kind for kind in KINDS if kind in met]

    def summary(self, comparison: Comparison, keep: Callable[[TensorGroup], bool] = lambda group: True) -> Summary:
        """Sum up the tensors of one comparison whose group is kept."""
        return self._sum([tensor for tensor in comparison.tensors if keep(tensor.group)])

    def cell(self, comparison: Comparison, place: Place, kind: Kind) -> Summary | None:
        """Sum up one group of one layer; None when that layer has no such tensor."""
        found = self.summary(comparison, lambda group: group.kind == kind and Place.of(group) == place)
        return found if found.tensors else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready data."""
        return {
            "base": self.base,
            "weights": list(self.weights),
            "slerp_threshold": slerp_threshold(),
            "dapt": [self._comparison_dict(comparison) for comparison in self.comparisons],
        }

    def _comparison_dict(self, comparison: Comparison) -> dict[str, Any]:
        cells = [(place, kind, self.cell(comparison, place, kind)) for place in self.places for kind in self.kinds]
        return {
            "label": comparison.label,
            "compatibility": comparison.compatibility.to_dict(),
            "all": self.summary(comparison).to_dict(self.weights),
            "groups": {
                kind: self.summary(comparison, lambda group, kind=kind: group.kind == kind).to_dict(self.weights)  # type: ignore[misc]
                for kind in self.kinds
            },
            "cells": [
                {"stack": place.stack, "layer": place.layer, "group": kind, **found.to_dict(self.weights)}
                for place, kind, found in cells
                if found is not None
            ],
            "tensors": [
                {"name": t.name, "shape": list(t.shape), **self._sum([t]).to_dict(self.weights)}
                for t in comparison.tensors
            ],
        }

    def _sum(self, tensors: Iterable[TensorMeasures]) -> Summary:
        several = list(tensors)
        ranks = [(t.effective_rank, t.effective_rank / min(t.shape)) for t in several if t.effective_rank is not None]
        return Summary(
            tensors=len(several),
            difference=sum((tensor.difference for tensor in several), no_difference(self.weights)),
            slerp_fallbacks=sum(tensor.slerp_falls_back for tensor in several),
            effective_rank=sum(rank for rank, _ in ranks) / len(ranks) if ranks else None,
            rank_share=sum(share for _, share in ranks) / len(ranks) if ranks else None,
            signs=sum((self.signs[t.name] for t in several if t.name in self.signs), SignAgreement())
            if self.signs
            else None,
        )


def inspect_checkpoints(
    base: Checkpoint,
    dapt: Sequence[Checkpoint],
    *,
    rank: bool = True,
    weights: Sequence[float] = WEIGHTS,
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Measure every floating-point tensor that the base shares with each DAPT checkpoint.

    Args:
        base: the base.
        dapt: one checkpoint or more.
        rank: also compute the effective rank of every matrix of δ, which takes most of the time.
        weights: of the updates whose rounding to bfloat16 is measured.
        threads: tensors measured at once (default: the CPUs that may be used).
        on_progress: called with (elements measured, elements in all), over all checkpoints.

    Raises:
        InputError: a checkpoint shares no tensor with the base, or holds NaN or infinity.

    Example:
        >>> import torch
        >>> from dapt_merge import open_checkpoint
        >>> base = open_checkpoint({"w": torch.tensor([3.0, 4.0])}, "base")
        >>> found = inspect_checkpoints(base, [open_checkpoint({"w": torch.tensor([3.0, 4.5])}, "dapt")])
        >>> found.summary(found.comparisons[0]).difference.relative_norm
        0.1
    """
    shared = [_shared(base, model) for model in dapt]
    jobs = [name for name in base.tensors if any(name in names for names in shared)]

    def measure(name: str) -> tuple[list[TensorMeasures | None], SignAgreement | None]:
        measured = [
            _measure(base, model, name, rank, weights) if name in names else None
            for model, names in zip(dapt, shared, strict=True)
        ]
        together = _signs(base, dapt, name) if len(dapt) > 1 and None not in measured else None
        return measured, together

    rows = map_in_threads(
        measure,
        jobs,
        size=lambda name: base.tensors[name].elements * len(dapt),
        threads=threads,
        on_progress=on_progress,
    )
    return Inspection(
        base.label,
        tuple(
            Comparison(
                model.label,
                compare_declarations(base, model),
                tuple(row for measured, _ in rows if (row := measured[position]) is not None),
            )
            for position, model in enumerate(dapt)
        ),
        {name: together for name, (_, together) in zip(jobs, rows, strict=True) if together is not None},
        tuple(weights),
    )


def slerp_threshold() -> float:
    """Return the cosine past which slerp is linear, unless a recipe says otherwise."""
    parameter = get_method("slerp").parameter("dot_threshold")
    assert parameter is not None
    assert isinstance(parameter.default, float)
    return parameter.default


def _shared(base: Checkpoint, model: Checkpoint) -> frozenset[str]:
    names = [
        name
        for name, info in base.tensors.items()
        if info.dtype.is_floating_point and info.elements and comparable(base, model, name)
    ]
    if not names:
        raise InputError(
            f"it shares no tensor with {base.label}, by name and shape",
            where=model.label,
            remedy="Compare a base with what was trained from it.",
        )
    return frozenset(names)


def _measure(base: Checkpoint, model: Checkpoint, name: str, rank: bool, weights: Sequence[float]) -> TensorMeasures:
    start, end = base.read(name), model.read(name)
    context = TensorContext(name, base_label=base.label, model_labels=(model.label,))
    difference = measure_difference(start, end, context, weights)
    directions = effective_rank(start, end) if rank and start.dim() == 2 else None
    return TensorMeasures(name, tensor_group(name), tuple(start.shape), difference, directions)


def _signs(base: Checkpoint, dapt: Sequence[Checkpoint], name: str) -> SignAgreement:
    context = TensorContext(name, base_label=base.label, model_labels=tuple(model.label for model in dapt))
    return measure_sign_agreement(base.read(name), [model.read(name) for model in dapt], context)
