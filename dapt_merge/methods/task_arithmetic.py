"""Task arithmetic: add scaled task vectors to the base.

A task vector δᵢ = θᵢ − θ₀ is what training changed. This file also holds what every method of scaled task vectors has
in common: the scales, and when they make the result one of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dapt_merge.methods.averaging import affine_combination
from dapt_merge.methods.contract import Parameter, Source, TensorContext, Values
from dapt_merge.methods.fused import InputSum
from dapt_merge.methods.pieces import Operands
from dapt_merge.methods.registry import method

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT = Parameter("weight", None, "scale of each task vector", per_model=True)
LAMBDA = Parameter("lambda", 1.0, "scale of the merged task vector")
NORMALIZE_BY_SUM = Parameter("normalize", False, "divide the merged task vector by the sum of the weights")
_SMALLEST_SUM = 1e-8


def scales(
    weight: Sequence[float], normalize: bool, lambda_: float, context: TensorContext | None = None
) -> list[float]:
    """Return sᵢ = λwᵢ, or λwᵢ/Σw when normalized (not when Σw is 0, which is noted)."""
    divisor = math.fsum(weight) if normalize else 1.0
    if abs(divisor) < _SMALLEST_SUM:
        divisor = 1.0
        if context is not None:
            context.notes["normalize"] = "skipped: the weights add to 0"
    return [lambda_ * (share / divisor) for share in weight]


def input_copied(applied: Sequence[float]) -> Source | None:
    """Return the input that θ₀ + Σsᵢδᵢ is, for the scales s that are applied: the base, one model, or neither."""
    active = [position for position, scale in enumerate(applied) if scale != 0]
    if not active:
        return "base"
    return active[0] if len(active) == 1 and applied[active[0]] == 1 else None


def add_scaled(base: Tensor, deltas: Sequence[Tensor], applied: Sequence[float]) -> Tensor:
    """Return θ₀ + Σsᵢδᵢ for task vectors that are no longer differences of inputs; they are overwritten."""
    merged: Tensor | None = None
    for delta, scale in zip(deltas, applied, strict=True):
        delta.mul_(scale)
        merged = delta if merged is None else merged.add_(delta)
    return base.clone() if merged is None else merged.add_(base)


def cancelled_weight(weight: Sequence[float], normalize: bool) -> list[str]:
    """Explain a weight that the normalization divides out again."""
    if normalize and sum(share != 0 for share in weight) == 1:
        return [
            "weight: with one task vector, normalize: true divides by the weight that it multiplied with; every weight "
            "but 0 gives the same model (set normalize: false, or scale with lambda)"
        ]
    return []


def zeroed(weight: Sequence[float], lambda_: float) -> list[str]:
    """Explain scales that leave nothing but the base."""
    if lambda_ == 0:
        return ["lambda: 0 gives the base, whatever the other parameters are"]
    if not any(weight):
        return ["weight: every weight is 0, which gives the base, whatever the other parameters are"]
    return []


def _copy_of(values: Values, count: int, base_given: bool) -> Source | None:
    return input_copied(scales(values["weight"], values["normalize"], values["lambda"]))


def _dead_knobs(values: Values, count: int) -> list[str]:
    weight = values["weight"]
    return zeroed(weight, values["lambda"]) or cancelled_weight(weight, values["normalize"])


def _shares(weight: tuple[float, ...], lambda_: float, normalize: bool, context: TensorContext) -> list[float]:
    applied = scales(weight, normalize, lambda_, context)
    return [1 - math.fsum(applied), *applied]


def _fused(
    operands: Operands, *, weight: tuple[float, ...], lambda_: float, normalize: bool, context: TensorContext
) -> InputSum:
    return InputSum(_shares(weight, lambda_, normalize, context), affine=True)


@method(
    "task_arithmetic",
    parameters=(WEIGHT, LAMBDA, NORMALIZE_BY_SUM),
    reference="arXiv:2212.04089",
    elementwise=True,
    dead_knobs=_dead_knobs,
    copy_of=_copy_of,
    kernel=_fused,
)
def task_arithmetic(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    lambda_: float,
    normalize: bool,
    context: TensorContext,
) -> Tensor:
    """Add task vectors: θ₀ + λΣwᵢδᵢ, divided by Σw when `normalize`.

    With one task vector this is the line through base and model (beyond the model for a scale above 1, away from it
    for a negative one), with n their sum.
    """
    return affine_combination([base, *models], _shares(weight, lambda_, normalize, context))
