"""Weighted averages of whole models: model soups, and WiSE-FT when a base is given.

The idea: a mean of nearby points is one of the points plus small steps towards the others. Computed that way, elements
on which the models agree stay exactly what they are, and the error is that of the small steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dapt_merge.errors import InputError
from dapt_merge.methods.contract import Parameter, Source, TensorContext, Values
from dapt_merge.methods.fused import InputSum
from dapt_merge.methods.pieces import Operands
from dapt_merge.methods.registry import method
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def affine_combination(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return Σcᵢθᵢ for coefficients that add to 1, as θₐ + Σcᵢ(θᵢ − θₐ) from the θₐ of largest |cₐ|.

    Every operation rounds on its own: whether a multiply-add is fused depends on processor and build, and the bits must
    not. The inputs are of one shape and dtype, and are not modified.
    """
    anchor = max(range(len(tensors)), key=lambda position: abs(coefficients[position]))
    merged: Tensor | None = None
    for position, coefficient in enumerate(coefficients):
        if position != anchor and coefficient != 0:
            step = torch.sub(tensors[position], tensors[anchor]).mul_(coefficient)
            merged = step if merged is None else merged.add_(step)
    return tensors[anchor].clone() if merged is None else merged.add_(tensors[anchor])


def weighted_sum(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return Σcᵢθᵢ, added in that order; the inputs are of one shape and dtype, and are not modified."""
    merged = tensors[0] * coefficients[0]
    for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        merged.add_(tensor * coefficient)
    return merged


def _copy_of(values: Values, count: int, base_given: bool) -> Source | None:
    weights = values["weight"]
    active = [position for position, weight in enumerate(weights) if weight != 0]
    if base_given:
        if not active:
            return "base"
        return active[0] if len(active) == 1 and weights[active[0]] == 1 else None
    if len(active) == 1 and (values["normalize"] or weights[active[0]] == 1):
        return active[0]
    return None


def _shares(
    base_given: bool, weight: Sequence[float], normalize: bool, context: TensorContext
) -> tuple[list[float], bool]:
    """Return the coefficient of each input (the base first), and whether they add to 1.

    Raises:
        InputError: there is no base, and the weights to normalize by add to 0.
    """
    if base_given:
        if not normalize:
            context.notes["normalize"] = "no effect: with a base, the base takes what the weights leave"
        return [1 - math.fsum(weight), *weight], True
    if not normalize:
        return list(weight), False
    weight_sum = math.fsum(weight)
    if abs(weight_sum) < 1e-8:
        raise InputError(
            f"the weights {list(weight)} add to 0, so that their average is undefined",
            where=f"tensor {context.name}",
            remedy="Change the weights, or set normalize: false.",
        )
    return [share / weight_sum for share in weight], True


def _fused(operands: Operands, *, weight: tuple[float, ...], normalize: bool, context: TensorContext) -> InputSum:
    return InputSum(*_shares(operands.base is not None, weight, normalize, context))


@method(
    "linear",
    parameters=(
        Parameter("weight", None, "share of each model in the average", per_model=True),
        Parameter("normalize", True, "divide by the sum of the weights (without a base)"),
    ),
    base="optional",
    reference="model soups, arXiv:2203.05482; with a base WiSE-FT, arXiv:2109.01903",
    elementwise=True,
    copy_of=_copy_of,
    kernel=_fused,
)
def linear(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    normalize: bool,
    context: TensorContext,
) -> Tensor:
    """Average models: Σwᵢθᵢ / Σwᵢ (without the division when `normalize` is false).

    With a base the weights are shares of the way to each model, and the base takes what they leave:
    θ₀ + Σwᵢ(θᵢ − θ₀). One model: that line between base and model; several: the simplex that they span.

    Raises:
        InputError: there is no base, and the weights to normalize by add to 0.
    """
    inputs = list(models) if base is None else [base, *models]
    shares, affine = _shares(base is not None, weight, normalize, context)
    return affine_combination(inputs, shares) if affine else weighted_sum(inputs, shares)
