"""Fisher merging: each element averaged with the certainty that every model has about it.

The idea: the diagonal of the Fisher information says how much a model's predictions depend on an element. A model that
does not care about an element gives way to one that does. The information comes from a pass over held-out text
(`dapt-merge statistics --kind fisher`); how it was collected, this module does not know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dapt_merge.errors import InputError
from dapt_merge.methods.contract import Parameter, Source, TensorContext, Values
from dapt_merge.methods.pieces import is_finite
from dapt_merge.methods.registry import method
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def _copy_of(values: Values, count: int, base_given: bool) -> Source | None:
    active = [position for position, weight in enumerate(values["weight"]) if weight != 0]
    return active[0] if len(active) == 1 else None


def _dead_knobs(values: Values, count: int) -> list[str]:
    if sum(weight != 0 for weight in values["weight"]) == 1:
        return ["fisher: a single model is its own average; neither its file nor its weight has an effect"]
    return []


@method(
    "fisher",
    parameters=(
        Parameter("fisher", None, "file with the model's diagonal Fisher information", per_model=True, file=True),
        Parameter("weight", 1.0, "factor on the model's Fisher information", per_model=True, low=0),
    ),
    base="unused",
    reference="arXiv:2111.09832",
    elementwise=True,
    copy_of=_copy_of,
    dead_knobs=_dead_knobs,
)
def fisher(
    base: None,
    models: Sequence[Tensor],
    *,
    fisher: tuple[str, ...],
    weight: tuple[float, ...],
    context: TensorContext,
) -> Tensor:
    """Average with the Fisher information as weights, element by element: ΣwᵢFᵢθᵢ / ΣwᵢFᵢ.

    Elements that no model has any information about (ΣwᵢFᵢ = 0: the embeddings of tokens that the text lacked), and
    tensors that a file lacks, get the plain average Σwᵢθᵢ / Σwᵢ; the notes count them. A base takes part as one of the
    models, with a file of its own. One model, or one of weight above 0, gives that model.

    Raises:
        InputError: Fisher information is negative, not finite or of another shape; every weight is 0.
    """
    total_weight = math.fsum(weight)
    if total_weight == 0:
        raise InputError(
            "every weight is 0, so that the average is undefined",
            where=f"tensor {context.name}",
            remedy="Give at least one model a weight above 0.",
        )
    plain = [share / total_weight for share in weight]
    information = _information(models[0], weight, context)
    if not information:
        context.notes["fallback"] = "average: a file has no Fisher information on this tensor"
        shares: list[Tensor | float] = [*plain]
    else:
        total = torch.stack(information).sum(dim=0)
        unknown = total == 0
        _count_unknown(int(unknown.sum()), context)
        shares = [
            torch.where(unknown, share, part / total).to(models[0].dtype)
            for part, share in zip(information, plain, strict=True)
        ]
    return _averaged(models, shares)


def _averaged(models: Sequence[Tensor], shares: Sequence[Tensor | float]) -> Tensor:
    """Return Σsᵢθᵢ as steps from the θᵢ of largest share, element by element: one of share 1 is given back exactly."""
    anchor, largest = models[0], torch.zeros_like(models[0]).add_(shares[0])
    for model, share in zip(models[1:], shares[1:], strict=True):
        nearer = largest < share
        anchor, largest = torch.where(nearer, model, anchor), torch.where(nearer, share, largest)
    merged = anchor.clone()
    for model, share in zip(models, shares, strict=True):
        merged.add_(torch.sub(model, anchor).mul_(share))
    return merged


def _information(piece: Tensor, weight: Sequence[float], context: TensorContext) -> list[Tensor]:
    """Return wᵢFᵢ for a piece, in float64 (their products underflow early); nothing when a file lacks the tensor."""
    found: list[Tensor] = []
    for position, share in enumerate(weight):
        stored = context.statistics[position] if context.statistics else None
        if stored is None:
            return []
        run = stored.reshape(-1)[context.offset : context.offset + piece.numel()].to(piece.device, torch.float64)
        if run.numel() != piece.numel() or not is_finite(run) or bool((run < 0).any()):
            raise InputError(
                f"the Fisher information of {context.label(position)} is negative, not finite or of another shape",
                where=f"tensor {context.name}",
                remedy="Collect it again from this very model: dapt-merge statistics --kind fisher.",
            )
        found.append(run * share)
    return found


def _count_unknown(count: int, context: TensorContext) -> None:
    if count:
        before = context.notes.get("averaged_elements", 0)
        context.notes["averaged_elements"] = int(before) + count
