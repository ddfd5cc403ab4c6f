"""How far apart rounding alone lets two correct implementations of a method be, for every element of a tensor.

The idea: a method is a short chain of operations, and each rounds once: by at most `unit` (2⁻²⁴ in float32, 2⁻⁸ in
bfloat16) of the largest magnitude M that enters the element, M = max|θ| + Σ|δ|. So the results of two engines differ by
at most (roundings of one + roundings of the other)·unit·M; `ROUNDINGS` counts them, operation by operation. Two things
are added to that count:

- Factors that come from sums over a vector of n elements (angles, norms): √n roundings in float32, whose errors have
  random signs; in bfloat16 torch adds in float32, so that only the one rounding of the sum counts.
- Methods that select: an element whose magnitude lies within rounding of a threshold, or whose votes cancel up to
  rounding, can fall on either side. Such elements are *undecided*: no implementation in that arithmetic can tell. They
  are counted and shown, and may differ by the whole change 2Σ|δ|, no more.

What this module does not know: how either engine is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from parity_cases import Arithmetic, Case
from torch import Tensor

# method → roundings on the way to one element, mergekit's and ours. Each line counts: task vector; weight or factor;
# product; sum; division; λ; the final sum with the base.
ROUNDINGS = {
    "linear": (6, 4),  # weights 1, their sum 1, products and sum 3, division 1 | factor, difference, product, sum
    "slerp": (6, 5),  # cosine 1, factors 2, products 2, sum 1 | the factors are float64 here
    "nuslerp": (15, 6),  # task vector, unit vectors 2, products 1, cosine 1, angle 1, sines 4, products 2, sum, ÷, base
    "multislerp": (25, 6),  # units 4, mean 3, its norm 2, tangents 4, their mean 2, exp map 5, lengths 3, ends 2
    "karcher": (21, 6),  # units 2, the last step (dots 2, angles 3, tangents 5, map 4, norm 2), length 3
    "task_arithmetic": (
        8,
        5,
    ),  # task vector, weight, product, sum, Σw, ÷, λ, base | factor, product, sums 3
    "ties": (9, 7),  # the same, and the sum of the agreeing weights
    "dare_linear": (8, 5),
    "dare_ties": (9, 7),
    "della_linear": (8, 5),
    "della": (9, 7),
    "breadcrumbs": (8, 5),
    "breadcrumbs_ties": (9, 7),
    "model_stock": (14, 5),  # cosine 6, of which t takes up to 2·6/2 as |mean − base| ≤ Σ|δ|/2; t 3; mean 2; blend 3
    "sce": (11, 8),  # task vector, squares, mean, sum, ÷, masked sum of weights, product, sum, ÷, base
    "nearswap": (7, 3),  # difference, t, ÷, product, 1 − w, product, sum | difference, t, sum
    "ram": (5, 5),  # task vector, ÷, sum 2, base
    "ramplus_tl": (9, 7),  # and the factor: ratio, r, 1 + …, product
    "arcee_fusion": (3, 0),  # difference, product, sum | a copy of one input
    "passthrough": (2, 2),
}
IN_FLOAT32 = ("linear", "slerp")  # what mergekit calculates in float32 whatever the dtype; then it rounds once
MEASURED = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce")  # factors from sums over vectors
DELTA_MARGIN = 4  # roundings of a task vector and of the threshold it is compared with, in both engines
VOTE_MARGIN = 8  # task vector, weight, product, sum, in both engines


class Bound(NamedTuple):
    """What rounding allows: `allowed` per element, in units of the weights; the undecided; unit·M, to scale by."""

    allowed: Tensor
    undecided: Tensor
    scale: Tensor


def bound(case: Case, arithmetic: Arithmetic, base: Tensor, models: Sequence[Tensor], ours: Tensor) -> Bound:
    """Return the bound for one tensor; everything is float64 and of one shape."""
    deltas = [model - base for model in models]
    change = torch.stack([delta.abs() for delta in deltas]).sum(dim=0)
    inputs = (base, *models) if case.base != "none" else tuple(models)
    magnitude = torch.stack([tensor.abs() for tensor in inputs]).amax(dim=0) + change
    scale = arithmetic.unit * magnitude
    allowed = roundings(case, arithmetic, base.shape) * scale
    if case.method == "karcher":  # both stop when a step is shorter than this
        allowed += 2 * case.parameters["tol"] * max(float(tensor.norm()) for tensor in inputs)
    if arithmetic.rounded:  # one step of the output's grid, for values on either side of its midpoints
        allowed += 2 * arithmetic.rounded * ours.abs()
    undecided = _undecided(case, arithmetic.unit, base, models, deltas)
    if case.method == "ramplus_tl":
        allowed += _counted_wrongly(case, deltas, undecided)
    if case.method == "sce":
        allowed += _weighed_wrongly(deltas, undecided)
    return Bound(torch.where(undecided, allowed + 2 * change, allowed), undecided, scale)


def roundings(case: Case, arithmetic: Arithmetic, shape: Sequence[int]) -> float:
    """Return how many roundings lie between the two engines' elements of a tensor of that shape."""
    theirs, own = ROUNDINGS[case.method]
    rescaled = "rescale" in case.parameters
    if rescaled:  # two sums, their ratio, the product with it; ours: ratio and product
        theirs, own = theirs + 4, own + 2
    narrow = arithmetic.unit > 2.0**-24
    if narrow:
        return (1 if case.method in IN_FLOAT32 else theirs) + 1  # ours: the one of the output
    return theirs + own + (math.sqrt(math.prod(shape)) if rescaled or case.method in MEASURED else 0)


def _undecided(case: Case, unit: float, base: Tensor, models: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
    margins: dict[str, Callable[[], Tensor]] = {
        "ties": lambda: _elected(case, deltas, unit),
        "dare_ties": lambda: _elected(case, deltas, unit),
        "della": lambda: _elected(case, deltas, unit),
        "breadcrumbs": lambda: _banded(case, deltas, unit)[1],
        "breadcrumbs_ties": lambda: _elected(case, deltas, unit),
        "sce": lambda: _selected(case, deltas, unit),
        "ram": lambda: _touched(case, deltas, unit),
        "ramplus_tl": lambda: _touched(case, deltas, unit),
        "arcee_fusion": lambda: _outlying(base, models[0], deltas[0], unit),
    }
    if case.method not in margins:
        return torch.zeros(base.shape, dtype=torch.bool)
    return margins[case.method]()


def _banded(case: Case, deltas: Sequence[Tensor], unit: float) -> tuple[list[Tensor], Tensor]:
    """Return the trimmed task vectors, and which elements lie within rounding of a threshold of theirs."""
    density, gamma = case.parameters["density"], case.parameters.get("gamma", 0.0)
    kept, undecided = [], torch.zeros(deltas[0].shape, dtype=torch.bool)
    for delta in deltas:
        sizes = delta.abs().flatten()
        order = sizes.argsort(descending=True, stable=True)
        outliers = int(gamma * sizes.numel())
        inner = outliers + max(1, int(density * sizes.numel()))
        mask = torch.zeros_like(sizes, dtype=torch.bool)
        mask[order[outliers:inner]] = True
        for rank in (outliers, inner):
            if 0 < rank < sizes.numel():
                border = (sizes[order[rank - 1]] + sizes[order[rank]]) / 2
                undecided |= (delta.abs() - border).abs() <= DELTA_MARGIN * unit * border
        kept.append(delta * mask.view(delta.shape))
    return kept, undecided


def _elected(case: Case, deltas: Sequence[Tensor], unit: float) -> Tensor:
    kept, undecided = _banded(case, deltas, unit)
    votes = torch.stack([weight * delta for weight, delta in zip(case.weights, kept, strict=True)])
    cancels = votes.sum(dim=0).abs() <= VOTE_MARGIN * unit * votes.abs().sum(dim=0)
    return undecided | (cancels & (votes != 0).any(dim=0))


def _selected(case: Case, deltas: Sequence[Tensor], unit: float) -> Tensor:
    """SCE compares standard deviations, which rounding moves by up to unit·max|δ|, and then elects."""
    stacked = torch.stack(list(deltas))
    votes = stacked.sum(dim=0)
    undecided = votes.abs() <= VOTE_MARGIN * unit * stacked.abs().sum(dim=0)
    share = case.parameters.get("select_topk", 1.0)
    if share == 1:
        return undecided
    spread = stacked.std(dim=0, correction=0)
    rank = max(1, int(share * int((spread > 0).sum())))
    descending = spread.flatten().sort(descending=True).values
    border = descending[rank - 1 : rank + 1].mean()
    return undecided | ((spread - border).abs() <= DELTA_MARGIN * unit * stacked.abs().amax())


def _weighed_wrongly(deltas: Sequence[Tensor], undecided: Tensor) -> Tensor:
    """SCE weighs by sums of squares, into which undecided elements enter or not."""
    squares = torch.stack([delta.square() for delta in deltas])
    decided = float((squares * ~undecided).sum())
    unsure = float((squares * undecided).sum())
    return 2 * unsure / max(decided, 1e-30) * torch.stack([delta.abs() for delta in deltas]).sum(dim=0)


def _touched(case: Case, deltas: Sequence[Tensor], unit: float) -> Tensor:
    epsilon = case.parameters["epsilon"]
    near = [(delta.abs() - epsilon).abs() <= DELTA_MARGIN * unit * epsilon for delta in deltas]
    return torch.stack(near).any(dim=0)


def _counted_wrongly(case: Case, deltas: Sequence[Tensor], undecided: Tensor) -> Tensor:
    """RAM+ scales by a ratio of counts, into which undecided elements enter on one side or the other."""
    touched = torch.stack([delta.abs() > case.parameters["epsilon"] for delta in deltas])
    alone = touched.sum(dim=0) == 1
    unsure, most = int(undecided.sum()), case.parameters.get("alpha", 0.2)
    moved = torch.zeros(deltas[0].shape, dtype=torch.float64)
    for delta, mask in zip(deltas, touched, strict=True):
        unique, shared = int((mask & alone).sum()), int((mask & ~alone).sum())
        low = max(0, shared - unsure) / (unique + unsure) if unique + unsure else 0.0
        high = (shared + unsure) / max(1, unique - unsure)
        moved += case.parameters["r"] * (min(high, most) - min(low, most)) * delta.abs()
    return moved


def _outlying(base: Tensor, model: Tensor, delta: Tensor, unit: float) -> Tensor:
    """Arcee Fusion: |δ|·KL against a threshold; the error of a KL of near softmaxes is that of its terms, unit each."""
    rows = base.reshape(-1, base.shape[-1] if base.dim() else 1)
    p, q = (torch.softmax(t.reshape(rows.shape), dim=1) + 1e-8 for t in (model, base))
    divergence = (p * (p / q).log()).sum(dim=1, keepdim=True)
    importance = (delta.abs().reshape(rows.shape) * divergence).reshape(base.shape)
    error = (3 * unit * delta.abs().reshape(rows.shape)).reshape(base.shape)  # softmax 1, quotient 1, logarithm 1
    ascending = importance.flatten().sort().values
    lower, median, upper = (ascending[int(share * (len(ascending) - 1))] for share in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (upper - lower)
    spread = float(error.flatten().quantile(0.75)) * 4  # what the error of the quartiles does to the threshold
    return (importance - threshold).abs() <= error + spread
