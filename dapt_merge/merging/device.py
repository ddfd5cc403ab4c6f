"""Merging on another device: tensors go there through pinned buffers in turn, results come back the same way.

The idea: while one buffer is on its way, the next is filled, and while one thread's tensor is computed, another's is
brought, each on a stream of its own. The arithmetic is that of `tensor`, which asks its inputs where they are. With the
device "cpu" every step is the same but for the pinning, so that the path is tested where there is no accelerator. What
this module does not know: what is merged, and where the results go.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from dapt_merge.errors import InputError
from dapt_merge.merging.plan import Reader
from dapt_merge.merging.tensor import Place
from dapt_merge.tensors.dtypes import Dtype
from dapt_merge.tensors.lazy_torch import torch
from dapt_merge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

_BUFFER_BYTES = 32 * 2**20


def available_device(name: str) -> tuple[torch.device | None, str | None]:
    """Return the device to merge on (None: the processor, as ever), and a sentence where it is not the one named.

    Raises:
        InputError: there is no such kind of device.
    """
    if name == "cpu":
        return None, None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"'{name}' is no device", where="--device", remedy="Use cpu, cuda or cuda:1.") from error
    if device.type != "cuda":
        raise InputError(f"merging on '{name}' is not supported", where="--device", remedy="Use cpu, cuda or cuda:1.")
    if not torch.cuda.is_available():
        return None, f"there is no CUDA device that this torch ({torch.__version__}) can use: merged on the processor"
    if (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(f"there is no '{name}': {count} are here", where="--device", remedy="Use a lower number.")
    return device, None


class Ferry:
    """One thread's way to a device and back.

    Args:
        device: where to compute.
        buffer_bytes: of each of the two buffers of either direction.

    Example:
        >>> ferry = Ferry(torch.device("cpu"))
        >>> ferry.bring(torch.ones(3))
        tensor([1., 1., 1.])
    """

    def __init__(self, device: torch.device, buffer_bytes: int = _BUFFER_BYTES) -> None:
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=self._on_cuda) for _ in range(2)]
        self._back = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._busy: list[Any] = [None, None]
        self._stream = torch.cuda.Stream(device) if self._on_cuda else None

    @contextmanager
    def at_work(self, name: str) -> Iterator[None]:
        """Let what is computed inside run on this thread's stream of the device.

        Raises:
            InputError: the device has no room for a tensor.
        """
        try:
            with torch.cuda.stream(self._stream) if self._on_cuda else nullcontext():
                yield
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{self._device} has no room to merge this tensor",
                where=f"tensor {name}",
                remedy="Use fewer --threads, or leave --device out.",
            ) from error

    def bring(self, tensor: Tensor) -> Tensor:
        """Return a tensor's copy on the device; it may still be on its way, for work of this stream."""
        host = tensor.reshape(-1).view(torch.uint8)
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        flat = there.reshape(-1).view(torch.uint8)
        size = len(self._buffers[0])
        for number, begin in enumerate(range(0, len(host), size)):
            part = host[begin : begin + size]
            buffer = self._buffers[number % 2][: len(part)]
            self._wait(number % 2)
            buffer.copy_(part)
            flat[begin : begin + len(part)].copy_(buffer, non_blocking=True)
            self._busy[number % 2] = self._mark()
        return there

    @contextmanager
    def returning(self, home: Place) -> Iterator[Place]:
        """Yield places on the device, whose content is carried to those at home; all is there when the block ends."""
        carrier = _Return(self, home)
        yield carrier.place
        carrier.finish()

    def _mark(self) -> Any:
        return self._stream.record_event() if self._stream is not None else None

    def _wait(self, number: int) -> None:
        if self._busy[number] is not None:
            self._busy[number].synchronize()
            self._busy[number] = None


class _Return:
    """Runs on the device, one being filled, and one on its way home."""

    def __init__(self, ferry: Ferry, home: Place) -> None:
        self._ferry, self._home = ferry, home
        self._filling: tuple[int, int, Tensor] | None = None
        self._under_way: tuple[int, int, Tensor, Any] | None = None
        self._dtype: Dtype | None = None
        self._turn = 0

    def place(self, begin: int, end: int) -> StoredTensor:
        self._send()
        if self._dtype is None:
            # The dtype is the home's to know; what it hands out is asked for again when there is something to put in.
            self._dtype = self._home(begin, begin).dtype
        there = torch.empty(end - begin, dtype=self._dtype.torch_dtype, device=self._ferry._device)
        self._filling = (begin, end, there)
        return StoredTensor.of(there)

    def finish(self) -> None:
        self._send()
        self._arrive()

    def _send(self) -> None:
        if self._filling is None:
            return
        begin, end, there = self._filling
        buffer = self._pinned(there)
        buffer.copy_(there, non_blocking=True)
        event = self._ferry._mark()
        self._arrive()
        self._under_way, self._filling = (begin, end, buffer, event), None
        self._turn = 1 - self._turn

    def _arrive(self) -> None:
        if self._under_way is None:
            return
        begin, end, buffer, event = self._under_way
        if event is not None:
            event.synchronize()
        self._home(begin, end).tensor.copy_(buffer)
        self._under_way = None

    def _pinned(self, there: Tensor) -> Tensor:
        size = there.numel() * there.itemsize
        if len(self._ferry._back[self._turn]) < size:
            self._ferry._back[self._turn] = torch.empty(size, dtype=torch.uint8, pin_memory=self._ferry._on_cuda)
        return self._ferry._back[self._turn][:size].view(there.dtype)


def brought_by(ferry: Ferry, read: Reader) -> Reader:
    """Return a way to read tensors onto the device."""
    return lambda label, name: ferry.bring(StoredTensor.of(read(label, name)).tensor)
