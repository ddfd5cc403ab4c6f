"""Lengths and angles of weight tensors taken as vectors, in float64, from pieces of float32 or float64.

The idea: what a merge on the sphere computes is a sum of its inputs, and the factors follow from their inner products
alone. So a handful of numbers is measured in one pass, and the tensors are added in a second. Sums do not depend on the
number of threads or on the piece size. What this module does not know: any merge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dapt_merge.methods.pieces import Operands, partial_sums, row_sums
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

# Nearer to parallel an arc is its chord; nearer to opposite, which way it goes is rounding. Far above the error of a
# float64 cosine, far below what float32 inputs resolve.
SMALLEST_SINE = 1e-6
_ROWS_AT_ONCE_ELEMENTS = 1 << 20


def gram_matrix(operands: Operands) -> Tensor:
    """Return the inner products of the models (of their task vectors when there is a base): float64 [n, n].

    Every model is one long vector.
    """
    count = len(operands.models)
    sums: dict[tuple[int, int], list[float]] = {(i, j): [] for i in range(count) for j in range(i, count)}
    for _, base, models in operands.pieces():
        vectors = [(model if base is None else torch.sub(model, base)).double() for model in models]
        for (i, j), partial in sums.items():
            partial += partial_sums(vectors[i] * vectors[j], operands.row_elements)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for (i, j), partial in sums.items():
        gram[i, j] = gram[j, i] = math.fsum(partial)
    return gram


def row_inner_products(first: Tensor, second: Tensor) -> Tensor:
    """Return the inner product of each row of two matrices of one shape: float64 [rows]."""
    rows, length = first.shape
    at_once = max(1, _ROWS_AT_ONCE_ELEMENTS // max(1, length))
    parts = [
        row_sums(first[start : start + at_once].double() * second[start : start + at_once].double())
        for start in range(0, rows, at_once)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def linear_combination(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return Σcᵢθᵢ as θₐ + ((Σc − 1)θₐ + Σcᵢ(θᵢ − θₐ)) from the θₐ of largest |cₐ|.

    Between models that are close to each other all but the last sum are small steps, as in
    `averaging.affine_combination`; there the coefficients add to 1, here to anything. The inputs are of one
    shape and dtype and are not modified.
    """
    anchor = max(range(len(tensors)), key=lambda position: abs(coefficients[position]))
    step = torch.mul(tensors[anchor], math.fsum([*coefficients, -1.0]))
    for position, coefficient in enumerate(coefficients):
        if position != anchor and coefficient != 0:
            step.add_(torch.sub(tensors[position], tensors[anchor]).mul_(coefficient))
    return step.add_(tensors[anchor])
