"""NearSwap: take the other model's value where it is near, and a bounded step towards it where it is not.

The idea: no element moves further than t. That is all: small changes come over whole, large ones as ±t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dapt_merge.methods.contract import Parameter, Source, TensorContext, Values
from dapt_merge.methods.registry import method
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def _copy_of(values: Values, count: int, base_given: bool) -> Source | None:
    return "base" if values["t"] == 0 else None


def _dead_knobs(values: Values, count: int) -> list[str]:
    return ["t: 0 gives the base, whatever the model is"] if values["t"] == 0 else []


@method(
    "nearswap",
    parameters=(Parameter("t", None, "the furthest that an element moves, in units of the weights", low=0),),
    max_models=1,
    reference="huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    elementwise=True,
    dead_knobs=_dead_knobs,
    copy_of=_copy_of,
)
def nearswap(base: Tensor, models: Sequence[Tensor], *, t: float, context: TensorContext) -> Tensor:
    """Move towards the model by at most t: (1−w)θ₀ + wθ₁ with w = min(1, t/|δ|), which is θ₀ + clamp(δ, −t, t).

    Elements with |δ| of at most t are the model's, bit for bit. One model, no more. mergekit computes w with |δ| of at
    least 1e-6, which differs only for a t below that.
    """
    (model,) = models
    delta = torch.sub(model, base)
    # Compared in float64: rounding t to float32 could keep an element that lies just beyond it.
    return torch.where(delta.abs().double() <= t, model, delta.clamp(-t, t).add_(base))
