"""Spherical interpolation: along the arc between two weight tensors instead of the chord.

The idea: a tensor is one long vector; the angle between base and model gives two coefficients. Below a small angle arc
and chord cannot be told apart, and the chord is used; ordinary continued pre-training lives there, so most tensors say
so in their notes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dapt_merge.methods.averaging import affine_combination, weighted_sum
from dapt_merge.methods.contract import Parameter, Source, TensorContext, Values
from dapt_merge.methods.fused import InputSum
from dapt_merge.methods.pieces import Operands, partial_sums
from dapt_merge.methods.registry import method

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_NORM = 1e-8  # a shorter vector has no direction to speak of


def _cosine(operands: Operands) -> float | None:
    """Return the cosine of base and model as flat vectors, or None when one of them has no direction."""
    products, squares_base, squares_model = _products(operands)
    norm_base, norm_model = math.sqrt(math.fsum(squares_base)), math.sqrt(math.fsum(squares_model))
    if norm_base <= SMALLEST_NORM or norm_model <= SMALLEST_NORM:
        return None
    return max(-1.0, min(1.0, math.fsum(products) / norm_base / norm_model))


def _products(operands: Operands) -> Sequence[Sequence[float]]:
    """Return what Σθ₀θ₁, Σθ₀² and Σθ₁² are the sums of: float64, over short fixed runs of elements."""
    base, (model,) = operands.base, operands.models
    if base is not None and base.loop_place and model.loop_place:
        from dapt_merge.methods import kernels  # compiled loops are only loaded by merges that use them

        sums = np.empty((3, -(-operands.numel // kernels.SUMMED)))
        if kernels.products(*base.loop_place, *model.loop_place, operands.numel, sums):
            return sums.tolist()  # type: ignore[no-any-return]
    squares_base: list[float] = []
    squares_model: list[float] = []
    products: list[float] = []
    for _, base_piece, (model_piece,) in operands.pieces():
        assert base_piece is not None
        # float64, so that neither a square nor the cosine of a small angle is lost; only pieces are ever this wide.
        wide_base, wide_model = base_piece.double(), model_piece.double()
        products += partial_sums(wide_base * wide_model)
        squares_base += partial_sums(wide_base.square())
        squares_model += partial_sums(wide_model.square())
    return products, squares_base, squares_model


def _coefficients(operands: Operands, values: Values, context: TensorContext) -> tuple[float, float] | None:
    """Return what base and model are multiplied with on the arc; None stands for the chord."""
    t, threshold = values["t"], values["dot_threshold"]
    cosine = context.remembered(0, "cosine", lambda: _cosine(operands))
    if cosine is None:
        context.notes["fallback"] = "linear: a vector of norm 0 has no direction"
        return None
    if abs(cosine) > threshold:
        context.notes["fallback"] = f"linear: |cos| {abs(cosine):.6f} > {threshold:g}"
        return None
    angle = math.acos(cosine)
    # At an angle of exactly π (cosine −1 with a threshold of 1) no arc is the shortest.
    if math.sin(angle) < SMALLEST_NORM:
        context.notes["fallback"] = f"linear: no arc is defined at cos {cosine:.6f}"
        return None
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _copy_of(values: Values, count: int, base_given: bool) -> Source | None:
    ends: dict[float, Source] = {0.0: "base", 1.0: 0}
    return ends.get(values["t"])


def _shares(t: float, measured: tuple[float, float] | None) -> tuple[list[float], bool]:
    """Return what base and model are multiplied with, and whether that is the chord."""
    return ([1 - t, t], True) if measured is None else (list(measured), False)


def _fused(
    operands: Operands,
    *,
    t: float,
    dot_threshold: float,
    measured: tuple[float, float] | None,
    context: TensorContext,
) -> InputSum:
    return InputSum(*_shares(t, measured))


@method(
    "slerp",
    parameters=(
        Parameter("t", None, "how far along the arc from the base (0) to the model (1)", low=0, high=1),
        Parameter("dot_threshold", 0.9995, "cosine (either sign) past which it is linear", low=0, high=1),
    ),
    max_models=1,
    reference="Shoemake 1985, Animating rotation with quaternion curves",
    elementwise=True,
    measure=_coefficients,
    copy_of=_copy_of,
    kernel=_fused,
)
def slerp(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    t: float,
    dot_threshold: float,
    measured: tuple[float, float] | None,
    context: TensorContext,
) -> Tensor:
    """Move along the arc: (sin((1−t)Ω)·θ₀ + sin(tΩ)·θ₁) / sin Ω, Ω the angle between θ₀ and θ₁.

    The coefficients come from the unit vectors and are applied to the tensors as they are. Where |cos Ω| is past
    `dot_threshold`, or a tensor is zero, this is `linear`, (1−t)θ₀ + tθ₁, with a note `fallback`.
    """
    shares, chord = _shares(t, measured)
    return affine_combination([base, *models], shares) if chord else weighted_sum([base, *models], shares)
