"""RegMean: the matrix whose outputs are nearest to those of every model on that model's own inputs.

The idea: merging linear layers is a regression with a closed solution. The Gram matrices of their inputs say which
directions each model uses, and there each model keeps its say. They come from a pass over held-out text
(`dapt-merge statistics --kind gram`); how it was collected, this module does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dapt_merge.errors import InputError
from dapt_merge.methods.averaging import affine_combination
from dapt_merge.methods.contract import Parameter, Source, TensorContext, Values
from dapt_merge.methods.one_thread import one_thread
from dapt_merge.methods.pieces import is_finite
from dapt_merge.methods.registry import method
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_RIDGE = 1e-6
_HELD = "the text left directions unused; they were held at the mean"


def _copy_of(values: Values, count: int, base_given: bool) -> Source | None:
    return 0 if count == 1 else None


def _dead_knobs(values: Values, count: int) -> list[str]:
    return ["gram: a single model is its own average; neither its file nor alpha has an effect"] if count == 1 else []


@method(
    "regmean",
    parameters=(
        Parameter("gram", None, "file with the Gram matrices of the model's linear layers", per_model=True, file=True),
        Parameter("alpha", 0.9, "factor on the off-diagonal elements of the Gram matrices", low=0, high=1),
    ),
    base="unused",
    reference="arXiv:2212.09849",
    copy_of=_copy_of,
    dead_knobs=_dead_knobs,
)
@one_thread()
def regmean(
    base: None, models: Sequence[Tensor], *, gram: tuple[str, ...], alpha: float, context: TensorContext
) -> Tensor:
    """Solve min Σ‖XᵢWᵀ − XᵢWᵢᵀ‖² for linear layers y = Wx: W = (ΣWᵢGᵢ)(ΣGᵢ)⁻¹, Gᵢ = XᵢᵀXᵢ, off-diagonals times alpha.

    The paper writes (ΣGᵢ)⁻¹ΣGᵢWᵢ for the transposed matrices. It is solved in float64 as a correction of the plain
    mean, W̄ + Σ(Wᵢ − W̄)Gᵢ(ΣGᵢ)⁻¹, so that directions that no text used stay at the mean. With alpha 0 every input
    weighs on its own. What has no Gram matrix (embeddings, norms, biases, tied heads) gets the plain mean, and its
    notes say so. A base takes part as one of the models, with a file of its own. One model gives that model.

    Raises:
        InputError: a Gram matrix is not finite, not positive, or of another shape.
    """
    count = len(models)
    mean = affine_combination(models, [1 / count] * count)
    grams = [_gram(models[0], position, alpha, context) for position in range(count)]
    known = [matrix for matrix in grams if matrix is not None]
    if len(known) < count or models[0].dim() != 2:
        context.notes["fallback"] = "average: no Gram matrices for this tensor"
        return mean
    total = _summed(known)
    if not float(total.diagonal().sum()) > 0:
        context.notes["fallback"] = "average: the text never reached this layer"
        return mean
    pulls = torch.zeros(models[0].shape, dtype=torch.float64, device=models[0].device)
    for model, matrix in zip(models, known, strict=True):
        pulls.addmm_(torch.sub(model, mean).double(), matrix)
    return mean.add_(_solved(total, pulls, context).to(mean.dtype))


def _summed(matrices: Sequence[Tensor]) -> Tensor:
    total = matrices[0].clone()
    for matrix in matrices[1:]:
        total.add_(matrix)
    return total


def _solved(total: Tensor, pulls: Tensor, context: TensorContext) -> Tensor:
    """Return pulls·total⁻¹, solved in units in which every input has the same size: some are a thousand times others.

    Directions that no text used, in which total is singular, are held in place by a small ridge.
    """
    scale = total.diagonal().sqrt()
    unit = torch.where(scale > 0, 1 / scale, 1.0)
    correlations = total * unit[:, None] * unit
    correlations.diagonal().fill_(1)  # of an input that is always 0, too: nothing pulls at it
    if not bool((scale > 0).all()):
        context.notes["ridge"] = _HELD
    factor = _factor(correlations, context)
    return torch.cholesky_solve((pulls * unit).t(), factor).t() * unit


def _factor(correlations: Tensor, context: TensorContext) -> Tensor:
    """Return the Cholesky factor, of as little ridge as makes no input a sum of the others up to rounding."""
    ridge = 0.0
    while True:
        factor, failed = torch.linalg.cholesky_ex(correlations)
        # A pivot is the share of an input that those before it do not explain; rounding alone can make it positive.
        if not int(failed) and float(factor.diagonal().min()) ** 2 >= (ridge / 2 or _RIDGE):
            return factor
        context.notes["ridge"] = _HELD
        ridge = 10 * ridge or _RIDGE
        correlations.diagonal().fill_(1 + ridge)


def _gram(model: Tensor, position: int, alpha: float, context: TensorContext) -> Tensor | None:
    """Return a model's Gram matrix in float64 with scaled off-diagonals, or None when its file has none."""
    stored = context.statistics[position] if context.statistics else None
    if stored is None or model.dim() != 2:
        return None
    inputs = model.shape[1]
    matrix = stored.to(model.device, torch.float64)
    if matrix.shape != (inputs, inputs) or not is_finite(matrix) or bool((matrix.diagonal() < 0).any()):
        raise InputError(
            f"the Gram matrix of {context.label(position)} is not finite, not positive or not {inputs} by {inputs}",
            where=f"tensor {context.name}",
            remedy="Collect it again from this very model: dapt-merge statistics --kind gram.",
        )
    diagonal = matrix.diagonal().clone()
    matrix = matrix * alpha
    matrix.diagonal().copy_(diagonal)
    return matrix
