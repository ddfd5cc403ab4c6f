"""A tensor as bytes in memory: what compiled loops read and write where it lies, and torch a view of it when asked for.

The idea: a mapped file, or a buffer on its way to one, needs no tensor library: dtype, shape and address say all. A
tensor that torch holds, on whatever device, goes by the same description. What this module does not know: files.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from dapt_merge.tensors.dtypes import Dtype
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_NOT_ASKED: int | None = -1
_COMPARED_BYTES = 1 << 20
_PIECE_ELEMENTS = 1 << 17
# The bits of a number, and those among them that are all set in what is not finite.
_EXPONENTS = {
    Dtype.FLOAT64: (np.uint64, np.uint64(0x7FF << 52)),
    Dtype.FLOAT32: (np.uint32, np.uint32(0xFF << 23)),
    Dtype.FLOAT16: (np.uint16, np.uint16(0x1F << 10)),
    Dtype.BFLOAT16: (np.uint16, np.uint16(0xFF << 7)),
}
LOOP_CODES = {Dtype.BFLOAT16: 0, Dtype.FLOAT16: 1, Dtype.FLOAT32: 2}  # as in `methods.kernels`


class StoredTensor:
    """Numbers where they lie: `dtype`, `shape`, `numel` (how many there are), and ways to get at them.

    Args:
        dtype: of the numbers.
        shape: in row-major order.
        memory: their bytes, all of them; writable, where they are to be.

    Example:
        >>> stored = StoredTensor(Dtype.FLOAT16, (3,), memoryview(bytearray(6)))
        >>> stored.tensor, stored.numel, stored.nbytes
        (tensor([0., 0., 0.], dtype=torch.float16), 3, 6)
        >>> StoredTensor.of(torch.ones(2, 3)).shape
        (2, 3)
    """

    __slots__ = ("_address", "_memory", "_tensor", "dtype", "numel", "shape")

    def __init__(self, dtype: Dtype, shape: tuple[int, ...], memory: memoryview) -> None:
        self.dtype, self.shape, self.numel = dtype, shape, math.prod(shape)
        self._memory: memoryview | None = memory
        self._tensor: Tensor | None = None
        self._address = _NOT_ASKED

    @classmethod
    def of(cls, tensor: Tensor | StoredTensor) -> StoredTensor:
        """Describe a tensor that torch holds, on any device.

        Raises:
            ValueError: its dtype is none of `Dtype`.
        """
        if isinstance(tensor, StoredTensor):
            return tensor
        described = cls.__new__(cls)
        described.dtype, described.shape, described.numel = Dtype.of(tensor.dtype), tuple(tensor.shape), tensor.numel()
        described._memory, described._tensor = None, tensor.detach() if tensor.requires_grad else tensor
        described._address = _NOT_ASKED
        return described

    @property
    def tensor(self) -> Tensor:
        """The numbers as a torch tensor: the one that it describes (detached), or a view of the memory."""
        if self._tensor is None:
            assert self._memory is not None
            self._tensor = _view(self._memory, self.dtype).view(self.shape)
        return self._tensor

    @property
    def memory(self) -> memoryview:
        """The bytes in row-major order; a copy of them where they lie elsewhere, or in another order."""
        if self._memory is None:
            assert self._tensor is not None
            return self._tensor.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data
        return self._memory

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return self.numel * self.dtype.itemsize

    @property
    def device(self) -> torch.device:
        """Where they lie, as torch says it."""
        return self.tensor.device

    @property
    def is_on_cpu(self) -> bool:
        """Whether they lie in ordinary memory; that is known without torch."""
        return self._memory is not None or self.device.type == "cpu"

    @property
    def address(self) -> int | None:
        """Where the first number lies, if all lie in ordinary memory one after the other; 0 where there are none."""
        if self._address == _NOT_ASKED:
            if self._memory is not None:
                self._address = _address(self._memory)
            else:
                tensor = self.tensor
                lies_so = tensor.device.type == "cpu" and tensor.is_contiguous()
                self._address = tensor.data_ptr() if lies_so else None
        return self._address

    @property
    def is_finite(self) -> bool:
        """Whether no number in ordinary memory is NaN or infinite; integers never are."""
        if not self.dtype.is_floating_point:
            return True
        pattern, exponent = _EXPONENTS[self.dtype]
        bits = np.frombuffer(self.memory, pattern)
        pieces = (bits[start : start + _PIECE_ELEMENTS] for start in range(0, len(bits), _PIECE_ELEMENTS))
        return not any(((piece & exponent) == exponent).any() for piece in pieces)

    def is_same_as(self, other: StoredTensor) -> bool:
        """Say whether two tensors have one dtype, one shape and the same bytes."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        if self.address is not None and self.address == other.address:
            return True
        one, two = self.memory, other.memory
        starts = range(0, len(one), _COMPARED_BYTES)
        return all(_same_bytes(one[start:][:_COMPARED_BYTES], two[start:][:_COMPARED_BYTES]) for start in starts)

    @property
    def loop_place(self) -> tuple[int, int] | None:
        """The address and the code of the dtype for compiled loops; None where they cannot read or write the numbers.

        Example:
            >>> places = [StoredTensor.of(t).loop_place for t in (torch.ones(2, 3).T, torch.ones(2).double())]
            >>> places, StoredTensor.of(torch.ones(2, 3)).loop_place is None
            ([None, None], False)
        """
        code = LOOP_CODES.get(self.dtype)
        address = None if code is None else self.address
        return None if code is None or address is None or address % self.dtype.itemsize else (address, code)


def loop_place_of(stored: StoredTensor) -> tuple[int, int]:
    """Return the place for compiled loops of a tensor that has one."""
    place = stored.loop_place
    assert place is not None
    return place


def _same_bytes(one: memoryview, other: memoryview) -> bool:
    return np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8))


def _address(memory: memoryview) -> int:
    if not memory.nbytes:
        return 0
    address: int = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    return address


def _view(memory: memoryview, dtype: Dtype) -> Tensor:
    if not memory.nbytes:
        return torch.empty(0, dtype=dtype.torch_dtype)
    if _address(memory) % dtype.itemsize:
        memory = memoryview(bytearray(memory))  # a file that somebody laid out carelessly
    return torch.frombuffer(memory, dtype=dtype.torch_dtype)
