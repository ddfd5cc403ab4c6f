"""The magnitudes of task vectors, counted by compiled loops where base and model are stored.

The idea: selection asks a few counting questions (`selection.Magnitudes`); each is one pass that reads the stored
numbers, forms the differences in cache and keeps nothing. One tensor or all of a model's, in a fixed order. What this
module does not know: which questions are asked, and why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from dapt_merge.methods.pieces import Operands
from dapt_merge.methods.selection import Magnitudes, Stream
from dapt_merge.tensors.dtypes import Dtype
from dapt_merge.tensors.stored import StoredTensor, loop_place_of

if TYPE_CHECKING:
    from torch import Tensor

_CLUMP = 16  # elements that are sampled side by side: they cost one access to memory


def delta_magnitudes(tensors: Sequence[Operands], position: int) -> Stream | Magnitudes:
    """Return the task vector of the model at `position` over these tensors, for the functions of `selection`.

    NaN and infinity in an input may go unnoticed here: the merge that follows reads the same numbers and refuses them.
    """
    pairs = [(operands.base, operands.models[position]) for operands in tensors if operands.numel]

    def stream() -> Iterator[Tensor]:
        return chain.from_iterable(operands.deltas(position) for operands in tensors)

    fitting = [(base, model) for base, model in pairs if base is not None and base.loop_place and model.loop_place]
    if len(fitting) < len(pairs) or any(operands.arithmetic != Dtype.FLOAT32 for operands in tensors):
        return stream
    return _StoredDeltas(fitting)


class _StoredDeltas:
    def __init__(self, pairs: Sequence[tuple[StoredTensor, StoredTensor]]) -> None:
        from dapt_merge.methods import kernels

        self._kernels = kernels
        self.dtype = Dtype.FLOAT32
        self._tensors = pairs  # the addresses are only good while these live
        self._places = [(*loop_place_of(base), *loop_place_of(model), base.numel) for base, model in pairs]
        self.elements = sum(base.numel for base, _ in pairs)

    def sample(self, size: int) -> np.ndarray:
        step = max(_CLUMP, self.elements // size * _CLUMP)
        return np.concatenate([self._kernels.sample(*place, step, _CLUMP) for place in self._places])

    def count_from(self, borders: Sequence[int]) -> list[int]:
        counts = np.zeros(len(borders), np.int64)
        for place in self._places:
            self._kernels.count_from(*place, np.array(borders, np.uint32), counts)
        return [int(count) for count in counts]

    def between(self, low: int, high: int, count: int) -> np.ndarray:
        found = np.empty(count + 1, np.uint32)
        filled = 0
        for place in self._places:
            filled = self._kernels.collect(*place, np.uint32(low), np.uint32(high - 1), found, filled)
        return found[:count]

    def index_of(self, bits: int, tie: int) -> int:
        start = 0
        for place in self._places:
            index, tie = self._kernels.index_of(*place, np.uint32(bits), tie)
            if index >= 0:
                return start + int(index)
            start += place[-1]
        raise AssertionError("the tensors changed between two readings")
