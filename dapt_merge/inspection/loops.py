"""Compiled loops over task vectors: sums, counts, and what rounding to bfloat16 leaves, in one pass for all weights.

The idea: a run of elements stays in the first-level cache while it is rounded at every weight; the alternative, a
dozen passes through memory for each weight, takes ten times as long. Every operation is the float32 operation that its
line shows, none is fused with another. What this module does not know: tensors, names, what the numbers mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dapt_merge.compiling import compiled

_RUN_ELEMENTS = 2048  # 8 KiB a buffer
_OPTIONS = {"error_model": "numpy", "boundscheck": False}


@compiled(**_OPTIONS, fastmath={"reassoc"})  # the sums may be added in any order, and so several at a time
def _dot(one: Any, other: Any) -> Any:
    total = np.float64(0.0)
    for i in range(one.size):
        total += np.float64(one[i]) * np.float64(other[i])
    return total


@compiled(**_OPTIONS)
def _round(values: Any, rounded: Any) -> None:
    """Write bfloat16's nearest (ties to even) to each of some finite float32, as float32."""
    bits, rounded_bits = values.view(np.uint32), rounded.view(np.uint32)
    for i in range(values.size):
        last_kept = (bits[i] >> np.uint32(16)) & np.uint32(1)
        rounded_bits[i] = (bits[i] + np.uint32(0x7FFF) + last_kept) & np.uint32(0xFFFF0000)


@compiled(**_OPTIONS)
def measure(base: Any, model: Any, weights: Any, sums: Any, counts: Any, squares: Any) -> int:
    """Add up one piece of a task vector δ = model − base, and what bfloat16 leaves of w·δ at each weight w.

    Args:
        base, model: float32, 1-d, finite, of one length.
        weights: float32.
        sums: float64; Σθ₀², Σθ₁², Σθ₀θ₁, Σδ² are added to its four elements.
        counts: int64, (weights × 2); added to are the elements that θ₀ + w·δ moves in float32, and those of them that
            have θ₀'s value again once both are rounded.
        squares: float64, (weights × 2); added to are Σ(applied − w·δ)² and Σ(w·δ)².

    Returns:
        How many elements differ.
    """
    delta = np.empty(_RUN_ELEMENTS, np.float32)
    update, exact, start, error = np.empty_like(delta), np.empty_like(delta), np.empty_like(delta), np.empty_like(delta)
    changed = 0
    for first in range(0, base.size, _RUN_ELEMENTS):
        size = min(_RUN_ELEMENTS, base.size - first)
        old, new = base[first : first + size], model[first : first + size]
        for i in range(size):
            delta[i] = new[i] - old[i]
            changed += delta[i] != 0
        sums[0] += _dot(old, old)
        sums[1] += _dot(new, new)
        sums[2] += _dot(old, new)
        sums[3] += _dot(delta[:size], delta[:size])
        _round(old, start)
        for position in range(weights.size):
            weight = weights[position]
            updated = lost = 0
            for i in range(size):
                update[i] = delta[i] * weight
                exact[i] = old[i] + update[i]
            _round(exact[:size], error)
            for i in range(size):
                moved = exact[i] != old[i]
                error[i] -= start[i]
                updated += moved
                lost += moved & (error[i] == 0)
                error[i] -= update[i]
            counts[position, 0] += updated
            counts[position, 1] += lost
            squares[position, 0] += _dot(error[:size], error[:size])
            squares[position, 1] += _dot(update[:size], update[:size])
    return changed


@compiled(**_OPTIONS)
def count_moves(base: Any, model: Any, up: Any, down: Any) -> None:
    """Add one to `up` or `down` (int16, as long) for each element that the model has moved that way."""
    for i in range(base.size):
        up[i] += model[i] > base[i]
        down[i] += model[i] < base[i]


@compiled(**_OPTIONS)
def count_agreement(up: Any, down: Any) -> tuple[int, int]:
    """Return how many elements at least two models moved, and how many of those they all moved one way."""
    shared = agreeing = 0
    for i in range(up.size):
        both = up[i] + down[i] >= 2
        shared += both
        agreeing += both & ((up[i] == 0) | (down[i] == 0))
    return shared, agreeing
