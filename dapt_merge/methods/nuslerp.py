"""SLERP between two models by their weights: of the whole tensors, of their rows or columns, or of task vectors.

The idea: on the arc between two vectors the point at t is a sum of both, and the two factors follow from the angle.
Here the angle is that of the tensors as long vectors, or one for each row or column; with a base it is the angle
between the task vectors, which unlike the models themselves are seldom near-parallel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dapt_merge.methods.contract import Parameter, Source, TensorContext, Values
from dapt_merge.methods.inner_products import SMALLEST_SINE, gram_matrix, row_inner_products
from dapt_merge.methods.pieces import Operands
from dapt_merge.methods.registry import method
from dapt_merge.methods.spherical import SMALLEST_NORM
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST_SUM = 1e-6


@dataclass(frozen=True)
class ArcFactors:
    """What the two vectors are multiplied with.

    Attributes:
        second: factor of the second vector: one for the whole tensor (a float), or of the arithmetic's dtype [vectors].
        excess: what both factors add to above 1, likewise; the first factor is 1 + excess − second.
        run: elements after which the next vector begins (vectors that lie one after the other), or 0.
        vectors: how many there are; with `run` 0 they are interleaved: element i belongs to vector i mod `vectors`.
    """

    second: float | Tensor
    excess: float | Tensor
    run: int = 0
    vectors: int = 1

    def at(self, offset: int, count: int, device: torch.device) -> tuple[float | Tensor, float | Tensor]:
        """Return `second` and `excess` of `count` elements of the flattened tensor, from `offset` on."""
        if isinstance(self.second, float) or isinstance(self.excess, float):
            return self.second, self.excess
        elements = torch.arange(offset, offset + count, device=device)
        owner = elements.div_(self.run, rounding_mode="floor") if self.run else elements.remainder_(self.vectors)
        return self.second.to(device)[owner], self.excess.to(device)[owner]


def _share(weight: Sequence[float], context: TensorContext | None = None) -> float:
    """Return t = w₂/(w₁+w₂); one half, with a note, when the weights add to 0."""
    total = math.fsum(weight)
    if abs(total) >= _SMALLEST_SUM:
        return weight[1] / total
    if context is not None:
        context.notes["weight"] = "the weights add to 0: t is 0.5"
    return 0.5


def _factors(operands: Operands, values: Values, context: TensorContext) -> ArcFactors:
    t = _share(values["weight"], context)
    if values["nuslerp_flatten"]:
        gram = gram_matrix(operands)
        first, second, straight = _on_the_arc(gram[0, :1], gram[0, 1:], gram[1, 1:], t)
        if straight:
            context.notes["fallback"] = "linear: no direction or no arc between the two vectors"
        return ArcFactors(float(second), float(first + second - 1))
    base, models = operands.whole()
    vectors = [(model if base is None else torch.sub(model, base)) for model in models]
    shape = vectors[0].shape or torch.Size([1])
    if values["nuslerp_row_wise"]:
        one, two = (vector.reshape(shape[0], -1).t().contiguous() for vector in vectors)
    else:
        one, two = (vector.reshape(-1, shape[-1]) for vector in vectors)
    first, second, straight = _on_the_arc(
        row_inner_products(one, one), row_inner_products(one, two), row_inner_products(two, two), t
    )
    if straight:
        context.notes["fallback"] = f"linear: {straight} of {len(one)} pairs of vectors have no direction or no arc"
    run = 0 if values["nuslerp_row_wise"] else shape[-1]
    return ArcFactors(second.to(vectors[0].dtype), (first + second - 1).to(vectors[0].dtype), run, len(one))


def _on_the_arc(one: Tensor, mixed: Tensor, two: Tensor, t: float) -> tuple[Tensor, Tensor, int]:
    """Return sin((1−t)Ω)/sin Ω and sin(tΩ)/sin Ω for each pair of vectors, and for how many these are 1−t and t.

    Args:
        one, mixed, two: the inner products v₁·v₁, v₁·v₂, v₂·v₂, float64 [pairs].
        t: the share of the second vector.
    """
    norms = torch.minimum(one, two).sqrt()
    cosine = (mixed / (one.sqrt() * two.sqrt())).clamp(-1, 1)
    straight = (norms <= SMALLEST_NORM) | ~((1 - cosine.square()) > SMALLEST_SINE**2)
    angle = torch.where(straight, math.pi / 2, cosine.acos())
    first = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / angle.sin())
    second = torch.where(straight, t, (t * angle).sin() / angle.sin())
    return first, second, int(straight.sum())


def _copy_of(values: Values, count: int, base_given: bool) -> Source | None:
    ends: dict[float, Source] = {0.0: 0, 1.0: 1}
    return ends.get(_share(values["weight"]))


def _dead_knobs(values: Values, count: int) -> list[str]:
    if values["nuslerp_flatten"] and values["nuslerp_row_wise"]:
        return ["nuslerp_row_wise: no effect while nuslerp_flatten makes one vector of the tensor"]
    return []


@method(
    "nuslerp",
    parameters=(
        Parameter("weight", None, "weight of each of the two models; only their ratio matters", per_model=True),
        Parameter("nuslerp_flatten", True, "take each tensor as one long vector"),
        Parameter(
            "nuslerp_row_wise",
            False,
            "without flattening: vectors along the first dimension instead of the last",
        ),
    ),
    base="optional",
    min_models=2,
    max_models=2,
    reference="Shoemake 1985, Animating rotation with quaternion curves; option names as in mergekit",
    elementwise=True,
    measure=_factors,
    copy_of=_copy_of,
    dead_knobs=_dead_knobs,
)
def nuslerp(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    weight: tuple[float, float],
    nuslerp_flatten: bool,
    nuslerp_row_wise: bool,
    measured: ArcFactors,
    context: TensorContext,
) -> Tensor:
    """Move along the arc from model 1 to model 2: (sin((1−t)Ω)v₁ + sin(tΩ)v₂)/sin Ω with t = w₂/(w₁+w₂).

    vᵢ are the models, or with a base the task vectors, whose merge is then added to the base. Exactly two of them.
    Weights that add to 0 stand for t = 0.5. Vectors that are zero, parallel or opposite have no arc and are merged
    linearly, (1−t)v₁ + tv₂, with a note `fallback`; mergekit instead takes a zero vector to be orthogonal to the other.
    """
    second, excess = measured.at(context.offset, models[0].numel(), models[0].device)
    one, two = models if base is None else [torch.sub(model, base) for model in models]
    # (1 + excess − second)·v₁ + second·v₂ as small steps from v₁: close models stay close.
    merged = torch.sub(two, one).mul_(second).add_(one * excess).add_(one)
    return merged if base is None else merged.add_(base)
