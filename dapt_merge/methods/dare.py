"""DARE: drop most elements of a task vector at random and scale the rest up, then merge.

The idea: changes from training are redundant; a random few of them, scaled to keep the sum, do the same work and
collide less. Which elements stay is a pure function of seed, tensor name and index (see `masks`), with an independent
mask for each model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dapt_merge.methods.contract import Parameter, Source, TensorContext, Values
from dapt_merge.methods.fused import AtRandom, TaskVectorSum, Thinning
from dapt_merge.methods.masks import keep_mask
from dapt_merge.methods.pieces import Operands
from dapt_merge.methods.registry import method
from dapt_merge.methods.rescaling import l1_ratio
from dapt_merge.methods.task_arithmetic import (
    LAMBDA,
    NORMALIZE_BY_SUM,
    WEIGHT,
    add_scaled,
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
    elected_in_one_pass,
    merge_elected,
    normalizes,
    taking_part,
)
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

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
            kept = partial(_kept, position=position, density=density, context=context)
            factors.append(l1_ratio(operands, position, kept))
    return tuple(factors)


def _kept(delta: Tensor, start: int, position: int, density: float, context: TensorContext) -> Tensor:
    return keep_mask(context.seed, context.name, position, start, delta.numel(), density, delta.device)


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
            delta.mul_(_kept(delta, context.offset, position, density[position], context)).mul_(factors[position])
        deltas.append(delta)
    return deltas


def _drops(
    positions: Sequence[int], density: Sequence[float], factors: Sequence[float], **others: object
) -> list[AtRandom | None]:
    """Return what `_dropped_deltas` does, for the compiled loops."""
    return [
        AtRandom(density[position], position, factors[position]) if density[position] < 1 else None
        for position in positions
    ]


def summed_in_one_pass(thinned: Callable[..., Sequence[Thinning]]) -> Callable[..., TaskVectorSum]:
    """Return the scaled sum of thinned task vectors, for the compiled loops; see `ties.elected_in_one_pass`."""

    def fused(
        operands: Operands,
        *,
        weight: tuple[float, ...],
        density: tuple[float, ...],
        lambda_: float,
        normalize: bool,
        measured: Any,
        context: TensorContext,
        **others: Any,
    ) -> TaskVectorSum:
        voters = taking_part(weight, density)
        applied = scales(weight, normalize, lambda_, context)
        thinnings = thinned(voters, density, measured, **others)
        return TaskVectorSum(voters, thinnings, [applied[position] for position in voters])

    return fused


def drop_dead_knobs(values: Values) -> list[str]:
    """Explain a random drop that drops nothing."""
    if all(density in (0, 1) for density in values["density"]):
        return ["density: nothing is dropped at random, so that the seed and the other knobs of the drop are dead"]
    return []


def linear_copy(values: Values, count: int, base_given: bool) -> Source | None:
    """Return the input that a sum of thinned out task vectors is: the base, one model, or neither."""
    applied = [
        scale if density > 0 else 0.0
        for scale, density in zip(
            scales(values["weight"], values["normalize"], values["lambda"]), values["density"], strict=True
        )
    ]
    source = input_copied(applied)
    return source if source is None or source == "base" or values["density"][source] == 1 else None


def linear_dead_knobs(values: Values, count: int) -> list[str]:
    """Explain the knobs that can have no effect on a sum of task vectors that are dropped from at random."""
    dead = zeroed(values["weight"], values["lambda"]) or cancelled_weight(values["weight"], values["normalize"])
    return dead + drop_dead_knobs(values)


@method(
    "dare_linear",
    parameters=(WEIGHT, DENSITY, LAMBDA, NORMALIZE_BY_SUM, RESCALE),
    reference="arXiv:2311.03099",
    random=True,
    elementwise=True,
    dead_knobs=linear_dead_knobs,
    measure=_rescales,
    copy_of=linear_copy,
    kernel=summed_in_one_pass(_drops),
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
    deltas = _dropped_deltas(base, models, density, measured, voters, context)
    return add_scaled(base, deltas, [applied[position] for position in voters])


def ties_dead_knobs(values: Values, count: int) -> list[str]:
    """Explain the knobs that can have no effect on an election of task vectors that are dropped from at random."""
    return elected_dead_knobs(values, count) + drop_dead_knobs(values)


@method(
    "dare_ties",
    parameters=(WEIGHT, DENSITY, LAMBDA, NORMALIZE, ELECT, RESCALE),
    reference="arXiv:2311.03099, arXiv:2306.01708",
    random=True,
    elementwise=True,
    dead_knobs=ties_dead_knobs,
    measure=_rescales,
    copy_of=elected_copy,
    kernel=elected_in_one_pass(_drops),
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
    """Drop and rescale, then elect and merge as `ties` does instead of trimming by magnitude.

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
