"""Stochastic rounding: up or down by chance, in proportion to the distance, so that the mean is the exact value.

Rounding to nearest loses every update smaller than half the gap to the next bfloat16; rounded stochastically, the sum
of many such updates survives on average. The chance is a hash of seed, tensor name and element index, as for random
masks: the same on every machine, in every order. What this module does not know: what is rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dapt_merge.methods.masks import keep_mask
from dapt_merge.tensors.dtypes import at_least_float32
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

# The streams of models' masks count up from 0.
_STREAM = -1
_PIECE_ELEMENTS = 1 << 18


def round_stochastically(values: Tensor, dtype: torch.dtype, seed: int, name: str) -> Tensor:
    """Round a tensor to a narrower dtype, without bias.

    Args:
        values: floating point, any shape; computed on as float32 at least.
        dtype: bfloat16, float16 or float32.
        seed: the recipe's.
        name: the tensor's name.

    Returns:
        A new tensor of `dtype`; each element is one of the two neighbours of its value, or the value itself where the
        dtype has it. A value beyond the largest finite number becomes infinite.

    Example:
        >>> third = torch.full((30000,), 1 + 2**-7 / 3)
        >>> rounded = round_stochastically(third, torch.bfloat16, seed=0, name="w").double()
        >>> sorted({*rounded.tolist()}), round((rounded.mean().item() - 1) * 2**7, 1)
        ([1.0, 1.0078125], 0.3)
    """
    rounded = torch.empty(values.shape, dtype=dtype)
    flat, out = values.reshape(-1), rounded.view(-1)
    wide = at_least_float32(values.dtype).torch_dtype
    for begin in range(0, values.numel(), _PIECE_ELEMENTS):
        exact = flat[begin : begin + _PIECE_ELEMENTS].to(wide)
        near = exact.to(dtype)
        rest = exact - near.to(wide)
        other = torch.where(rest != 0, _next(near, rest > 0), near)
        gap = other.to(wide) - near.to(wide)
        # A gap of 0 or infinity belongs to exact values and to the largest finite ones: they stay.
        share = torch.where((gap != 0) & gap.isfinite(), rest / gap, torch.zeros_like(gap))
        moves = keep_mask(seed, name, _STREAM, begin, exact.numel(), share)
        out[begin : begin + exact.numel()] = torch.where(moves, other, near)
    return rounded


def _next(values: Tensor, upwards: Tensor) -> Tensor:
    """Return the next representable number above or below each value, by counting up or down in its bits."""
    pattern = torch.int32 if values.dtype == torch.float32 else torch.int16
    bits = values.view(pattern)
    away_from_zero = (values > 0) == upwards
    # The subnormals of either sign next to zero:
    smallest = torch.where(upwards, 1, torch.iinfo(pattern).min + 1).to(pattern)
    stepped = torch.where(away_from_zero, bits + 1, bits - 1)
    return torch.where(values == 0, smallest, stepped).view(values.dtype)
