"""Exactly the k largest magnitudes, without a sort and without a copy of the tensor.

The idea: the bit pattern of a non-negative float32 or float64 orders like its value, so the k-th largest is the number
whose bits are found by counting: how many magnitudes are at least this, or that? A sample says where to look, and each
pass over the values narrows the interval that holds the threshold, until it is one number or holds so few elements that
they can be looked at together. The sample only guides; what is found is exact whatever it was. Equal magnitudes go to
the lower index. Usually that is one pass where many magnitudes are equal (as differences of bfloat16 are) and two
otherwise.

What this module does not know: what the values are; they come as a stream, from one tensor or from a whole model, or
lie where compiled loops can count them (`stored_deltas`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import numpy as np

from dapt_merge.tensors.dtypes import Dtype
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_ABOVE_ALL = {Dtype.FLOAT32: 1 << 31, Dtype.FLOAT64: 1 << 63}  # the sign bit of a magnitude is 0
_SAMPLED = 1 << 14  # at most, and at most one of so many:
_SAMPLED_OF = 100
_FEW = 1 << 16  # so many are always looked at together; of larger tensors, so large a share:
_FEW_OF = 32


@dataclass(frozen=True)
class Cutoff:
    """The border between kept and dropped: larger magnitudes stay, equal ones stay up to an index.

    Attributes:
        magnitude_bits: bit pattern of the threshold magnitude, in the dtype of the values.
        last_tied: index of the last element of exactly that magnitude that is kept.
    """

    magnitude_bits: int
    last_tied: int


class Magnitudes(Protocol):
    """Magnitudes in a fixed order, as the bit patterns of their dtype, which are ordered like the numbers."""

    @property
    def dtype(self) -> Dtype:
        """The dtype of the values: float32, with patterns in uint32, or float64, with patterns in uint64."""

    def sample(self, size: int) -> np.ndarray:
        """Return about so many of them, or all where there are not many more, spread evenly."""

    @property
    def elements(self) -> int:
        """How many there are."""

    def count_from(self, borders: Sequence[int]) -> list[int]:
        """Return how many are at least each of the borders."""

    def between(self, low: int, high: int, count: int) -> np.ndarray:
        """Return those in [low, high); `count` is how many there are."""

    def index_of(self, bits: int, tie: int) -> int:
        """Return the index of the tie-th (from 1) that is exactly `bits`."""


Stream: TypeAlias = "Callable[[], Iterator[Tensor]]"
"""Gives the values from the start each time it is called, in 1-d pieces of one dtype that may be overwritten."""


def kept_count(density: float, numel: int) -> int:
    """Return k = ⌊density·n⌋, but at least 1 while there is something to keep.

    Example:
        >>> kept_count(0.2, 12), kept_count(0.01, 12), kept_count(0.0, 12)
        (2, 1, 0)
    """
    return max(1, int(density * numel)) if density > 0 and numel else 0


def find_cutoff(values: Stream | Magnitudes, kept: int) -> Cutoff:
    """Return the cutoff that keeps exactly `kept` of the elements; the arguments are as for `find_cutoffs`."""
    return find_cutoffs(values, [kept])[0]


def find_cutoffs(values: Stream | Magnitudes, kept: Sequence[int]) -> list[Cutoff]:
    """Return, for each count, the cutoff that keeps exactly so many of the elements.

    Args:
        values: what to select from.
        kept: counts, each at least 1 and at most the number of elements.
    """
    magnitudes = _Streamed(values) if callable(values) else values
    cutoffs = []
    for border in _borders(magnitudes, kept):
        last_tied = magnitudes.elements - 1
        if border.tied_kept < border.tied:
            last_tied = magnitudes.index_of(border.magnitude_bits, border.tied_kept)
        cutoffs.append(Cutoff(border.magnitude_bits, last_tied))
    return cutoffs


def magnitudes_of_rank(values: Stream | Magnitudes, ranks: Sequence[int]) -> list[float]:
    """Return the magnitudes of the given ranks, 1 being the largest; the values are as for `find_cutoffs`.

    Example:
        >>> magnitudes_of_rank(lambda: iter([torch.tensor([3.0, -5.0, 1.0])]), [1, 3])
        [5.0, 1.0]
    """
    magnitudes = _Streamed(values) if callable(values) else values
    pattern, number = (np.uint64, np.float64) if magnitudes.dtype == Dtype.FLOAT64 else (np.uint32, np.float32)
    bits = [border.magnitude_bits for border in _borders(magnitudes, ranks)]
    return [float(value) for value in np.array(bits, pattern).view(number)]


def kept_mask(values: Tensor, cutoff: Cutoff, offset: int = 0) -> Tensor:
    """Return which elements of a 1-d run are kept; `offset` is the index of its first element."""
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


@dataclass
class _Interval:
    """Where the magnitude of a rank lies: in [low, high), with so many elements from low and from high upwards."""

    rank: int
    low: int
    from_low: int
    high: int
    from_high: int = 0

    @property
    def inside(self) -> int:
        return self.from_low - self.from_high

    @property
    def found(self) -> bool:
        return self.high == self.low + 1

    def narrow(self, border: int, from_border: int) -> None:
        if self.low < border < self.high:
            if from_border >= self.rank:
                self.low, self.from_low = border, from_border
            else:
                self.high, self.from_high = border, from_border

    def guesses(self, sample: np.ndarray) -> list[int]:
        """Return borders that should leave little between them; `sample` is sorted, the smallest first."""
        first, end = np.searchsorted(sample, np.array([self.low, self.high], sample.dtype))
        inside = sample[first:end]
        if not len(inside):
            return [(self.low + self.high) // 2]
        share = (self.rank - self.from_high) / self.inside
        # Four standard errors of a sampled rank: elements that are sampled side by side resemble each other somewhat.
        margin = 4 * (share * (1 - share) * len(inside)) ** 0.5 + 2
        below = len(inside) * (1 - share)
        low, middle, high = (
            int(inside[int(min(max(place, 0), len(inside) - 1))]) for place in (below - margin, below, below + margin)
        )
        return [low, middle, middle + 1, high + 1]


def _borders(magnitudes: Magnitudes, ranks: Sequence[int]) -> list[_Border]:
    sample: np.ndarray | None = None
    few = max(_FEW, magnitudes.elements // _FEW_OF)
    intervals = [_Interval(rank, 0, magnitudes.elements, _ABOVE_ALL[magnitudes.dtype]) for rank in ranks]
    while True:
        wide = [interval for interval in intervals if not interval.found and interval.inside > few]
        if not wide:
            return [_look_inside(magnitudes, interval) for interval in intervals]
        if sample is None:
            sample = np.sort(magnitudes.sample(min(_SAMPLED, magnitudes.elements // _SAMPLED_OF + 1)))
        borders = sorted({border for interval in wide for border in interval.guesses(sample)})
        counts = magnitudes.count_from(borders)
        for interval in wide:
            before = interval.inside
            for border, count in zip(borders, counts, strict=True):
                interval.narrow(border, count)
            if interval.inside == before:  # the sample is of no more help
                sample = sample[:0]


def _look_inside(magnitudes: Magnitudes, interval: _Interval) -> _Border:
    rank = interval.rank - interval.from_high
    if interval.found:
        return _Border(interval.low, interval.inside, rank)
    inside = magnitudes.between(interval.low, interval.high, interval.inside)
    bits = int(np.partition(inside, len(inside) - rank)[len(inside) - rank])
    return _Border(bits, int(np.count_nonzero(inside == bits)), rank - int(np.count_nonzero(inside > bits)))


class _Streamed:
    """The magnitudes of a stream of values."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.elements = 0
        self.dtype = Dtype.FLOAT32
        for piece in stream():
            self.elements += piece.numel()
            self.dtype = Dtype.of(piece.dtype)

    def sample(self, size: int) -> np.ndarray:
        step = max(1, self.elements // size)
        return np.concatenate([_unsigned(_bits(piece[::step].clone())) for piece in self._stream()])

    def count_from(self, borders: Sequence[int]) -> list[int]:
        counts = [0] * len(borders)
        for piece in self._stream():
            bits = _bits(piece)
            for place, border in enumerate(borders):
                counts[place] += int((bits >= border).count_nonzero()) if border < _ABOVE_ALL[self.dtype] else 0
        return counts

    def between(self, low: int, high: int, count: int) -> np.ndarray:
        found = []
        for piece in self._stream():
            bits = _bits(piece)
            found.append(_unsigned(bits[(bits >= low) & (bits <= high - 1)]))
        return np.concatenate(found)

    def index_of(self, bits: int, tie: int) -> int:
        start = 0
        for piece in self._stream():
            positions = torch.nonzero(_bits(piece) == bits).view(-1)
            if tie <= positions.numel():
                return start + int(positions[tie - 1])
            tie -= positions.numel()
            start += piece.numel()
        raise AssertionError("the stream changed between two readings")


def _bits(values: Tensor) -> Tensor:
    """Magnitudes as signed bit patterns, which order like the magnitudes (subnormals too); made in place."""
    pattern = torch.int64 if values.dtype == torch.float64 else torch.int32
    return values.view(pattern).bitwise_and_(torch.iinfo(pattern).max)


def _unsigned(bits: Tensor) -> np.ndarray:
    return bits.cpu().numpy().view(np.uint64 if bits.dtype == torch.int64 else np.uint32)
