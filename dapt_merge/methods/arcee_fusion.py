"""Arcee Fusion: take from the other model only the changes whose importance is an outlier of the tensor.

The idea: importance is the size of a change times how much its whole row changed, as the divergence of the two rows'
softmaxes. What lies far above the bulk of importances comes over, the rest stays the base's. No knob: the threshold
follows from the quartiles, which are exact here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from dapt_merge.methods.contract import TensorContext, Values
from dapt_merge.methods.pieces import Operands, row_sums
from dapt_merge.methods.registry import method
from dapt_merge.methods.selection import magnitudes_of_rank
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_PROBABILITY = 1e-8  # added to every probability, as mergekit does
OUTLIER_RANGES = 1.5  # interquartile ranges above the median at which outliers begin


class _Threshold(NamedTuple):
    """The divergence of each row, the length of a row, and the importance at which outliers begin."""

    divergences: Tensor
    row_elements: int
    importance: float


def row_divergences(base: Tensor, model: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of each row's softmax from that of the base's row.

    Σ p·log(p/q) with p of the model and q of the base, each with 1e-8 added. In float64: for the small changes of
    continued pre-training the sum is far below its terms, and float32 would return mostly its rounding errors.

    Args:
        base: float32 or float64 [rows, elements].
        model: the same.

    Returns:
        As the base, [rows].
    """
    p = torch.softmax(model.double(), dim=1).add_(SMALLEST_PROBABILITY)
    q = torch.softmax(base.double(), dim=1).add_(SMALLEST_PROBABILITY)
    return row_sums(torch.log(p / q).mul_(p)).clamp_min_(0).to(base.dtype)


def _importance(base: Tensor, model: Tensor, start: int, divergences: Tensor, row_elements: int) -> Tensor:
    """Return |δ| times the divergence of the row, for a run of whole rows from index `start` on."""
    importance = torch.sub(model, base).abs_()
    rows = importance.numel() // row_elements
    first = start // row_elements
    importance.view(rows, row_elements).mul_(divergences[first : first + rows].view(rows, 1))
    return importance


def _threshold(operands: Operands, values: Values, context: TensorContext) -> _Threshold:
    row, count = operands.row_elements, operands.numel
    parts = []
    for _, base, (model,) in operands.pieces():
        assert base is not None
        parts.append(row_divergences(base.view(-1, row), model.view(-1, row)))
    divergences = torch.cat(parts)

    def importances() -> Iterator[Tensor]:
        for start, base, (model,) in operands.pieces():
            assert base is not None
            yield _importance(base, model, start, divergences, row)

    # The quantile q is the element at index ⌊q(n−1)⌋ of the ascending order, so of rank n − index from the top.
    ranks = [count - int(share * (count - 1)) for share in (0.25, 0.5, 0.75)]
    lower, median, upper = magnitudes_of_rank(importances, ranks)
    return _Threshold(divergences, row, median + OUTLIER_RANGES * (upper - lower))


@method(
    "arcee_fusion",
    max_models=1,
    reference="Arcee AI; known from its implementation in mergekit",
    elementwise=True,
    whole_rows=True,
    measure=_threshold,
)
def arcee_fusion(base: Tensor, models: Sequence[Tensor], *, measured: _Threshold, context: TensorContext) -> Tensor:
    """Take θ₁ where |δ|·KL(row of θ₁ ‖ row of θ₀) is at least median + 1.5·(Q3 − Q1) over the tensor, else θ₀.

    Every element is that of one input, bit for bit. A row is the last dimension and a vector is one row. Where all
    importances are equal, as with rows of a single element, all of θ₁ is taken. One model, no more. mergekit estimates
    the quartiles of tensors above 10⁶ elements from a random sample; here they are exact, and nothing depends on a
    seed.
    """
    (model,) = models
    importance = _importance(base, model, context.offset, measured.divergences, measured.row_elements)
    return torch.where(importance.double() >= measured.importance, model, base)
