"""Weighted averages of whole models: model soups, and WiSE-FT when a base is given.

The idea: a mean of nearby points is one of the points plus small steps towards the others. Computed that way, elements
on which the models agree stay exactly what they are, and the error is that of the small steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dapt_merge.errors import InputError
from dapt_merge.methods.contract import Parameter, Source, TensorContext, Values
from dapt_merge.methods.registry import method


def affine_combination(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return Σcᵢθᵢ for coefficients that add to 1, as θₐ + Σcᵢ(θᵢ − θₐ) from the θₐ of largest |cₐ|.

    Every operation rounds on its own: whether a multiply-add is fused depends on processor and build, and the bits must
    not. The inputs are float32 of one shape and are not modified.
    """
    anchor = max(range(len(tensors)), key=lambda position: abs(coefficients[position]))
    merged: Tensor | None = None
    for position, coefficient in enumerate(coefficients):
        if position != anchor and coefficient != 0:
            step = torch.sub(tensors[position], tensors[anchor]).mul_(coefficient)
            merged = step if merged is None else merged.add_(step)
    return tensors[anchor].clone() if merged is None else merged.add_(tensors[anchor])


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
    if base is not None:
        if not normalize:
            context.notes["normalize"] = "no effect: with a base, the base takes what the weights leave"
        return affine_combination([base, *models], [1 - math.fsum(weight), *weight])
    if normalize:
        weight_sum = math.fsum(weight)
        if abs(weight_sum) < 1e-8:
            raise InputError(
                f"the weights {list(weight)} add to 0, so that their average is undefined",
                where=f"tensor {context.name}",
                remedy="Change the weights, or set normalize: false.",
            )
        return affine_combination(models, [share / weight_sum for share in weight])
    merged = torch.zeros_like(models[0])
    for model, share in zip(models, weight, strict=True):
        merged.add_(model * share)
    return merged
