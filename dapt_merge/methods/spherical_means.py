"""Means of several models on the sphere: one closed form, and the Karcher mean by iteration.

The idea: directions and lengths are averaged apart, because the mean of directions that disagree is too short. Both
means are sums of the inputs whose factors follow from inner products, so that iterating costs nothing: the tensors are
read once to be measured and once to be added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dapt_merge.errors import InputError
from dapt_merge.methods.contract import Parameter, Source, TensorContext, Values
from dapt_merge.methods.inner_products import SMALLEST_SINE, gram_matrix, linear_combination
from dapt_merge.methods.pieces import Operands
from dapt_merge.methods.registry import method
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def _shares(weight: Sequence[float], normalize: bool, context: TensorContext) -> Tensor:
    shares = torch.tensor(weight, dtype=torch.float64)
    if not normalize:
        return shares
    total = math.fsum(weight)
    if abs(total) < 1e-8:
        raise InputError(
            f"the weights {list(weight)} add to 0, so that their mean is undefined",
            where=f"tensor {context.name}",
            remedy="Change the weights, or set normalize_weights: false.",
        )
    return shares / total


def _length(gram: Tensor, coefficients: Tensor) -> float:
    """Return ‖Σcᵢvᵢ‖; rounding below 0 counts as 0."""
    return math.sqrt(max(0.0, float(coefficients @ gram @ coefficients)))


def _multislerp_coefficients(operands: Operands, values: Values, context: TensorContext) -> list[float]:
    shares = _shares(values["weight"], values["normalize_weights"], context)
    gram, eps = gram_matrix(operands), values["eps"]
    norms = gram.diagonal().sqrt()
    unit_shares = shares / (norms + eps) if eps or bool((norms > 0).all()) else torch.zeros_like(shares)
    length = _length(gram, unit_shares)
    if length < max(eps, 1e-300):
        context.notes["fallback"] = "linear: the weighted directions cancel, so that their mean has none"
        return shares.tolist()
    # The tangent vectors at this very mean, weighted alike, add to 0: the exponential map leads nowhere else.
    return (unit_shares / length * float(shares @ norms)).tolist()


def _multislerp_copy(values: Values, count: int, base_given: bool) -> Source | None:
    if count == 1:
        return 0
    weights = values["weight"]
    active = [position for position, weight in enumerate(weights) if weight != 0]
    if len(active) == 1 and (values["normalize_weights"] or weights[active[0]] == 1):
        return active[0]
    return None


def _multislerp_dead_knobs(values: Values, count: int) -> list[str]:
    if count == 1:
        return ["weight: a single model is its own mean, whatever its weight; the other parameters have no effect"]
    return []


@method(
    "multislerp",
    parameters=(
        Parameter("weight", None, "weight of each model in the mean direction and the mean length", per_model=True),
        Parameter("normalize_weights", True, "divide the weights by their sum"),
        Parameter("eps", 1e-8, "added to a length before dividing by it; a shorter mean is no direction", low=0),
    ),
    base="optional",
    reference="barycentric interpolation on the sphere, one tangent step; option names as in mergekit",
    elementwise=True,
    measure=_multislerp_coefficients,
    copy_of=_multislerp_copy,
    dead_knobs=_multislerp_dead_knobs,
)
def multislerp(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    normalize_weights: bool,
    eps: float,
    measured: list[float],
    context: TensorContext,
) -> Tensor:
    """Give the weighted mean direction the weighted mean length: (Σwᵢ‖vᵢ‖) · Σwᵢv̂ᵢ / ‖Σwᵢv̂ᵢ‖, v̂ᵢ = vᵢ/(‖vᵢ‖ + eps).

    vᵢ are the models, or with a base the task vectors, whose mean is then added to the base. Usually told as one step
    of the tangent-space mean: project onto the tangent space at the mean direction, average there, map back. The
    projected vectors average to 0 at that point, so that this closed form remains.

    One model gives that model. Directions that cancel are merged linearly, Σwᵢvᵢ, with a note `fallback` (mergekit does
    so for two models and stops for more). A model of weight 0 has no part.

    Raises:
        InputError: the weights to normalize by add to 0.
    """
    return _added_up(base, models, measured)


def _karcher_coefficients(operands: Operands, values: Values, context: TensorContext) -> list[float]:
    gram, tol = gram_matrix(operands), values["tol"]
    norms = gram.diagonal().sqrt()
    count = len(norms)
    directed = norms > tol
    if not bool(directed.any()):
        context.notes["fallback"] = f"linear: no tensor is longer than tol {tol:g}"
        return [1 / count] * count
    inverse = torch.where(directed, 1 / norms, 0.0)
    units = gram * inverse[:, None] * inverse
    share = directed.double() / directed.sum()
    mean = _karcher_direction(units, share, _whole_number(values["max_iter"], context), tol, context)
    return (mean * inverse * norms.mean()).tolist()


def _karcher_direction(units: Tensor, share: Tensor, max_iter: int, tol: float, context: TensorContext) -> Tensor:
    """Return the mean direction as coefficients of the unit vectors, whose inner products are `units`."""
    length = _length(units, share)
    if length < tol:
        first = int(share.nonzero()[0])
        mean = torch.nn.functional.one_hot(torch.tensor(first), len(share)).double()
    else:
        mean = share / length
    for _ in range(max_iter):
        cosines = (units @ mean).clamp(-1, 1)
        angles = cosines.acos()
        sines = angles.sin()
        opposite = (sines < SMALLEST_SINE) & (cosines < 0) & (share > 0)
        if bool(opposite.any()):
            context.notes["fallback"] = "karcher: a model opposite to the mean was left out of a step"
        takes_part = (angles >= tol) & ~opposite & (share > 0)
        pulls = torch.where(takes_part, share * angles / sines.clamp_min(1e-300), 0.0)
        tangent = pulls - float(pulls @ cosines) * mean
        step = _length(units, tangent)
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / _length(units, mean)
    return mean


def _whole_number(value: float, context: TensorContext) -> int:
    if value != int(value):
        raise InputError(
            f"'max_iter' is {value:g}, expected a whole number",
            where=f"tensor {context.name}",
            remedy="Correct 'max_iter'; a gradient over the layers can fall between whole numbers.",
        )
    return int(value)


def _karcher_copy(values: Values, count: int, base_given: bool) -> Source | None:
    return 0 if count == 1 else None


def _karcher_dead_knobs(values: Values, count: int) -> list[str]:
    return ["max_iter: a single model is its own mean; no parameter has an effect"] if count == 1 else []


@method(
    "karcher",
    parameters=(
        Parameter("max_iter", 10.0, "most steps towards the mean; a whole number", low=0, high=10_000),
        Parameter("tol", 1e-5, "shortest step, smallest angle and smallest length that count", low=0, low_open=True),
    ),
    base="unused",
    reference="Karcher 1977; Afsari 2011 (Riemannian Lp centre of mass); arXiv:2603.04972",
    elementwise=True,
    measure=_karcher_coefficients,
    copy_of=_karcher_copy,
    dead_knobs=_karcher_dead_knobs,
)
def karcher(
    base: None,
    models: Sequence[Tensor],
    *,
    max_iter: float,
    tol: float,
    measured: list[float],
    context: TensorContext,
) -> Tensor:
    """Give the Karcher mean of the directions the mean of the lengths.

    The mean direction m minimises the summed squared angles to the models: m ← exp_m(mean of log_m(v̂ᵢ)), from the
    normalised mean of the v̂ᵢ, until a step is shorter than `tol`. All models count alike, a base among them too; there
    are no weights. Two models: the middle of the arc between them. One model gives that model. Tensors no longer than
    `tol` have no direction, but count in the mean length; when all are so short, the result is their plain mean.

    Raises:
        InputError: `max_iter` is not a whole number.
    """
    return _added_up(base, models, measured)


def _added_up(base: Tensor | None, models: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    if base is None:
        return linear_combination(models, coefficients)
    return linear_combination([torch.sub(model, base) for model in models], coefficients).add_(base)
