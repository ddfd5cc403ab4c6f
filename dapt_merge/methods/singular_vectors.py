"""Merging task vectors by their singular vectors: TSV-Merge, Iso-C and Iso-CTS.

The idea: the task vector of a matrix is a sum of directions, each with a strength. Directions of different tasks that
overlap interfere, and few strong ones drown the many weak ones; so the directions are made orthogonal (TSV), or the
strengths made equal (Iso). What is not a matrix has no singular vectors: it gets the plain mean of its δᵢ, times λ, as
in the papers' code, and its notes say so. Only two-dimensional tensors are matrices here.

Singular value decompositions are in the dtype of the arithmetic. A direction that the task vectors do not use (those of
a low-rank adapter use few) has a singular value of rounding size, and which direction it is, rounding decides too. Such
directions are left out, so that no noise enters a result at full strength, and its notes give their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dapt_merge.errors import DaptMergeError
from dapt_merge.methods.averaging import affine_combination
from dapt_merge.methods.contract import Parameter, Source, TensorContext, Values
from dapt_merge.methods.one_thread import one_thread
from dapt_merge.methods.registry import method
from dapt_merge.methods.task_arithmetic import LAMBDA
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

COMMON_FRACTION = Parameter(
    "common_fraction", 0.8, "share of the directions taken from the sum of all δ", low=0, high=1
)


def decomposed(matrix: Tensor, context: TensorContext) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [m, r], the singular values [r], largest first, and Vᵀ [r, n], with r = min(m, n).

    Raises:
        DaptMergeError: the decomposition does not converge.
    """
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise DaptMergeError(
            "the singular value decomposition of the task vectors failed",
            where=f"tensor {context.name}",
            remedy="Merge this model with a method that needs none, such as task_arithmetic or ties.",
        ) from error
    return left, values, right


def determined(values: Tensor, shape: torch.Size, context: TensorContext, noise: float = 0.0) -> int:
    """Return how many singular values, largest first, exceed what rounding leaves of a 0; the notes count the others.

    That is `noise`, what the matrix's own elements were rounded by, or some roundings of the largest value, whose
    number grows like the square root of the longer side.
    """
    threshold = max([noise, *(4 * math.sqrt(max(shape)) * _eps(values) * values[:1]).tolist()])
    count = int((values > threshold).sum())
    if count < len(values):
        before = context.notes.get("undetermined_directions", 0)
        context.notes["undetermined_directions"] = int(before) + len(values) - count
    return count


def rounding_noise(base: Tensor) -> float:
    """Return the largest singular value that rounding the elements of a model leaves in its task vector.

    Rounding errors are a random matrix of rms at most ½·eps·rms(θ), whose largest singular value is that times √m + √n.
    """
    rows, columns = base.shape
    size = float(torch.linalg.vector_norm(base)) / math.sqrt(max(1, base.numel()))
    return _eps(base) * size * (math.sqrt(rows) + math.sqrt(columns))


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


def nearest_orthogonal(vectors: Tensor, context: TensorContext) -> Tensor:
    """Return the matrix of orthonormal columns (or rows, of a wide one) that is nearest: ABᵀ from the SVD AΣBᵀ.

    Where several of the vectors are one and the same, they share its length instead.
    """
    left, values, right = decomposed(vectors, context)
    count = determined(values, vectors.shape, context)
    return left[:, :count] @ right[:count]


def _plain_mean(base: Tensor, models: Sequence[Tensor], lambda_: float) -> Tensor:
    """Return θ₀ + λ·mean of the δᵢ."""
    share = lambda_ / len(models)
    return affine_combination([base, *models], [1 - lambda_, *[share] * len(models)])


def _copy_at_0(values: Values, count: int, base_given: bool) -> Source | None:
    return "base" if values["lambda"] == 0 else None


def _tsv_copy(values: Values, count: int, base_given: bool) -> Source | None:
    if count == 1 and values["lambda"] == 1:
        return 0
    return _copy_at_0(values, count, base_given)


@method("tsv", parameters=(LAMBDA,), reference="arXiv:2412.00081", copy_of=_tsv_copy)
@one_thread()
def tsv(base: Tensor, models: Sequence[Tensor], *, lambda_: float, context: TensorContext) -> Tensor:
    """TSV-Merge: θ₀ + λ·U⊥ΣV⊥ᵀ, from the ⌊rank/T⌋ strongest directions of each of T task vectors.

    U, Σ and V hold those directions side by side; U⊥ and V⊥ are the nearest matrices of orthonormal columns, so that
    the tasks no longer share a direction. One task vector: all its directions are orthogonal already, and this is θ₀ +
    λδ. A tensor that is not a matrix, or a matrix with fewer rows or columns than there are task vectors, gets the
    plain mean of the δᵢ, times λ.
    """
    if len(models) == 1:
        return affine_combination([base, models[0]], [1 - lambda_, lambda_])
    if base.dim() != 2 or min(base.shape) < len(models):
        context.notes["fallback"] = "average: not a matrix with a direction for each task vector"
        return _plain_mean(base, models, lambda_)
    each = min(base.shape) // len(models)
    noise = rounding_noise(base)
    parts = [_strongest(torch.sub(model, base), each, context, noise) for model in models]
    left = torch.cat([part[0] for part in parts], dim=1)
    values = torch.cat([part[1] for part in parts])
    right = torch.cat([part[2] for part in parts])
    if not len(values):
        return base.clone()
    update = (nearest_orthogonal(left, context) * values) @ nearest_orthogonal(right, context)
    return update.mul_(lambda_).add_(base)


@method("iso_c", parameters=(LAMBDA,), reference="arXiv:2502.04959 (Iso-C)", copy_of=_copy_at_0)
@one_thread()
def iso_c(base: Tensor, models: Sequence[Tensor], *, lambda_: float, context: TensorContext) -> Tensor:
    """Iso-C: θ₀ + λ·σ̄·UVᵀ, where UΣVᵀ = Σδᵢ and σ̄ is the mean of its singular values.

    Every direction of the summed task vectors gets the same strength; with one task vector that is so too, and λ = 1
    does not give the model. A tensor that is not a matrix gets the plain mean of the δᵢ, times λ.
    """
    if base.dim() != 2:
        context.notes["fallback"] = "average: not a matrix"
        return _plain_mean(base, models, lambda_)
    summed = _summed_delta(base, models)
    left, values, right = decomposed(summed, context)
    count = determined(values, summed.shape, context, len(models) * rounding_noise(base))
    strength = lambda_ * float(values.double().mean())
    return (left[:, :count] @ right[:count]).mul_(strength).add_(base)


def _dead_common_fraction(values: Values, count: int) -> list[str]:
    if count == 1:
        return ["common_fraction: one task vector has no space apart from the common one; iso_cts is iso_c"]
    return []


@method(
    "iso_cts",
    parameters=(LAMBDA, COMMON_FRACTION),
    reference="arXiv:2502.04959 (Iso-CTS)",
    copy_of=_copy_at_0,
    dead_knobs=_dead_common_fraction,
)
@one_thread()
def iso_cts(
    base: Tensor, models: Sequence[Tensor], *, lambda_: float, common_fraction: float, context: TensorContext
) -> Tensor:
    """Iso-CTS: like Iso-C, but the weakest directions of Σδᵢ make room for directions that single tasks use.

    Of r = min(m, n) directions, the strongest of Σδᵢ (`common_fraction` of them, rounded so that the rest divides by
    the number T of task vectors) span the common space; the others are, in equal numbers, the strongest of each δᵢ
    after what lies in the common space is removed. Both sides are made orthonormal and every direction gets the mean
    strength. One task vector, or a `common_fraction` of 1, is Iso-C. A tensor that is not a matrix gets the plain mean
    of the δᵢ, times λ.
    """
    if base.dim() != 2:
        context.notes["fallback"] = "average: not a matrix"
        return _plain_mean(base, models, lambda_)
    each = _directions_of_a_task(min(base.shape), len(models), common_fraction)
    if each == 0 or len(models) == 1:
        return iso_c(base, models, lambda_=lambda_, context=context)
    common = min(base.shape) - each * len(models)
    noise = rounding_noise(base)
    parts = [_strongest(_summed_delta(base, models), common, context, len(models) * noise)]
    shared = parts[0][0]
    for model in models:
        delta = torch.sub(model, base)
        size = float(torch.linalg.vector_norm(delta))  # what is left over has its rounding errors
        apart = delta.sub_(shared @ (shared.t() @ delta))
        parts.append(_strongest(apart, each, context, max(noise, 4 * math.sqrt(max(base.shape)) * _eps(base) * size)))
    lefts, rights = torch.cat([part[0] for part in parts], dim=1), torch.cat([part[2] for part in parts])
    if not lefts.shape[1]:
        return base.clone()
    strength = float(torch.cat([part[1] for part in parts]).double().sum()) / min(base.shape)
    update = nearest_orthogonal(lefts, context) @ nearest_orthogonal(rights, context)
    return update.mul_(lambda_ * strength).add_(base)


def _strongest(matrix: Tensor, most: int, context: TensorContext, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, Σ and Vᵀ of a matrix's strongest directions, of those that are determined (see there for `noise`)."""
    left, values, right = decomposed(matrix, context)
    count = determined(values[:most], matrix.shape, context, noise)
    return left[:, :count], values[:count], right[:count]


def _directions_of_a_task(rank: int, tasks: int, common_fraction: float) -> int:
    left_over = rank - int(rank * common_fraction)
    return min(round(left_over / tasks), rank // tasks)


def _summed_delta(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    summed = torch.sub(models[0], base)
    for model in models[1:]:
        summed.add_(torch.sub(model, base))
    return summed
