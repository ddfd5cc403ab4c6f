"""What is kept of a task vector, scaled so that its L1 norm is that of the whole: mergekit's `rescale`.

The idea: one factor per tensor and model, Σ|δ| / Σ|kept δ|. What this module does not know: who keeps what, and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from dapt_merge.methods.contract import Parameter
from dapt_merge.methods.pieces import Operands, partial_sums

if TYPE_CHECKING:
    from torch import Tensor

# For methods that choose what they keep; those that draw it divide by the probability unless told otherwise.
RESCALE_SELECTED = Parameter(
    "rescale",
    "none",
    "scale of the kept elements: none (the paper's; also false) or l1 (restores the tensor's L1 norm; also true)",
    choices=("none", "l1", True, False),
)


def restores_l1(rescale: str | bool) -> bool:
    """Say whether a value of `rescale` asks for the L1 norm."""
    return rescale in ("l1", True)


def l1_ratio(operands: Operands, position: int, kept: Callable[[Tensor, int], Tensor]) -> float:
    """Return Σ|δ| / Σ|kept δ| of one model, or 1 when nothing that is not 0 was kept.

    Args:
        operands: the inputs.
        position: which model's task vector.
        kept: (piece of the task vector, index of its first element) → which of its elements are kept.
    """
    before: list[float] = []
    after: list[float] = []
    start = 0
    for delta in operands.deltas(position):
        mask = kept(delta, start)
        magnitudes = delta.abs_().double()
        before += partial_sums(magnitudes, operands.row_elements)
        after += partial_sums(magnitudes.mul_(mask), operands.row_elements)
        start += delta.numel()
    remaining = math.fsum(after)
    return math.fsum(before) / remaining if remaining else 1.0
