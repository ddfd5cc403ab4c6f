"""Random masks that are a pure function of seed, tensor name, stream and element index.

The idea: no generator with a state. Element i is kept when a hash of i, keyed by (seed, name, stream), falls below
probability·2³². So a mask is the same for any shard layout, piece size, thread count, device or order of work, and any
part of it can be computed alone. The streams of one tensor (one per model) are independent of each other.

Arithmetic is on int64 lanes that hold 32-bit values: no product leaves 63 bits, so nothing relies on overflow. What
this module does not know: what is masked.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, overload

import numpy as np

from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_LOW_32 = 0xFFFFFFFF
# Wellons' "lowbias32" integer hash (public domain). The second multiplier is taken modulo 2³² as a negative number,
# which keeps every product within int64.
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))
_LANES = 1 << 16


def keep_mask(
    seed: int,
    name: str,
    stream: int,
    start: int,
    count: int,
    probability: float | Tensor,
    device: torch.device | None = None,
) -> Tensor:
    """Return which of the elements start … start+count−1 are kept, each with the given probability.

    Args:
        seed: the recipe's seed, any integer.
        name: the tensor's name.
        stream: which of the tensor's independent masks: the position of the model.
        start: index of the first element in the flattened tensor.
        count: number of elements.
        probability: in [0, 1], rounded to a multiple of 2⁻³² (never to 0 when positive): one for all, or a tensor
            [count] on that device.
        device: where the mask is computed and returned.

    Returns:
        bool, shape [count].

    Example:
        >>> whole = keep_mask(0, "w", 0, start=0, count=100, probability=0.5)
        >>> torch.equal(whole[40:], keep_mask(0, "w", 0, start=40, count=60, probability=0.5))
        True
    """
    limit = keep_limits(probability) if isinstance(probability, int | float) else _limits_in_torch(probability)
    kept = torch.empty(count, dtype=torch.bool, device=device)
    done = 0
    while done < count:
        high, low = divmod(start + done, 1 << 32)
        lanes = min(_LANES, count - done, (1 << 32) - low)
        hashed = _hashed(low, lanes, _key(seed, name, stream, high), device)
        below = limit if isinstance(limit, int) else limit[done : done + lanes]
        torch.lt(hashed, below, out=kept[done : done + lanes])
        done += lanes
    return kept


@overload
def keep_limits(probability: float) -> int: ...
@overload
def keep_limits(probability: np.ndarray) -> np.ndarray: ...
def keep_limits(probability: float | np.ndarray) -> int | np.ndarray:
    """Return the hash value below which an element is kept: in [1, 2³²], or 0 where the probability is 0."""
    limits = np.where(np.greater(probability, 0), np.rint(np.multiply(probability, 1 << 32)).clip(1), 0)
    return limits.astype(np.int64) if isinstance(probability, np.ndarray) else int(limits)


def _limits_in_torch(probability: Tensor) -> Tensor:
    """Return what `keep_limits` does, on the device of the probabilities."""
    limits = (probability.double() * (1 << 32)).round_().to(torch.int64)
    return torch.where(probability > 0, limits.clamp_min_(1), 0)


def mask_keys(seed: int, name: str, stream: int, count: int) -> np.ndarray:
    """Return the two 32-bit key words of each of the first `count` multiples of 2³² elements, uint32 [count, 2]."""
    return np.array([_key(seed, name, stream, high) for high in range(count)], np.uint32)


def _key(seed: int, name: str, stream: int, high: int) -> tuple[int, int]:
    """Two 32-bit words; `high` is the part of the element index above 32 bits."""
    text = f"{seed}\x1f{stream}\x1f{high}\x1f{name}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _hashed(low: int, lanes: int, key: tuple[int, int], device: torch.device | None) -> Tensor:
    """Hash consecutive 32-bit counters: two keyed rounds, since one key alone would only shift the counter."""
    state = torch.arange(low, low + lanes, dtype=torch.int64, device=device)
    scratch = torch.empty_like(state)
    for word in key:
        state.add_(word).bitwise_and_(_LOW_32)
        for shift, multiplier in zip((16, 15), _MULTIPLIERS, strict=True):
            state.bitwise_xor_(torch.bitwise_right_shift(state, shift, out=scratch))
            state.mul_(multiplier).bitwise_and_(_LOW_32)
        state.bitwise_xor_(torch.bitwise_right_shift(state, 16, out=scratch))
    return state
