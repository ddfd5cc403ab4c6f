"""DARE: drop most elements of a task vector at random and scale the rest up, then merge.

The idea: changes from training are redundant; a random few of them, scaled to keep the sum, do the same work and
collide less. Which elements stay is a pure function of seed, tensor name and index (see `masks`), with an independent
mask for each model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dapt_merge.methods.contract import Parameter, Source, TensorContext, Values
from dapt_merge.methods.masks import keep_mask
from dapt_merge.methods.pieces import Operands, partial_sums
from dapt_merge.methods.registry import method
from dapt_merge.methods.task_arithmetic import (
    LAMBDA,
    NORMALIZE_BY_SUM,
    WEIGHT,
    cancelled_weight,
    input_copied,
    scales,
    zeroed,
)
from dapt_merge.methods.ties import (
    DENSITY,
    ELECT,
    NORMALIZE,
    elected_copy,
    elected_dead_knobs,
    merge_elected,
    normalizes,
    taking_part,
)

RESCALE = Parameter(
    "rescale",
    "expectation",
    "scale of the kept elements: expectation (1/density, the paper's), l1 (restores the tensor's L1 norm; also true) "
    "or none (also false)",
    choices=("expectation", "l1", "none", True, False),
)


def _rescales(operands: Operands, values: Values, context: TensorContext) -> tuple[float, ...]:
    """Return what the kept elements of each task vector are multiplied with."""
    voters = taking_part(values["weight"], values["density"])
    factors = []
    for position, density in enumerate(values["density"]):
        if position not in voters or density == 1 or values["rescale"] in ("none", False):
            factors.append(1.0)
        elif values["rescale"] == "expectation":
            factors.append(1 / density)
        else:
            factors.append(_l1_ratio(operands, position, density))
    return tuple(factors)


def _l1_ratio(operands: Operands, position: int, density: float) -> float:
    """Return Σ|δ| / Σ|kept δ|, or 1 when nothing that is not 0 was kept."""
    context = operands.context
    before: list[float] = []
    after: list[float] = []
    start = 0
    for delta in operands.deltas(position):
        magnitudes = delta.abs_().double()
        before += partial_sums(magnitudes)
        mask = keep_mask(context.seed, context.name, position, start, delta.numel(), density, delta.device)
        after += partial_sums(magnitudes.mul_(mask))
        start += delta.numel()
    kept = math.fsum(after)
    return math.fsum(before) / kept if kept else 1.0


def _dropped_deltas(
    base: Tensor,
    models: Sequence[Tensor],
    density: Sequence[float],
    factors: Sequence[float],
    positions: Sequence[int],
    context: TensorContext,
) -> list[Tensor]:
    """Return the task vectors of `positions`, dropped at random and rescaled."""
    deltas = []
    for position in positions:
        delta = torch.sub(models[position], base)
        if density[position] < 1:
            mask = keep_mask(
                context.seed, context.name, position, context.offset, delta.numel(), density[position], delta.device
            )
            delta.mul_(mask).mul_(factors[position])
        deltas.append(delta)
    return deltas


def _drop_dead_knobs(values: Values) -> list[str]:
    if all(density in (0, 1) for density in values["density"]):
        return ["density: nothing is dropped at random, so that the seed and rescale have no effect"]
    return []


def _linear_copy(values: Values, count: int, base_given: bool) -> Source | None:
    applied = [
        scale if density > 0 else 0.0
        for scale, density in zip(
            scales(values["weight"], values["normalize"], values["lambda"]), values["density"], strict=True
        )
    ]
    source = input_copied(applied)
    return source if source is None or source == "base" or values["density"][source] == 1 else None


def _linear_dead_knobs(values: Values, count: int) -> list[str]:
    dead = zeroed(values["weight"], values["lambda"]) or cancelled_weight(values["weight"], values["normalize"])
    return dead + _drop_dead_knobs(values)


@method(
    "dare_linear",
    parameters=(WEIGHT, DENSITY, LAMBDA, NORMALIZE_BY_SUM, RESCALE),
    reference="arXiv:2311.03099",
    random=True,
    elementwise=True,
    dead_knobs=_linear_dead_knobs,
    measure=_rescales,
    copy_of=_linear_copy,
)
def dare_linear(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    lambda_: float,
    normalize: bool,
    rescale: str | bool,
    measured: tuple[float, ...],
    context: TensorContext,
) -> Tensor:
    """Drop and rescale, then task arithmetic: θ₀ + λΣwᵢ·(mᵢ∘δᵢ)/densityᵢ, mᵢ a random mask of that density.

    `normalize` divides by Σw. In expectation over seeds (with `rescale: expectation`) the result is that of
    `task_arithmetic`, for any number of task vectors.
    """
    voters = taking_part(weight, density)
    applied = scales(weight, normalize, lambda_, context)
    merged: Tensor | None = None
    for position, delta in zip(voters, _dropped_deltas(base, models, density, measured, voters, context), strict=True):
        delta.mul_(applied[position])
        merged = delta if merged is None else merged.add_(delta)
    return base.clone() if merged is None else merged.add_(base)


def _ties_dead_knobs(values: Values, count: int) -> list[str]:
    return elected_dead_knobs(values, count) + _drop_dead_knobs(values)


@method(
    "dare_ties",
    parameters=(WEIGHT, DENSITY, LAMBDA, NORMALIZE, ELECT, RESCALE),
    reference="arXiv:2311.03099, arXiv:2306.01708",
    random=True,
    elementwise=True,
    dead_knobs=_ties_dead_knobs,
    measure=_rescales,
    copy_of=elected_copy,
)
def dare_ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    lambda_: float,
    normalize: str | bool,
    elect: str,
    rescale: str | bool,
    measured: tuple[float, ...],
    context: TensorContext,
) -> Tensor:
    """Drop and rescale, then elect and merge as `ties` does (`ties.merge_elected`) instead of trimming by magnitude.

    One task vector: nothing to elect, so this is `dare_linear`; n: the (weighted) mean of the kept elements that agree.
    """
    voters = taking_part(weight, density)
    return merge_elected(
        base,
        _dropped_deltas(base, models, density, measured, voters, context),
        [weight[position] for position in voters],
        elect=elect,
        normalize=normalizes(normalize, len(models)),
        lambda_=lambda_,
    )
