"""What a merge will do, settled before any weight is read: inputs, tensors, parameters, output dtypes.

A plan costs headers and config files. Everything that can be refused is refused here. How tensors are computed and
where they go, this module does not know.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from dapt_merge.checkpoints.alignment import Alignment, align
from dapt_merge.checkpoints.chat_template import chosen_template
from dapt_merge.checkpoints.checkpoint import Checkpoint, TensorInfo
from dapt_merge.checkpoints.gathering import aligned_checkpoints
from dapt_merge.checkpoints.groups import tensor_group
from dapt_merge.checkpoints.opening import open_checkpoint, open_tokenizer, with_stated_architecture
from dapt_merge.checkpoints.references import split_architecture
from dapt_merge.checkpoints.trajectory import AveragedCheckpoint, mean_weights, run_checkpoints
from dapt_merge.checkpoints.tying import with_own_heads
from dapt_merge.checkpoints.vocabulary import has_tokenizer
from dapt_merge.errors import InputError, nearest
from dapt_merge.merging.agreement import Agreement, agree
from dapt_merge.merging.stacking import LaidTensor, layout, stacked_config
from dapt_merge.methods.selection import Cutoff
from dapt_merge.recipe import Recipe, ResolvedParameters, recipe_warnings, resolve
from dapt_merge.recipe.parts import same_model
from dapt_merge.recipe.resolving import comes_after_the_layers
from dapt_merge.statistics import Statistics, open_statistics
from dapt_merge.tensors.dtypes import Dtype, parse_dtype
from dapt_merge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor


Reader: TypeAlias = "Callable[[str, str], Tensor | StoredTensor]"
"""(label of a checkpoint or statistics file, tensor name) → the stored tensor."""


@dataclass(frozen=True)
class TensorJob:
    """One tensor to merge: from which checkpoints, with which parameters, into which dtype.

    `target` is the label of the checkpoint that the merged difference from the base is added to; None: the base itself.
    It calls the tensor what the base calls it.
    `in_dtype` is what inputs are rounded to first (None: nothing), `arithmetic` what is computed in (None: that follows
    from inputs and output, see `methods.pieces.arithmetic_dtype`), `stochastic` how the result is rounded.

    `base` and `models` are labels of the plan's checkpoints; `models` are θ₁…θₙ in the recipe's order. `stored` says
    what the tensor is called in the base (if any) and in each model, in that order; when it is empty, it is called
    `name` in all of them. `cutoffs` are the thresholds of a method that trims over the whole model (see `trimming`).
    `layer` of `num_layers` (from 0, in the output) is where the tensor stands: embeddings count as the first layer, the
    final norm and the head as the last; None when the number of layers is unknown. `statistics` says for each model
    which file holds numbers on this tensor, and under which name; None where its file has none.
    """

    name: str
    shape: tuple[int, ...]
    out_dtype: Dtype
    base: str | None
    models: tuple[str, ...]
    parameters: ResolvedParameters
    cutoffs: tuple[Cutoff | None, ...] | None = None
    stored: tuple[str, ...] = ()
    target: str | None = None
    in_dtype: Dtype | None = None
    arithmetic: Dtype | None = None
    stochastic: bool = False
    layer: int | None = None
    num_layers: int | None = None
    statistics: tuple[tuple[str, str] | None, ...] = ()

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:
        """What is read: (checkpoint label, tensor name) of the base, if there is one, and of every model."""
        labels = self.models if self.base is None else (self.base, *self.models)
        return tuple(zip(labels, self.stored or (self.name,) * len(labels), strict=True))

    @property
    def target_read(self) -> tuple[str, str] | None:
        """What is read of the target: (checkpoint label, tensor name)."""
        return None if self.target is None else (self.target, self.reads[0][1])

    def inputs(self, read: Reader) -> tuple[StoredTensor | None, list[StoredTensor]]:
        """Return the base, if there is one, and the models: as they are stored, or rounded to `in_dtype` first."""
        tensors = [StoredTensor.of(read(label, stored)) for label, stored in self.reads]
        if self.in_dtype is not None:
            tensors = [_rounded(tensor, self.in_dtype) for tensor in tensors]
        return (None, tensors) if self.base is None else (tensors[0], tensors[1:])

    @property
    def dtype(self) -> Dtype:
        """The dtype it is written in."""
        return self.out_dtype

    @property
    def elements(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its size in the output."""
        return self.elements * self.out_dtype.itemsize


def _rounded(stored: StoredTensor, dtype: Dtype) -> StoredTensor:
    if not stored.dtype.is_floating_point or stored.dtype == dtype:
        return stored
    return StoredTensor.of(stored.tensor.to(dtype.torch_dtype))


@dataclass(frozen=True)
class MergePlan:
    """A merge ready to run; see `plan_merge`."""

    recipe: Recipe
    checkpoints: Mapping[str, Checkpoint]
    jobs: tuple[TensorJob, ...]
    warnings: tuple[str, ...]
    config_from: Checkpoint
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    alignment: Alignment | None = None
    # What the output's tokenizer makes of conversations; None: what the tokenizer says itself.
    chat_template: str | None = None

    def read(self, label: str, name: str) -> StoredTensor:
        """Return a stored tensor of one of the checkpoints, or of one of the statistics files."""
        return self.statistics[label].stored(name) if label in self.statistics else self.checkpoints[label].stored(name)

    @property
    def nbytes(self) -> int:
        """Size of the merged tensors."""
        return sum(job.nbytes for job in self.jobs)

    @property
    def main_dtype(self) -> Dtype | None:
        """The floating dtype that most of the output is in: what its config.json states."""
        sizes: dict[Dtype, int] = {}
        for job in self.jobs:
            if job.out_dtype.is_floating_point:
                sizes[job.out_dtype] = sizes.get(job.out_dtype, 0) + job.elements
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def plan_merge(recipe: Recipe, checkpoints: Mapping[str, Checkpoint] | None = None) -> MergePlan:
    """Open what the recipe names, check that it belongs together, and settle every tensor.

    Args:
        recipe: a checked recipe.
        checkpoints: reference → open checkpoint; references that are missing here are opened.

    Raises:
        InputError: a checkpoint cannot be opened, or the inputs do not belong together.

    Example:
        >>> import torch
        >>> from dapt_merge.recipe import make_recipe
        >>> ones = open_checkpoint({"w": torch.ones(2)}, "b")
        >>> twos = open_checkpoint({"w": 2 * torch.ones(2)}, "d")
        >>> plan = plan_merge(make_recipe("b", ["d"], "linear", weight=0.5), {"b": ones, "d": twos})
        >>> [job.name for job in plan.jobs]
        ['w']
    """
    opened = with_own_heads(open_inputs(recipe, checkpoints or {}))
    alignment = None
    if recipe.vocabulary is not None:
        settings = recipe.vocabulary.with_models(lambda name: _spelled_in(opened, name))
        alignment = align(opened, settings, _outside_tokenizer(settings.source, opened, checkpoints or {}))
        opened = aligned_checkpoints(opened, alignment)
    inputs = list(opened.values())
    found = agree(inputs, by_layer=recipe.stacks_layers, allow_mismatch=recipe.allow_config_mismatch)
    plan = _with_chat_template(plan_from(recipe, opened, found))
    if alignment is None:
        return plan
    return replace(plan, alignment=alignment, warnings=(*plan.warnings, *alignment.sentences()))


def _outside_tokenizer(
    source: str, opened: Mapping[str, Checkpoint], given: Mapping[str, Checkpoint]
) -> Checkpoint | None:
    """Return the model that only lends its tokenizer; None where the tokenizer is one of the inputs'."""
    if source in ("base", "union", *opened):
        return None
    if source in given:
        return given[source]
    try:
        return open_tokenizer(source)
    except InputError as error:
        raise InputError(
            f"'{source}' is none of the models, and no other one: {error.what}.{nearest(source, tuple(opened))}",
            where="tokenizer_source",
            remedy=f"Give base, union, the path of a model, or one of: {', '.join(opened)}.",
        ) from error


def _with_chat_template(plan: MergePlan) -> MergePlan:
    if plan.recipe.chat_template is None:
        return plan
    owner = plan.config_from.folder
    models = sorted(plan.checkpoints.values(), key=lambda model: model.folder != owner)
    found = chosen_template(plan.recipe.chat_template, models)
    if found is not None and owner is not None and has_tokenizer(owner):
        return replace(plan, chat_template=found)
    why = "none of the models has one" if found is None else f"{plan.config_from.label} has no tokenizer to carry it"
    return replace(plan, warnings=(*plan.warnings, f"chat_template has no effect: {why}"))


def plan_from(recipe: Recipe, opened: Mapping[str, Checkpoint], agreement: Agreement) -> MergePlan:
    """Plan a merge of checkpoints that are known to belong together."""
    config_from = opened[_spelled_in(opened, recipe.config_reference())]
    tensors = layout(recipe, opened, agreement, config_from)
    if recipe.stacks_layers:
        config_from = config_from.with_config(stacked_config(recipe, opened, config_from.config))
    jobs = [_job(recipe, opened, tensor, config_from) for tensor in tensors]
    if recipe.freeze:
        from dapt_merge.merging.freezing import freeze

        jobs = freeze(jobs, recipe.freeze, [_owner(recipe, opened, tensor) for tensor in tensors])
    remarks = dict.fromkeys(remark for checkpoint in opened.values() for remark in checkpoint.remarks)
    warnings = (*recipe_warnings(recipe), *remarks, *agreement.warnings)
    if agreement.tied_head and config_from.config:
        config_from = config_from.with_config({**config_from.config, "tie_word_embeddings": True})
    files = _open_statistics(jobs)
    return MergePlan(recipe, opened, tuple(_with_statistics(jobs, files)), warnings, config_from, files)


def _job(recipe: Recipe, opened: Mapping[str, Checkpoint], tensor: LaidTensor, config_from: Checkpoint) -> TensorJob:
    part = tensor.part
    labels = tuple(_spelled_in(opened, source.model) for source in part.inputs)
    models = labels if part.base is None else labels[1:]
    # A tensor keeps the dtype that the model has whose configuration goes with it; in a stack, its first source's.
    giver, its_name = (config_from, tensor.name) if part.layers is None else (opened[labels[0]], tensor.stored[0])
    info = giver.tensors[its_name]
    own_names = tensor.stored[-len(models) :]
    renamed = any(stored != tensor.name for stored in tensor.stored)
    target = None if recipe.target is None else _spelled_in(opened, recipe.target)
    if target is not None:
        _check_target(opened[target], tensor.stored[0], info)
    layer, num_layers = _place(tensor)
    return TensorJob(
        tensor.name,
        info.shape,
        _out_dtype(recipe, info),
        None if part.base is None else labels[0],
        models,
        resolve(recipe, tensor.name, tensor.depth, tensor.layers, part=part, stored_names=own_names),
        stored=tensor.stored if renamed else (),
        target=target,
        in_dtype=None if recipe.input_dtype is None else parse_dtype(recipe.input_dtype),
        arithmetic=None if recipe.arithmetic is None else parse_dtype(recipe.arithmetic),
        stochastic=recipe.rounding == "stochastic",
        layer=layer,
        num_layers=num_layers,
    )


def _check_target(target: Checkpoint, name: str, info: TensorInfo) -> None:
    """Refuse a target without the base's counterpart of a tensor; of whole models that was checked before."""
    found = target.tensors.get(name)
    if found is None or found.shape != info.shape:
        raise InputError(
            f"the target has no '{name}'" if found is None else f"'{name}' is {found.shape} there, not {info.shape}",
            where=f"target {target.label}",
            remedy="Use a target of the base's architecture and number of layers.",
        )


def _place(tensor: LaidTensor) -> tuple[int | None, int | None]:
    """Return the layer of the output that a tensor stands in, or counts to, and how many there are."""
    if not tensor.height:
        return None, None
    layer = tensor_group(tensor.name).layer
    outside = tensor.height - 1 if comes_after_the_layers(tensor.name) else 0
    # Heads for further tokens are numbered past the last layer.
    return (outside if layer is None else min(layer, tensor.height - 1)), tensor.height


def _owner(recipe: Recipe, opened: Mapping[str, Checkpoint], tensor: LaidTensor) -> tuple[str, str] | None:
    """Return whose tensor stays where it is frozen, and its name there; None where its slice has no base."""
    part = tensor.part
    if part.layers is None:
        return _spelled_in(opened, recipe.target or str(recipe.base_model)), tensor.name
    bases = [
        (source.model, stored)
        for source, stored in zip(part.inputs, tensor.stored, strict=True)
        if part.base is source or same_model(source.model, recipe.base_model) or len(part.inputs) == 1
    ]
    if not bases:
        return None
    model, stored = bases[0]
    return _spelled_in(opened, recipe.target or model), stored


def _out_dtype(recipe: Recipe, info: TensorInfo) -> Dtype:
    keeps = not info.dtype.is_floating_point or recipe.output_dtype is None
    return info.stored_dtype or info.dtype if keeps else parse_dtype(str(recipe.output_dtype))


def _file_parameters(job: TensorJob) -> dict[str, tuple[str, ...]]:
    """Return the parameters that are statistics files: kind → one path for each model."""
    method, values = job.parameters.method, job.parameters.values
    found = {parameter.name: values[parameter.name] for parameter in method.parameters if parameter.kind == "file"}
    return {kind: tuple(map(str, paths)) for kind, paths in found.items() if isinstance(paths, tuple)}


def _open_statistics(jobs: Sequence[TensorJob]) -> dict[str, Statistics]:
    wanted = {path: kind for job in jobs for kind, paths in _file_parameters(job).items() for path in paths}
    return {path: open_statistics(path, kind) for path, kind in wanted.items()}


def _with_statistics(jobs: Sequence[TensorJob], files: Mapping[str, Statistics]) -> list[TensorJob]:
    """Say where the numbers on each tensor are, by the name that each model has for it.

    Raises:
        InputError: the numbers on a tensor have another shape than it asks for; a file has none on any tensor.
    """
    if not files:
        return list(jobs)
    placed = [replace(job, statistics=_statistics_of(job, files)) for job in jobs]
    used = {place[0] for job in placed for place in job.statistics if place is not None}
    for path, file in files.items():
        if path not in used:
            raise InputError(
                f"the statistics name none of the model's tensors, the first is '{next(iter(file.shapes), '')}'",
                where=path,
                remedy="Collect the statistics from the very model that is merged.",
            )
    return placed


def _statistics_of(job: TensorJob, files: Mapping[str, Statistics]) -> tuple[tuple[str, str] | None, ...]:
    places: list[tuple[str, str] | None] = []
    for kind, paths in _file_parameters(job).items():
        expected = (job.shape[-1],) * 2 if kind == "gram" and job.shape else job.shape
        for path, (_, name) in zip(paths, job.reads[-len(job.models) :], strict=True):
            found = files[path].shapes.get(name)
            if found not in (None, expected):
                raise InputError(
                    f"the statistics of '{name}' are {found}, expected {expected}",
                    where=path,
                    remedy="Collect the statistics from the very model that is merged.",
                )
            places.append(None if found is None else (path, name))
    return tuple(places)


def open_inputs(recipe: Recipe, given: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Return reference → checkpoint for every reference of the recipe, in its order, opening those not given."""
    by_path = {os.path.normpath(reference): checkpoint for reference, checkpoint in given.items()}
    opened: dict[str, Checkpoint] = {}
    for reference in recipe.references():
        known = by_path.get(os.path.normpath(reference))
        # The folder of a LoRA adapter stands on the recipe's base; what it names itself may lie elsewhere by now.
        under = None if recipe.base_model is None else opened.get(recipe.base_model)
        opened[reference] = known if known is not None else _open(reference, recipe, under, by_path)
        if not opened[reference].tensors:
            raise InputError("the checkpoint has no tensors", where=reference, remedy="Give a checkpoint with weights.")
    return opened


def _open(reference: str, recipe: Recipe, base: Checkpoint | None, given: Mapping[str, Checkpoint]) -> Checkpoint:
    entry = next((entry for entry in recipe.entries() if entry.average and entry.reference == reference), None)
    if entry is None or entry.average is None:
        plain, architecture = split_architecture(reference)
        if architecture is not None and os.path.normpath(plain) in given:
            return with_stated_architecture(given[os.path.normpath(plain)], architecture)
        model, _, adapter = reference.rpartition("+")
        under = given.get(os.path.normpath(model)) if model else None
        if under is not None and under.folder is not None:  # an adapter on another recipe's output
            return open_checkpoint(f"{under.folder}+{adapter}", reference)
        return open_checkpoint(reference, base=base)
    members: list[Path] = [Path(path) for path in entry.average.checkpoints or run_checkpoints(Path(entry.model))]
    window = entry.average.window
    if len(members) < max(2, window or 0):
        raise InputError(
            f"{len(members)} checkpoint(s) are there to average, and {max(2, window or 0)} are needed",
            where=entry.model,
            remedy="Give the folder of a run (checkpoint-STEP/ in it) or a list, and a window that fits it.",
        )
    weights = mean_weights(len(members), window=window, decay=entry.average.decay)
    opened = [given.get(os.path.normpath(path)) or open_checkpoint(path, base=base) for path in map(str, members)]
    return AveragedCheckpoint(reference, opened, weights)


def _spelled_in(opened: Mapping[str, Checkpoint], reference: str) -> str:
    if reference in opened:
        return reference
    same = (key for key in opened if os.path.normpath(key) == os.path.normpath(reference))
    return next(same, reference)
