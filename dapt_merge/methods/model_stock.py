"""Model Stock: how far from the base towards the mean of the models, read off the angle between them.

The idea: models trained from one base lie around a centre, and the angle between their task vectors says how much of
each is common. The more they agree, the further from the base the point nearest that centre lies. Inner products
decide everything, so they are measured once, per tensor or per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

from dapt_merge.methods.averaging import affine_combination
from dapt_merge.methods.contract import Parameter, TensorContext, Values
from dapt_merge.methods.inner_products import gram_matrix
from dapt_merge.methods.pieces import Operands, row_sums
from dapt_merge.methods.registry import method
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


class _Ratios(NamedTuple):
    """How far the tensor goes, or each of its rows (a tensor [rows]); a row has `row_elements`."""

    ratio: float | Tensor
    row_elements: int


def interpolation_ratio(cosines: Tensor, models: int) -> Tensor:
    """Return t = N·c/(1 + (N−1)·c) of mean pairwise cosines c for N models, and 0 where c is not above 0.

    A negative cosine would lead away from all models (and to a pole at −1/(N−1)); t stays in [0, 1].

    Example:
        >>> interpolation_ratio(torch.tensor([0.5, 1.0, -0.2]), 2)
        tensor([0.6667, 1.0000, 0.0000])
    """
    common = cosines.clamp(0, 1)
    return common * models / (1 + (models - 1) * common)


def _cosines(products: Tensor) -> Tensor:
    """Return the mean pairwise cosine from inner products [N, N, …]; a task vector of norm 0 agrees with none."""
    norms = products.diagonal().movedim(-1, 0).sqrt()
    pairs = []
    for one, other in combinations(range(len(products)), 2):
        lengths = norms[one] * norms[other]
        cosine = products[one, other] / torch.where(lengths > 0, lengths, 1)
        pairs.append(cosine.clamp(-1, 1))
    return torch.stack(pairs).mean(dim=0)


def _ratios(operands: Operands, values: Values, context: TensorContext) -> _Ratios:
    count = len(operands.models)
    if values["filter_wise"]:
        ratios = interpolation_ratio(_cosines(_row_products(operands)), count)
        context.notes["t"] = float(ratios.mean())
        if not bool(ratios.any()):
            _note_base(context)
        return _Ratios(ratios.to(operands.arithmetic.torch_dtype), operands.row_elements)
    cosine = _cosines(gram_matrix(operands))
    ratio = float(interpolation_ratio(cosine, count))
    context.notes["t"] = ratio
    if ratio == 0:
        _note_base(context)
    return _Ratios(ratio, operands.row_elements)


def _note_base(context: TensorContext) -> None:
    context.notes["fallback"] = "the base: the task vectors have no direction in common"


def _row_products(operands: Operands) -> Tensor:
    """Return the inner products of the task vectors, row by row: float64 [N, N, rows]."""
    parts = []
    for _, base, models in operands.pieces():
        assert base is not None
        deltas = [torch.sub(model, base).double().view(-1, operands.row_elements) for model in models]
        parts.append(torch.stack([torch.stack([row_sums(one * other) for other in deltas]) for one in deltas]))
    return torch.cat(parts, dim=2)


@method(
    "model_stock",
    parameters=(Parameter("filter_wise", False, "one ratio per row (the last dimension) instead of one per tensor"),),
    min_models=2,
    reference="arXiv:2403.19522",
    elementwise=True,
    whole_rows=True,
    measure=_ratios,
)
def model_stock(
    base: Tensor, models: Sequence[Tensor], *, filter_wise: bool, measured: _Ratios, context: TensorContext
) -> Tensor:
    """Go from the base towards the mean of the models: (1−t)·θ₀ + t·Σθᵢ/N, with t = N·c/(1 + (N−1)·c).

    c is the mean of the cosines of all pairs of task vectors, of the whole tensor or (`filter_wise`) of each row; a
    vector is one row. t is 0, with a note, where c is not above 0 (mergekit goes on beyond the base). Two models: the
    one angle between them; n: the mean over all pairs; one has no angle and is refused.
    """
    count = len(models)
    if isinstance(measured.ratio, float):
        step = measured.ratio / count
        return affine_combination([base, *models], [1 - measured.ratio, *[step] * count])
    first_row, rows = context.offset // measured.row_elements, base.numel() // measured.row_elements
    ratios = measured.ratio[first_row : first_row + rows].to(base.device)
    moved = torch.zeros_like(base)
    for model in models:
        moved.add_(torch.sub(model, base))
    moved.view(rows, -1).mul_((ratios / count).view(rows, 1))
    return moved.add_(base)
