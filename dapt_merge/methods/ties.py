"""TIES: trim each task vector, elect a sign per element, merge only what agrees with it.

The idea: small changes are noise, and changes of opposite sign cancel each other; both are removed before averaging.
The trimming threshold is the one thing about the whole tensor that the elements need. With one task vector there is
nothing to elect, and TIES is task arithmetic on the trimmed task vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dapt_merge.errors import InputError
from dapt_merge.methods.contract import Parameter, Source, TensorContext, Values
from dapt_merge.methods.fused import TaskVectorSum, Thinning, ToBand
from dapt_merge.methods.pieces import Operands
from dapt_merge.methods.registry import method
from dapt_merge.methods.rescaling import RESCALE_SELECTED, l1_ratio, restores_l1
from dapt_merge.methods.selection import Cutoff, find_cutoff, find_cutoffs, kept_count, kept_mask
from dapt_merge.methods.stored_deltas import delta_magnitudes
from dapt_merge.methods.task_arithmetic import LAMBDA, WEIGHT, cancelled_weight, input_copied, zeroed
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

DENSITY = Parameter("density", 1.0, "share of the elements of each task vector that is kept", True, low=0, high=1)
NORMALIZE = Parameter(
    "normalize",
    "auto",
    "divide each element by the sum of the weights that agree on it; auto: with two or more task vectors",
    choices=("auto", True, False),
)
ELECT = Parameter(
    "elect",
    "weighted",
    "whose sum decides the sign: weighted (Σwδ), unweighted (Σδ, the paper's) or count (Σ sign wδ)",
    choices=("weighted", "unweighted", "count"),
)
TRIM_SCOPE = Parameter(
    "trim_scope",
    "tensor",
    "where the density is counted: in each tensor, or over the whole model (the paper's)",
    choices=("tensor", "model"),
)


def normalizes(normalize: str | bool, count: int) -> bool:
    """Resolve `auto`: with one task vector, dividing by the weight would cancel it."""
    return count > 1 if normalize == "auto" else bool(normalize)


def taking_part(weight: Sequence[float], density: Sequence[float]) -> list[int]:
    """Return the positions of the models that have a vote: those whose weight and density are not 0."""
    return [position for position in range(len(weight)) if weight[position] != 0 and density[position] > 0]


def elected_copy(values: Values, count: int, base_given: bool) -> Source | None:
    """Return the input that a merge by elected signs is: the base, one model, or neither."""
    voters = taking_part(values["weight"], values["density"])
    if not voters or values["lambda"] == 0:
        return "base"
    if len(voters) > 1 or values["density"][voters[0]] < 1:
        return None
    factor = 1.0 if normalizes(values["normalize"], count) else values["weight"][voters[0]]
    return voters[0] if input_copied([values["lambda"] * factor]) == 0 else None


def elected_dead_knobs(values: Values, count: int) -> list[str]:
    """Explain the knobs that can have no effect on a merge by elected signs."""
    weight, density = values["weight"], values["density"]
    voters = taking_part(weight, density)
    dead = zeroed(weight, values["lambda"])
    if dead:
        return dead
    if not voters:
        return ["density: every density is 0, which gives the base, whatever the other parameters are"]
    if len(voters) == 1:
        dead += cancelled_weight([weight[voters[0]]], normalizes(values["normalize"], count))
        if values["elect"] != ELECT.default:
            dead.append("elect: a single task vector agrees with itself, however the sign is elected")
    return dead


def merge_elected(
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    elect: str,
    normalize: bool,
    lambda_: float,
) -> Tensor:
    """Return θ₀ + λ·m, where m per element sums wᵢδᵢ over those i whose vote has the elected sign.

    The elected sign is that of the sum of the votes, 0 counting as positive: wᵢδᵢ (`weighted`), δᵢ (`unweighted`) or
    sign(wᵢδᵢ) (`count`). `normalize` divides by the sum of the agreeing weights (unless that is 0). Elements that are 0
    never agree. Sums are in the base's dtype in the order of the models, so that votes that cancel up to rounding can
    elect either sign.

    Args:
        base: float32 or float64.
        deltas: task vectors after trimming, shaped like the base; they are overwritten.
        weights: one per task vector, none 0.
        elect: see above.
        normalize: see above.
        lambda_: scale of the merged task vector.
    """
    if len(deltas) == 1:
        return deltas[0].mul_(lambda_ if normalize else lambda_ * weights[0]).add_(base)
    elected = _elected_sign(deltas, weights, elect)
    merged = torch.zeros_like(base)
    divisor = torch.zeros_like(base) if normalize else None
    for delta, weight in zip(deltas, weights, strict=True):
        against = elect == "unweighted" and weight < 0  # the vote is δ, which wδ then opposes
        # |wδ| where the vote agrees with the elected sign, 0 elsewhere
        agreeing = delta.mul_(-elected if against else elected).clamp_min_(0)
        if divisor is not None:
            divisor.add_(torch.sign(agreeing).mul_(weight))
        merged.sub_(agreeing) if against else merged.add_(agreeing)
    merged.mul_(elected)
    if divisor is not None:
        merged.div_(divisor.masked_fill_(divisor == 0, 1.0))
    return (merged if lambda_ == 1 else merged.mul_(lambda_)).add_(base)


def elected_in_one_pass(thinned: Callable[..., Sequence[Thinning]]) -> Callable[..., TaskVectorSum]:
    """Return what `merge_elected` does with thinned task vectors, for the compiled loops.

    Args:
        thinned: (positions of the voters, density, measured, the method's other parameters) → how each is thinned.

    Returns:
        What a method takes as its `kernel`.
    """

    def fused(
        operands: Operands,
        *,
        weight: tuple[float, ...],
        density: tuple[float, ...],
        lambda_: float,
        normalize: str | bool,
        elect: str,
        measured: Any,
        context: TensorContext,
        **others: Any,
    ) -> TaskVectorSum:
        voters = taking_part(weight, density)
        thinnings, weights = thinned(voters, density, measured, **others), [weight[position] for position in voters]
        divides = normalizes(normalize, len(operands.models))
        if len(voters) == 1:
            return TaskVectorSum(voters, thinnings, [lambda_ if divides else lambda_ * weights[0]])
        return TaskVectorSum(voters, thinnings, weights, elect, divides, lambda_)

    return fused


def _elected_sign(deltas: Sequence[Tensor], weights: Sequence[float], elect: str) -> Tensor:
    """Return +1 or −1 per element, and multiply each task vector with its weight on the way."""
    votes = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        if elect == "unweighted":
            votes.add_(delta)
        delta.mul_(weight)
        if elect == "weighted":
            votes.add_(delta)
        elif elect == "count":
            votes.add_(torch.sign(delta))
    return votes.ge_(0).mul_(2).sub_(1)


def model_cutoffs(tensors: Sequence[Operands], density: Sequence[float]) -> list[tuple[Cutoff | None, ...]]:
    """Return, for `trim_scope: model`, what `TensorContext.cutoffs` of each tensor must hold.

    Args:
        tensors: every float tensor of the model, in a fixed order (equal magnitudes go to the earlier one).
        density: one per model; density 1 needs no cutoff.
    """
    sizes = [operands.numel for operands in tensors]
    columns: list[list[Cutoff | None]] = []
    for position, share in enumerate(density):
        kept = kept_count(share, sum(sizes))
        if share >= 1 or not kept:
            columns.append([None] * len(tensors))
            continue
        whole = find_cutoff(delta_magnitudes(tensors, position), kept)
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        columns.append([Cutoff(whole.magnitude_bits, whole.last_tied - start) for start in starts])
    return [tuple(row) for row in zip(*columns, strict=True)]


def cutoffs_of(
    operands: Operands, position: int, counts: tuple[int, ...], context: TensorContext
) -> tuple[Cutoff, ...]:
    """Return the cutoffs that keep so many of the largest elements of one task vector."""
    return context.remembered(
        position,
        ("cutoffs", counts),
        lambda: tuple(find_cutoffs(delta_magnitudes([operands], position), counts)),
    )


class _Trim(NamedTuple):
    """What stays of a task vector (None: all of it), and what that is multiplied with."""

    cutoff: Cutoff | None
    factor: float = 1.0

    def mask(self, delta: Tensor, start: int) -> Tensor:
        """Return which elements of a 1-d run stay; `start` is the index of its first element."""
        assert self.cutoff is not None
        return kept_mask(delta, self.cutoff, start)


def _trims(operands: Operands, values: Values, context: TensorContext) -> tuple[_Trim, ...]:
    trims = [_Trim(cutoff) for cutoff in _cutoffs(operands, values, context)]
    if not restores_l1(values["rescale"]):
        return tuple(trims)
    return tuple(
        trim if trim.cutoff is None else trim._replace(factor=l1_ratio(operands, position, trim.mask))
        for position, trim in enumerate(trims)
    )


def _cutoffs(operands: Operands, values: Values, context: TensorContext) -> tuple[Cutoff | None, ...]:
    if values["trim_scope"] == "model" and any(density < 1 for density in values["density"]):
        if context.cutoffs is None:
            raise InputError(
                "trim_scope: model needs thresholds of the whole model, which this merge does not have",
                where=f"tensor {context.name}",
                remedy="Use trim_scope: tensor.",
            )
        return context.cutoffs
    voters = taking_part(values["weight"], values["density"])
    return tuple(
        cutoffs_of(operands, position, (kept_count(density, operands.numel),), context)[0]
        if position in voters and density < 1
        else None
        for position, density in enumerate(values["density"])
    )


def _dead_knobs(values: Values, count: int) -> list[str]:
    dead = elected_dead_knobs(values, count)
    if all(density in (0, 1) for density in values["density"]):
        if values["trim_scope"] != TRIM_SCOPE.default:
            dead.append("trim_scope: density 1 trims nothing, in a tensor or in the whole model")
        if restores_l1(values["rescale"]):
            dead.append("rescale: density 1 trims nothing")
    return dead


def _trimmed(
    voters: Sequence[int], density: Sequence[float], measured: Sequence[_Trim], **others: object
) -> list[Thinning]:
    trims = [measured[position] for position in voters]
    return [None if trim.cutoff is None else ToBand(trim.cutoff, factor=trim.factor) for trim in trims]


@method(
    "ties",
    parameters=(WEIGHT, DENSITY, LAMBDA, NORMALIZE, ELECT, TRIM_SCOPE, RESCALE_SELECTED),
    reference="arXiv:2306.01708",
    elementwise=True,
    dead_knobs=_dead_knobs,
    measure=_trims,
    copy_of=elected_copy,
    kernel=elected_in_one_pass(_trimmed),
)
def ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    lambda_: float,
    normalize: str | bool,
    elect: str,
    trim_scope: str,
    rescale: str | bool,
    measured: tuple[_Trim, ...],
    context: TensorContext,
) -> Tensor:
    """Trim, elect, merge: θ₀ + λ times, in each element, the mean of those trimmed δᵢ that have the elected sign.

    Trimming keeps the ⌊density·n⌋ largest elements of each δᵢ; equal magnitudes go to the lower index. `elect` says
    whose sum gives the sign (0 counts as positive), and `normalize` whether the agreeing wᵢδᵢ are divided by their
    weights. A model of weight or density 0 has no vote. One task vector: the trimmed δ times its weight. The paper:
    `elect: unweighted`, `trim_scope: model`, equal weights, one density for all. `rescale: l1` is mergekit's: each
    trimmed δᵢ times Σ|δᵢ|/Σ|trimmed δᵢ|.
    """
    voters = taking_part(weight, density)
    deltas = []
    for position in voters:
        delta, trim = torch.sub(models[position], base), measured[position]
        if trim.cutoff is not None:
            delta.mul_(trim.mask(delta, context.offset))
        deltas.append(delta if trim.factor == 1 else delta.mul_(trim.factor))
    return merge_elected(
        base,
        deltas,
        [weight[position] for position in voters],
        elect=elect,
        normalize=normalizes(normalize, len(models)),
        lambda_=lambda_,
    )
