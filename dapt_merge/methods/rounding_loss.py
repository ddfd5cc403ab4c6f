"""What rounding to a narrow dtype swallows of an update.

The idea: an update smaller than half the gap between two bfloat16 numbers vanishes without a trace in the result, so it
is counted while the exact value is still there. What this module does not know: who merges what.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dapt_merge.tensors.dtypes import Dtype

if TYPE_CHECKING:
    from torch import Tensor

_PIECE_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class RoundingLoss:
    """How many elements the merge moves away from the base as computed, and how many of those rounding moves back."""

    updated: int = 0
    lost: int = 0

    def __add__(self, other: RoundingLoss) -> RoundingLoss:
        return RoundingLoss(self.updated + other.updated, self.lost + other.lost)

    @property
    def share(self) -> float:
        """Lost elements per updated element; 0 when nothing was updated."""
        return self.lost / self.updated if self.updated else 0.0


def is_lossy(exact: Dtype, out: Dtype) -> bool:
    """Say whether rounding from one floating dtype to another can swallow updates: it is narrower, float32 included.

    Example:
        >>> is_lossy(Dtype.FLOAT32, Dtype.BFLOAT16), is_lossy(Dtype.BFLOAT16, Dtype.FLOAT16)
        (True, True)
        >>> is_lossy(Dtype.FLOAT64, Dtype.FLOAT32), is_lossy(Dtype.FLOAT32, Dtype.FLOAT64)
        (True, False)
    """
    return out.is_floating_point and out.itemsize < max(exact.itemsize, Dtype.FLOAT32.itemsize)


def rounded_and_counted(values: Tensor, start: Tensor, out: Tensor) -> RoundingLoss:
    """Round to nearest into `out`, and count what that loses of the way from `start`.

    Args:
        values: 1-d, exact (float32 or float64).
        start: 1-d, as long; where the update started from, in any floating dtype.
        out: 1-d, as long; gets the rounded values.

    Example:
        >>> import torch
        >>> near, far = torch.tensor([1.001, 2.0]), torch.empty(2, dtype=torch.bfloat16)
        >>> rounded_and_counted(near, torch.ones(2), far)
        RoundingLoss(updated=2, lost=1)
    """
    updated = lost = 0
    for begin in range(0, values.numel(), _PIECE_ELEMENTS):
        run = slice(begin, begin + _PIECE_ELEMENTS)
        out[run] = values[run]
        moved = _count(values[run] != start[run])
        # Rounding is monotonic: whatever equals the start exactly equals it rounded too.
        updated += moved
        lost += moved - _count(out[run] != start[run].to(out.dtype))
    return RoundingLoss(updated, lost)


def _count(mask: Tensor) -> int:
    # numpy counts several times faster than torch does on one core.
    return int(np.count_nonzero(mask.numpy()) if mask.device.type == "cpu" else mask.count_nonzero())
