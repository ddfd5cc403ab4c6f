"""Exactly the k largest magnitudes, without a sort and without a copy of the tensor.

The idea: the bit pattern of a non-negative float32 orders like its value, so two histograms (its upper 15 bits, then
the lower 16 within the bucket that holds the k-th largest) give the exact threshold. Equal magnitudes go to the lower
index. Cost: two passes over the values, a third when magnitudes tie at the threshold (as differences of bfloat16 do).
What this module does not know: what the values are; they come as a stream, from one tensor or from a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_LOW_BITS = 16
_BUCKETS_HIGH = 1 << 15  # the sign bit of a magnitude is 0
_BUCKETS_LOW = 1 << _LOW_BITS


@dataclass(frozen=True)
class Cutoff:
    """The border between kept and dropped: larger magnitudes stay, equal ones stay up to an index.

    Attributes:
        magnitude_bits: bit pattern of the threshold magnitude (float32).
        last_tied: index of the last element of exactly that magnitude that is kept.
    """

    magnitude_bits: int
    last_tied: int


def kept_count(density: float, numel: int) -> int:
    """Return k = ⌊density·n⌋, but at least 1 while there is something to keep.

    Example:
        >>> kept_count(0.2, 12), kept_count(0.01, 12), kept_count(0.0, 12)
        (2, 1, 0)
    """
    return max(1, int(density * numel)) if density > 0 and numel else 0


def find_cutoff(stream: Callable[[], Iterator[Tensor]], kept: int) -> Cutoff:
    """Return the cutoff that keeps exactly `kept` of the elements; the arguments are as for `find_cutoffs`."""
    return find_cutoffs(stream, [kept])[0]


def find_cutoffs(stream: Callable[[], Iterator[Tensor]], kept: Sequence[int]) -> list[Cutoff]:
    """Return, for each count, the cutoff that keeps exactly so many of the elements.

    Args:
        stream: gives the values from the start each time it is called, as 1-d float32 pieces that may be overwritten.
        kept: counts, each at least 1 and at most the number of elements.
    """
    cutoffs = []
    for border in _borders(stream, kept):
        last_tied = border.elements - 1
        if border.tied_kept < border.tied:
            last_tied = _index_of_tie(stream(), border.magnitude_bits, border.tied_kept)
        cutoffs.append(Cutoff(border.magnitude_bits, last_tied))
    return cutoffs


def magnitudes_of_rank(stream: Callable[[], Iterator[Tensor]], ranks: Sequence[int]) -> list[float]:
    """Return the magnitudes of the given ranks, 1 being the largest; the stream is as for `find_cutoffs`.

    Example:
        >>> magnitudes_of_rank(lambda: iter([torch.tensor([3.0, -5.0, 1.0])]), [1, 3])
        [5.0, 1.0]
    """
    bits = [border.magnitude_bits for border in _borders(stream, ranks)]
    return [float(value) for value in torch.tensor(bits, dtype=torch.int32).view(torch.float32)]


def kept_mask(values: Tensor, cutoff: Cutoff, offset: int = 0) -> Tensor:
    """Return which elements of a 1-d float32 run are kept; `offset` is the index of its first element."""
    bits = _bits(values.clone())
    border = min(max(cutoff.last_tied + 1 - offset, 0), bits.numel())
    kept = torch.empty(bits.shape, dtype=torch.bool, device=bits.device)
    torch.ge(bits[:border], cutoff.magnitude_bits, out=kept[:border])
    torch.gt(bits[border:], cutoff.magnitude_bits, out=kept[border:])
    return kept


class _Border(NamedTuple):
    """The magnitude at a rank, how many elements have exactly that magnitude, and how many of those reach the rank."""

    magnitude_bits: int
    tied: int
    tied_kept: int
    elements: int


def _borders(stream: Callable[[], Iterator[Tensor]], ranks: Sequence[int]) -> list[_Border]:
    high = torch.zeros(_BUCKETS_HIGH, dtype=torch.int64)
    for piece in stream():
        buckets = _bits(piece).bitwise_right_shift_(_LOW_BITS)
        high += torch.bincount(buckets, minlength=_BUCKETS_HIGH).cpu()
    found = [_bucket_of(high, rank) for rank in ranks]

    low = {bucket: torch.zeros(_BUCKETS_LOW, dtype=torch.int64) for bucket, _ in found}
    for piece in stream():
        bits = _bits(piece)
        buckets = bits >> _LOW_BITS
        for bucket, histogram in low.items():
            inside = bits[buckets == bucket]
            histogram += torch.bincount(inside & (_BUCKETS_LOW - 1), minlength=_BUCKETS_LOW).cpu()

    borders = []
    for rank, (bucket, above) in zip(ranks, found, strict=True):
        lower, above_inside = _bucket_of(low[bucket], rank - above)
        magnitude_bits = (bucket << _LOW_BITS) | lower
        borders.append(_Border(magnitude_bits, int(low[bucket][lower]), rank - above - above_inside, int(high.sum())))
    return borders


def _bits(values: Tensor) -> Tensor:
    """Magnitudes as int32 bit patterns, which order like the magnitudes (subnormals too); made in place."""
    return values.view(torch.int32).bitwise_and_(0x7FFFFFFF)


def _bucket_of(histogram: Tensor, rank: int) -> tuple[int, int]:
    """Return the bucket of the rank-th largest (from 1) and how many lie in the buckets above it."""
    from_top = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, rank))
    above = int(from_top[position - 1]) if position else 0
    return histogram.numel() - 1 - position, above


def _index_of_tie(pieces: Iterator[Tensor], magnitude_bits: int, tie: int) -> int:
    """Return the index of the tie-th element (from 1) of exactly that magnitude."""
    start = 0
    for piece in pieces:
        positions = torch.nonzero(_bits(piece) == magnitude_bits).view(-1)
        if tie <= positions.numel():
            return start + int(positions[tie - 1])
        tie -= positions.numel()
        start += piece.numel()
    raise AssertionError("the stream changed between two readings")
