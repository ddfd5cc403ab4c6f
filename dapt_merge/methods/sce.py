"""SCE: select where the models differ most, calculate a weight for each from its changes, erase minority signs.

The idea: no weights to choose; what a model changed most is what it knows best. With positions selected by variance,
each task vector counts by its mean square, and an element keeps only the changes that share the elected sign.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from dapt_merge.methods.contract import Parameter, Source, TensorContext, Values
from dapt_merge.methods.pieces import Operands, partial_sums
from dapt_merge.methods.registry import method
from dapt_merge.methods.selection import Cutoff, find_cutoff, kept_count, kept_mask
from dapt_merge.methods.ties import merge_elected
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


class _Selection(NamedTuple):
    """The border of the selected variances (None: all are selected), and each task vector's weight.

    Without any weight above 0 nothing is merged.
    """

    cutoff: Cutoff | None
    weights: tuple[float, ...]


def variance(deltas: Sequence[Tensor]) -> Tensor:
    """Return the variance of each element over the task vectors (divided by N): exactly 0 where all are equal."""
    mean = torch.zeros_like(deltas[0])
    for delta in deltas[1:]:
        mean.add_(delta - deltas[0])
    mean.div_(len(deltas)).add_(deltas[0])
    spread = torch.zeros_like(mean)
    for delta in deltas:
        spread.add_((delta - mean).square_())
    return spread.div_(len(deltas))


def _deltas(operands: Operands) -> Iterator[tuple[int, list[Tensor]]]:
    for start, base, models in operands.pieces():
        assert base is not None
        yield start, [torch.sub(model, base) for model in models]


def _selection(operands: Operands, values: Values, context: TensorContext) -> _Selection:
    count, cutoff = len(operands.models), None
    if values["select_topk"] < 1:
        differing = sum(int(torch.count_nonzero(variance(deltas))) for _, deltas in _deltas(operands))
        if not differing:
            return _Selection(None, (0.0,) * count)
        kept = kept_count(values["select_topk"], differing)
        cutoff = find_cutoff(lambda: (variance(deltas) for _, deltas in _deltas(operands)), kept)
    sums: list[list[float]] = [[] for _ in range(count)]
    for start, deltas in _deltas(operands):
        mask = None if cutoff is None else kept_mask(variance(deltas), cutoff, start)
        for position, delta in enumerate(deltas):
            squares = delta.double().square_()
            sums[position] += partial_sums(squares if mask is None else squares.mul_(mask))
    squared = [math.fsum(partial) for partial in sums]
    total = math.fsum(squared)
    if total / operands.numel < values["equal_below"]:
        return _Selection(cutoff, (1 / count,) * count)
    return _Selection(cutoff, tuple(square / total if total else 0.0 for square in squared))


def _copy_of(values: Values, count: int, base_given: bool) -> Source | None:
    if values["select_topk"] == 0:
        return "base"
    if count > 1:
        return None
    return 0 if values["select_topk"] == 1 else "base"


def _dead_knobs(values: Values, count: int) -> list[str]:
    dead = []
    if count == 1:
        dead.append("select_topk: one task vector has no variance; 1 gives the model itself, anything less the base")
    elif values["select_topk"] == 0:
        dead.append("select_topk: 0 gives the base, whatever the models are")
    if values["equal_below"] > 0 and (count == 1 or values["select_topk"] == 0):
        dead.append("equal_below: nothing is weighted")
    return dead


@method(
    "sce",
    parameters=(
        Parameter("select_topk", 1.0, "share of the positions that is merged, the largest variances", low=0, high=1),
        Parameter(
            "equal_below",
            0.0,
            "sum of the mean squares below which all task vectors weigh the same (mergekit: 1e-6)",
            low=0,
        ),
    ),
    reference="arXiv:2408.07990",
    elementwise=True,
    dead_knobs=_dead_knobs,
    measure=_selection,
    copy_of=_copy_of,
)
def sce(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    select_topk: float,
    equal_below: float,
    measured: _Selection,
    context: TensorContext,
) -> Tensor:
    """Select, calculate, erase: θ₀ + Σwᵢδᵢ/Σwᵢ over those δᵢ that have the sign of Σδ at their element.

    Selected are the ⌊select_topk·m⌋ (at least one) positions of largest variance among the m where the models differ at
    all; equal variances go to the lower index. wᵢ is the share of δᵢ in the sum of squares at the selected positions. A
    sum of 0 counts as positive, and zeros have no sign. One task vector: it has no variance, so that select_topk 1
    gives the model and anything less the base; two or n: as above. mergekit weighs all alike where the mean squares
    add to less than 1e-6, as those of most continued pre-training do; `equal_below` chooses.
    """
    deltas = [torch.sub(model, base) for model in models]
    if measured.cutoff is not None:
        mask = kept_mask(variance(deltas), measured.cutoff, context.offset)
        for delta in deltas:
            delta.mul_(mask)
    voters = [position for position, weight in enumerate(measured.weights) if weight > 0]
    if not voters:
        return base.clone()
    return merge_elected(
        base,
        [deltas[position] for position in voters],
        [measured.weights[position] for position in voters],
        elect="unweighted",
        normalize=True,
        lambda_=1.0,
    )
