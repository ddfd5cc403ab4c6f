"""Reinforced agent merging: average what several models changed, keep whole what only one did.

The idea: an average over all models dilutes a change that only one of them made. So an element counts its own
contributors, those whose change exceeds epsilon, and only shared elements are averaged. The plus variant also
strengthens the unique changes of a model that shares much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dapt_merge.methods.contract import Parameter, Source, TensorContext, Values
from dapt_merge.methods.pieces import Operands
from dapt_merge.methods.registry import method
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = Parameter("epsilon", 1e-5, "a change of at most this, in units of the weights, counts as none", low=0)


def _touched(base: Tensor, models: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return the task vectors, where each exceeds epsilon, and how many do at each element."""
    deltas = [torch.sub(model, base) for model in models]
    touched = [delta.abs() > epsilon for delta in deltas]
    contributors = torch.zeros_like(base)
    for mask in touched:
        contributors.add_(mask)
    return deltas, touched, contributors


def _merge_touched(base: Tensor, models: Sequence[Tensor], epsilon: float, unique_scales: Sequence[float]) -> Tensor:
    """Return θ₀ plus the mean of what several models changed, and the scaled change where only one did."""
    deltas, touched, contributors = _touched(base, models, epsilon)
    unique = contributors == 1
    merged = torch.zeros_like(base)
    for delta, mask, scale in zip(deltas, touched, unique_scales, strict=True):
        changed = delta.mul_(mask)
        merged.add_(changed if scale == 1 else torch.where(unique, changed * scale, changed))
    return merged.div_(contributors.clamp_min_(1)).add_(base)


def _copy_of(values: Values, count: int, base_given: bool) -> Source | None:
    return 0 if count == 1 and values["epsilon"] == 0 else None


@method("ram", parameters=(EPSILON,), reference="arXiv:2601.13572", elementwise=True, copy_of=_copy_of)
def ram(base: Tensor, models: Sequence[Tensor], *, epsilon: float, context: TensorContext) -> Tensor:
    """Average shared changes, keep unique ones: θ₀ + Σδᵢ[|δᵢ| > epsilon] / max(1, number of such i) per element.

    One task vector: the model itself, but for changes of at most epsilon; two or n: as above.
    """
    return _merge_touched(base, models, epsilon, [1.0] * len(models))


def _unique_scales(operands: Operands, values: Values, context: TensorContext) -> tuple[float, ...]:
    """Return 1 + r·min(alpha, shared/unique) of each model, from the counts of its shared and its unique changes."""
    count = len(operands.models)
    shared, unique = [0] * count, [0] * count
    for _, base, models in operands.pieces():
        assert base is not None
        _, touched, contributors = _touched(base, models, values["epsilon"])
        for position, mask in enumerate(touched):
            alone = int((mask & (contributors == 1)).sum())
            unique[position] += alone
            shared[position] += int(mask.sum()) - alone
    ratios = [many / one if one else 0.0 for many, one in zip(shared, unique, strict=True)]
    return tuple(1 + values["r"] * min(ratio, values["alpha"]) for ratio in ratios)


def _plus_dead_knobs(values: Values, count: int) -> list[str]:
    if count == 1:
        return ["r: one task vector shares nothing, so that r and alpha have no effect"]
    if values["r"] == 0:
        return ["alpha: r 0 scales nothing, so that this is ram"]
    return ["r: alpha 0 scales nothing, so that this is ram"] if values["alpha"] == 0 else []


@method(
    "ramplus_tl",
    parameters=(
        EPSILON,
        Parameter("r", 0.1, "how much the unique changes of a model that shares many are strengthened"),
        Parameter("alpha", 0.2, "largest ratio of shared to unique changes that counts", low=0),
    ),
    reference="arXiv:2601.13572",
    elementwise=True,
    dead_knobs=_plus_dead_knobs,
    measure=_unique_scales,
    copy_of=_copy_of,
)
def ramplus_tl(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    epsilon: float,
    r: float,
    alpha: float,
    measured: tuple[float, ...],
    context: TensorContext,
) -> Tensor:
    """Average shared changes as `ram` does, and scale the unique ones of model i by 1 + r·min(alpha, shared/unique).

    shared and unique are the numbers of changes above epsilon that model i has in this tensor with and without
    company. One task vector: it shares nothing, so this is `ram`; two or n: as above.
    """
    return _merge_touched(base, models, epsilon, measured)
