"""DELLA: drop small changes more often than large ones, at random, and scale the rest up, then merge.

The idea: within a row of a weight matrix the magnitude's rank says how likely a change is to stay, and dividing what
stays by that probability keeps every element's expectation. DARE is the special case without ranks (epsilon 0). A row
is the last dimension; a vector is one row, and an element alone in its row has the density itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dapt_merge.errors import InputError
from dapt_merge.methods.contract import Parameter, TensorContext, Values
from dapt_merge.methods.dare import RESCALE, linear_copy, linear_dead_knobs, summed_in_one_pass, ties_dead_knobs
from dapt_merge.methods.fused import ByRank
from dapt_merge.methods.masks import keep_mask
from dapt_merge.methods.pieces import Operands
from dapt_merge.methods.registry import method
from dapt_merge.methods.rescaling import l1_ratio
from dapt_merge.methods.task_arithmetic import LAMBDA, NORMALIZE_BY_SUM, WEIGHT, add_scaled, scales
from dapt_merge.methods.ties import (
    DENSITY,
    ELECT,
    NORMALIZE,
    elected_copy,
    elected_in_one_pass,
    merge_elected,
    normalizes,
    taking_part,
)
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = Parameter(
    "epsilon",
    0.15,
    "how far above and below density the keep probabilities of a row reach (half the paper's epsilon)",
    per_model=True,
    low=0,
    high=0.5,
)
_ROUNDING = 1e-12  # 0.85 + 0.15 and the like may come out above 1


class _Pruning(NamedTuple):
    """What the drop needs to know of the whole tensor: its row length, and one factor per task vector.

    A factor of None divides each element by its own probability.
    """

    row_elements: int
    factors: tuple[float | None, ...]


def keep_probabilities(delta: Tensor, row_elements: int, density: float, epsilon: float) -> Tensor:
    """Return the probability with which each element stays: linear in its rank within its row.

    From density + epsilon for the largest magnitude of a row to density − epsilon for the smallest; equal magnitudes
    rank by index, the lower one higher. An element alone in its row has the density.

    Args:
        delta: whole rows, 1-d.
        row_elements: length of a row.
        density: mean of the probabilities of a row.
        epsilon: see above.

    Returns:
        float64, shaped like `delta`.

    Example:
        >>> keep_probabilities(torch.tensor([3.0, -9.0, 0.5]), 3, 0.5, 0.25).tolist()
        [0.5, 0.75, 0.25]
    """
    shape = (delta.numel() // row_elements, row_elements)
    probabilities = torch.full(shape, density, dtype=torch.float64, device=delta.device)
    if row_elements > 1 and epsilon > 0:
        order = delta.view(-1, row_elements).abs().sort(dim=1, descending=True, stable=True).indices
        by_rank = torch.from_numpy(_probabilities_by_rank(row_elements, density, epsilon)).to(delta.device)
        probabilities.scatter_(1, order, by_rank.expand_as(order))
    return probabilities.view(-1)


def _probabilities_by_rank(row_elements: int, density: float, epsilon: float) -> np.ndarray:
    """Return the probabilities of a row, that of its largest magnitude first: float64 [row_elements]."""
    if row_elements == 1 or not epsilon:
        return np.full(row_elements, density)
    ranks = np.arange(row_elements, dtype=np.float64)
    return np.minimum((1 - ranks * (2 / (row_elements - 1))) * epsilon + density, 1)


def _check(values: Values, where: str) -> None:
    for weight, density, epsilon in zip(values["weight"], values["density"], values["epsilon"], strict=True):
        if not weight or density in (0, 1):
            continue
        if epsilon >= density or density + epsilon > 1 + _ROUNDING:
            raise InputError(
                f"density {density:g} with epsilon {epsilon:g} gives keep probabilities from {density - epsilon:g} to "
                f"{density + epsilon:g}; they must be above 0 and at most 1",
                where=where,
                remedy=f"Use an epsilon below {density:g} and of at most {1 - density:g}, or another density.",
            )


def _pruning(operands: Operands, values: Values, context: TensorContext) -> _Pruning:
    voters = taking_part(values["weight"], values["density"])
    factors: list[float | None] = []
    for position, (density, epsilon) in enumerate(zip(values["density"], values["epsilon"], strict=True)):
        if position not in voters or density == 1 or values["rescale"] in ("none", False):
            factors.append(1.0)
        elif values["rescale"] == "expectation":
            factors.append(None)
        else:
            kept = partial(
                _kept,
                row_elements=operands.row_elements,
                density=density,
                epsilon=epsilon,
                position=position,
                context=context,
            )
            factors.append(l1_ratio(operands, position, kept))
    return _Pruning(operands.row_elements, tuple(factors))


def _kept(
    delta: Tensor,
    start: int,
    *,
    row_elements: int,
    density: float,
    epsilon: float,
    position: int,
    context: TensorContext,
) -> Tensor:
    return _kept_with(keep_probabilities(delta, row_elements, density, epsilon), start, position, context)


def _kept_with(probabilities: Tensor, start: int, position: int, context: TensorContext) -> Tensor:
    count = probabilities.numel()
    return keep_mask(context.seed, context.name, position, start, count, probabilities, probabilities.device)


def _pruned_deltas(
    base: Tensor,
    models: Sequence[Tensor],
    density: Sequence[float],
    epsilon: Sequence[float],
    pruning: _Pruning,
    positions: Sequence[int],
    context: TensorContext,
) -> list[Tensor]:
    """Return the task vectors of `positions`, dropped by rank and rescaled."""
    deltas = []
    for position in positions:
        delta = torch.sub(models[position], base)
        if density[position] < 1:
            probabilities = keep_probabilities(delta, pruning.row_elements, density[position], epsilon[position])
            delta.mul_(_kept_with(probabilities, context.offset, position, context))
            factor = pruning.factors[position]
            delta.div_(probabilities.to(delta.dtype)) if factor is None else delta.mul_(factor)
        deltas.append(delta)
    return deltas


def _drops(
    positions: Sequence[int], density: Sequence[float], pruning: _Pruning, epsilon: Sequence[float], **others: object
) -> list[ByRank | None]:
    """Return what `_pruned_deltas` does, for the compiled loops."""
    return [
        ByRank(
            _probabilities_by_rank(pruning.row_elements, density[position], epsilon[position]),
            position,
            pruning.factors[position],
        )
        if density[position] < 1
        else None
        for position in positions
    ]


@method(
    "della_linear",
    parameters=(WEIGHT, DENSITY, EPSILON, LAMBDA, NORMALIZE_BY_SUM, RESCALE),
    reference="arXiv:2406.11617",
    random=True,
    elementwise=True,
    whole_rows=True,
    dead_knobs=linear_dead_knobs,
    measure=_pruning,
    check=_check,
    copy_of=linear_copy,
    kernel=summed_in_one_pass(_drops),
)
def della_linear(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    epsilon: tuple[float, ...],
    lambda_: float,
    normalize: bool,
    rescale: str | bool,
    measured: _Pruning,
    context: TensorContext,
) -> Tensor:
    """Drop by rank and rescale, then task arithmetic: θ₀ + λΣwᵢ·(mᵢ∘δᵢ)/pᵢ, mᵢ a random mask of probabilities pᵢ.

    pᵢ falls linearly from density + epsilon for the largest magnitude of a row to density − epsilon for the smallest;
    equal magnitudes rank by index, and an element alone in its row has the density. Density 1 drops nothing, whatever
    epsilon is. `normalize` divides by Σw. In expectation over seeds (with `rescale: expectation`) the result is that of
    `task_arithmetic`, for one, two or n task vectors. mergekit has `rescale: l1` (its `true`).
    """
    voters = taking_part(weight, density)
    applied = scales(weight, normalize, lambda_, context)
    deltas = _pruned_deltas(base, models, density, epsilon, measured, voters, context)
    return add_scaled(base, deltas, [applied[position] for position in voters])


@method(
    "della",
    parameters=(WEIGHT, DENSITY, EPSILON, LAMBDA, NORMALIZE, ELECT, RESCALE),
    reference="arXiv:2406.11617, arXiv:2306.01708",
    random=True,
    elementwise=True,
    whole_rows=True,
    dead_knobs=ties_dead_knobs,
    measure=_pruning,
    check=_check,
    copy_of=elected_copy,
    kernel=elected_in_one_pass(_drops),
)
def della(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    epsilon: tuple[float, ...],
    lambda_: float,
    normalize: str | bool,
    elect: str,
    rescale: str | bool,
    measured: _Pruning,
    context: TensorContext,
) -> Tensor:
    """Drop by rank and rescale as `della_linear` does, then elect signs and merge as `ties` does.

    One task vector: nothing to elect, so this is `della_linear`; two or n: the (weighted) mean of the kept elements
    that agree. The paper elects with `elect: unweighted` and averages with equal weights.
    """
    voters = taking_part(weight, density)
    return merge_elected(
        base,
        _pruned_deltas(base, models, density, epsilon, measured, voters, context),
        [weight[position] for position in voters],
        elect=elect,
        normalize=normalizes(normalize, len(models)),
        lambda_=lambda_,
    )
