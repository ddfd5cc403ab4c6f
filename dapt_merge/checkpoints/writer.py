"""Writes a safetensors checkpoint in shards, its tensors in any order and by several threads.

The headers depend on names, dtypes and shapes alone, so every file is laid out and preallocated before the first tensor
is computed; each tensor then goes to its own place with positioned writes. The same tensors give the same bytes,
whatever the order and the number of threads. Atomicity is the caller's: write into a folder of `atomic_folder`.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from dapt_merge.checkpoints.checkpoint import tensor_bytes
from dapt_merge.checkpoints.dtypes import SAFETENSORS_NAMES, dtype_name
from dapt_merge.errors import DaptMergeError, InputError

DEFAULT_SHARD_BYTES = 5 * 10**9


class TensorSpec(Protocol):
    """What must be known of a tensor before it is written."""

    @property
    def name(self) -> str:
        """The tensor's name in the file."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it is stored in."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


@dataclass(frozen=True)
class _Place:
    shard: int
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class CheckpointWriter:
    """A checkpoint folder being filled: `model.safetensors`, or shards of at most `shard_bytes` and their index.

    A tensor larger than `shard_bytes` gets a shard of its own. Use it as a context manager, or call `close`.

    Args:
        folder: an existing folder.
        tensors: name, dtype and shape of every tensor that will be written, in the order of the shards.
        shard_bytes: upper bound of the tensor bytes in one file.

    Raises:
        InputError: a dtype that safetensors cannot hold.
        OSError: no space left; it is found here, before anything is computed.

    Example:
        >>> import tempfile; from dapt_merge.checkpoints import TensorInfo
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with CheckpointWriter(Path(folder), [TensorInfo("w", torch.float32, (2,), 8)]) as writer:
        ...         writer.write("w", torch.ones(2))
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['model.safetensors']
    """

    def __init__(self, folder: Path, tensors: Sequence[TensorSpec], *, shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self._folder = folder
        shards = _split_into_shards(tensors, shard_bytes)
        count = len(shards)
        self.files = tuple(
            "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            for number in range(1, count + 1)
        )
        self._places: dict[str, _Place] = {}
        self._written: set[str] = set()
        self._descriptors: list[int] = []
        try:
            for number, shard in enumerate(shards):
                self._descriptors.append(self._lay_out(number, shard))
        except BaseException:
            self._close_files()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place; dtype and shape must be those announced. Safe to call from any thread."""
        place = self._places[name]
        if tensor.dtype != place.dtype or tuple(tensor.shape) != place.shape:
            raise DaptMergeError(
                f"tensor '{name}' was announced as {dtype_name(place.dtype)} {place.shape}, "
                f"but {dtype_name(tensor.dtype)} {tuple(tensor.shape)} came"
            )
        _write_at(self._descriptors[place.shard], tensor_bytes(tensor.cpu()), place.offset)
        self._written.add(name)

    def close(self) -> None:
        """Write the index and close the files.

        Raises:
            DaptMergeError: a tensor that was announced has not been written.
        """
        self._close_files()
        missing = [name for name in self._places if name not in self._written]
        if missing:
            raise DaptMergeError(f"{len(missing)} tensors were never written, the first is '{missing[0]}'")
        if len(self.files) > 1:
            self._write_index()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._close_files()

    def _lay_out(self, number: int, shard: Sequence[TensorSpec]) -> int:
        """Create one file with its header, reserve its space, and return its descriptor."""
        # Wider dtypes first keeps every tensor aligned to its own element size.
        ordered = sorted(shard, key=lambda spec: -spec.dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for spec in ordered:
            start, end = end, end + _nbytes(spec)
            header[spec.name] = {
                "dtype": SAFETENSORS_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        data_starts = 8 + len(text)
        for spec in ordered:
            start = header[spec.name]["data_offsets"][0]  # type: ignore[index]
            self._places[spec.name] = _Place(number, data_starts + start, _nbytes(spec), spec.dtype, tuple(spec.shape))
        descriptor = os.open(self._folder / self.files[number], os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _reserve(descriptor, data_starts + end)
            _write_at(descriptor, memoryview(len(text).to_bytes(8, "little") + text), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _write_index(self) -> None:
        index = {
            "metadata": {"total_size": sum(place.nbytes for place in self._places.values())},
            "weight_map": {name: self.files[place.shard] for name, place in sorted(self._places.items())},
        }
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _close_files(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


def _split_into_shards(tensors: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in tensors:
        if spec.dtype not in SAFETENSORS_NAMES:
            raise InputError(
                f"tensor '{spec.name}' has dtype {dtype_name(spec.dtype)}, which is not written",
                remedy="Choose float32, bfloat16 or float16 as the output dtype.",
            )
        if shards[-1] and filled + _nbytes(spec) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += _nbytes(spec)
    return shards


def _nbytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _reserve(descriptor: int, nbytes: int) -> None:
    """Take the disk space now, so that a full disk is met before the work and not in the middle of it."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except (AttributeError, OSError) as error:
        unsupported = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
        if isinstance(error, OSError) and error.errno not in unsupported:
            raise
        os.ftruncate(descriptor, nbytes)


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], offset + written)
