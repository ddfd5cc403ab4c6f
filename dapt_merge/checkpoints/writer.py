"""Writes a safetensors checkpoint in shards, its tensors in any order and by several threads.

The headers depend on names, dtypes and shapes alone, so every file is laid out and its space is taken before the first
tensor is computed; each tensor then goes to its own place, in runs, while the next run is computed. The same tensors
give the same bytes, whatever the order and the number of threads. How bytes reach the disk, `staging` knows. Atomicity
is the caller's: write into a folder of `atomic_folder`.
"""

from __future__ import annotations

import json
import math
import mmap
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import xxhash

from dapt_merge.checkpoints.page_cache import page_cache_room
from dapt_merge.checkpoints.staging import BLOCK_BYTES, OutputFile, Staging
from dapt_merge.checkpoints.threads import default_threads
from dapt_merge.errors import DaptMergeError, InputError
from dapt_merge.tensors.dtypes import SAFETENSORS_NAMES, Dtype
from dapt_merge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_SHARD_BYTES = 5 * 10**9
_RUN_BYTES = 1 << 20  # of a tensor that is there as a whole


class TensorSpec(Protocol):
    """What must be known of a tensor before it is written."""

    @property
    def name(self) -> str:
        """The tensor's name in the file."""

    @property
    def dtype(self) -> Dtype:
        """The dtype it is stored in."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


@dataclass(frozen=True)
class _Place:
    shard: int
    offset: int
    nbytes: int
    dtype: Dtype
    shape: tuple[int, ...]


class _Shard:
    """A file, what is still to come, and the writes under way."""

    def __init__(self, file: OutputFile, names: Collection[str]) -> None:
        self.file = file
        self.missing = set(names)
        self.writes: list[Future[None]] = []
        self.finished: Future[None] | None = None
        self.lock = threading.Lock()


class CheckpointWriter:
    """A checkpoint folder being filled: `model.safetensors`, or shards of at most `shard_bytes` and their index.

    A tensor larger than `shard_bytes` gets a shard of its own. Use it as a context manager, or call `close`.

    Args:
        folder: an existing folder.
        tensors: name, dtype and shape of every tensor that will be written, in the order of the shards.
        shard_bytes: upper bound of the tensor bytes in one file.
        threads: how many threads will write (default: the CPUs this process may use); buffers are made for them.
        finished_files: names of files that an earlier writer of the same tensors has finished in this folder; their
            tensors are not to be written again.
        on_finished: called with (file name, its tensors' names) once a file is written, from a writing thread.
        flush: whether a file counts as written only when the disk has it; otherwise when any process can read it, and
            only a power cut can still take it away.

    Raises:
        InputError: a dtype that safetensors cannot hold.
        OSError: no space left; it is found here, before anything is computed.

    Example:
        >>> import tempfile, torch; from dapt_merge.checkpoints import TensorInfo
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with CheckpointWriter(Path(folder), [TensorInfo("w", Dtype.FLOAT32, (2,), 8)]) as writer:
        ...         digest = writer.write("w", torch.ones(2))
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['model.safetensors']
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[TensorSpec],
        *,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        threads: int | None = None,
        finished_files: Collection[str] = (),
        on_finished: Callable[[str, tuple[str, ...]], None] | None = None,
        flush: bool = True,
    ) -> None:
        self._folder = folder
        self._on_finished = on_finished
        self._flush = flush
        layout = split_into_shards(tensors, shard_bytes)
        self.files = shard_files(len(layout))
        self._names = [tuple(spec.name for spec in shard) for shard in layout]
        self._places: dict[str, _Place] = {}
        self._shards: dict[int, _Shard] = {}
        self._staging = Staging(threads or default_threads(), cached_bytes=0 if flush else page_cache_room())
        try:
            for number, shard in enumerate(layout):
                header, nbytes = self._lay_out(number, shard)
                if self.files[number] not in finished_files:
                    self._open(number, header, nbytes)
        except BaseException:
            self._close_files()
            raise

    def stream(self, name: str) -> TensorStream:
        """Return the way in for one tensor's runs; each tensor once, several tensors in several threads."""
        place = self._places[name]
        return TensorStream(self, name, place, self._shards[place.shard].file, self._staging)

    def file_number(self, name: str) -> int:
        """Return which file a tensor goes to, as an index of `files`."""
        return self._places[name].shard

    def write(self, name: str, tensor: Tensor | StoredTensor) -> bytes:
        """Write one tensor to its place, from any thread, and return the digest of its bytes.

        Raises:
            DaptMergeError: dtype or shape are not those announced.
        """
        place = self._places[name]
        stored = StoredTensor.of(tensor)
        if stored.dtype != place.dtype or stored.shape != place.shape:
            raise DaptMergeError(
                f"tensor '{name}' was announced as {place.dtype} {place.shape}, but {stored.dtype} {stored.shape} came"
            )
        content = stored.memory
        with self.stream(name) as stream:
            for begin in range(0, place.nbytes, _RUN_BYTES):
                run = content[begin : begin + _RUN_BYTES]
                stream.take(len(run))[:] = run
        stream.complete()
        return stream.digest

    def close(self) -> None:
        """Wait until everything is written, write the index and close the files.

        Raises:
            DaptMergeError: a tensor that was announced has not been written.
            OSError: a write failed.
        """
        try:
            for shard in self._shards.values():
                for write in list(shard.writes):
                    write.result()
                if shard.finished is not None:
                    shard.finished.result()
        finally:
            self._close_files()
        missing = [name for shard in self._shards.values() for name in shard.missing]
        if missing:
            raise DaptMergeError(f"{len(missing)} tensors were never written, the first is '{min(missing)}'")
        if len(self.files) > 1:
            self._write_index()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        self._close_files()
        if error is not None:
            for failure in self._failures():
                if failure is not error:
                    error.add_note(f"A file could not be written, either: {failure!r}")

    def _failures(self) -> list[BaseException]:
        """Return what writes that are over ended with, beside those that ended well."""
        writes = [write for shard in self._shards.values() for write in (*shard.writes, shard.finished) if write]
        return [failure for write in writes if write.done() and (failure := write.exception()) is not None]

    def _lay_out(self, number: int, shard: Sequence[TensorSpec]) -> tuple[bytes, int]:
        """Settle where each tensor of a file lies, and return the file's header and length."""
        # Wider dtypes first keeps every tensor aligned to its own element size.
        ordered = sorted(shard, key=lambda spec: -spec.dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets: dict[str, int] = {}
        end = 0
        for spec in ordered:
            start, end = end, end + _nbytes(spec)
            offsets[spec.name] = start
            header[spec.name] = {
                "dtype": SAFETENSORS_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # Data that begins with a block can be written past the page cache, and read by whole pages.
        text += b" " * (-(8 + len(text)) % BLOCK_BYTES)
        data_starts = 8 + len(text)
        for spec in ordered:
            place = _Place(number, data_starts + offsets[spec.name], _nbytes(spec), spec.dtype, tuple(spec.shape))
            self._places[spec.name] = place
        return len(text).to_bytes(8, "little") + text, data_starts + end

    def _open(self, number: int, header: bytes, nbytes: int) -> None:
        path = self._folder / self.files[number]
        path.unlink(missing_ok=True)  # what an interrupted writer left half done
        shard = self._shards[number] = _Shard(OutputFile(path, nbytes), self._names[number])
        shard.file.keep(header, 0)
        if not shard.missing:
            shard.finished = self._staging.submit(lambda: self._finish(number))

    def _carry(self, place: _Place, buffer: mmap.mmap, first: int, end: int, origin: int) -> None:
        """Have the bytes first…end−1 of a buffer put into the file, and the buffer freed."""
        shard = self._shards[place.shard]

        def carry(cached: bool) -> None:
            try:
                with memoryview(buffer) as whole, whole[first:end] as content:
                    shard.file.write(content, origin + first, cached=cached)
            finally:
                self._staging.give(buffer)

        under_way = self._staging.carry(carry, end - first)
        with shard.lock:
            for write in [write for write in shard.writes if write.done()]:
                shard.writes.remove(write)
                write.result()
            if under_way is not None:
                shard.writes.append(under_way)

    def _complete(self, name: str) -> None:
        """Note that a tensor is under way to its file as a whole; the last one of a file finishes the file."""
        number = self._places[name].shard
        shard = self._shards[number]
        with shard.lock:
            shard.missing.discard(name)
            if not shard.missing and shard.finished is None:
                shard.finished = self._staging.submit(lambda: self._finish(number))

    def _finish(self, number: int) -> None:
        shard = self._shards[number]
        for write in list(shard.writes):
            write.result()  # submitted earlier, so running or done: this wait ends
        shard.file.finish(flush=self._flush)
        if self._on_finished is not None:
            self._on_finished(self.files[number], self._names[number])

    def _write_index(self) -> None:
        index = {
            "metadata": {"total_size": sum(place.nbytes for place in self._places.values())},
            "weight_map": {name: self.files[place.shard] for name, place in sorted(self._places.items())},
        }
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _close_files(self) -> None:
        self._staging.close()
        for shard in self._shards.values():
            shard.file.close()


class TensorStream:
    """One tensor's way into its file: ask for room, fill it, ask for more. It is hashed while it is in the cache.

    Leave the `with` block once everything is filled; after that, `digest` is the XXH3 128-bit digest of the bytes. Then
    call `complete`: a file is finished, and told to be, once all its tensors are.
    """

    def __init__(self, writer: CheckpointWriter, name: str, place: _Place, file: OutputFile, staging: Staging) -> None:
        self._writer, self._name, self._place, self._file, self._staging = writer, name, place, file, staging
        self._hash = xxhash.xxh3_128()
        self._buffer: mmap.mmap | None = None
        self._view = memoryview(b"")
        self._origin = place.offset  # where in the file the buffer begins
        self._filled = 0  # bytes of the buffer that are filled
        self._open_from = 0  # from here on they are not hashed yet
        self._taken = 0

    def place(self, begin: int, end: int) -> StoredTensor:
        """Return where the elements begin…end−1 go: 1-d, and the caller's until the next place is asked for.

        Elements are asked for in order and without gaps.
        """
        itemsize = self._place.dtype.itemsize
        if begin * itemsize != self._taken:
            raise ValueError(f"tensor {self._name}: element {begin} is asked for, {self._taken // itemsize} is next")
        room = self.take((end - begin) * itemsize) if begin < end else memoryview(b"")
        return StoredTensor(self._place.dtype, (end - begin,), room)

    def take(self, nbytes: int) -> memoryview:
        """Return room for the next bytes; see `place`."""
        self._hash_filled()
        if self._buffer is None:
            self._start(self._place.offset)
        if self._filled >= BLOCK_BYTES and self._filled + nbytes > self._staging.piece_bytes:
            self._flush()
        start = self._filled
        self._filled += nbytes
        self._taken += nbytes
        if self._filled > self._staging.buffer_bytes or self._taken > self._place.nbytes:
            raise ValueError(f"tensor {self._name}: {nbytes} bytes are asked for at once, or more than it has")
        return self._view[start : self._filled]

    @property
    def digest(self) -> bytes:
        """The digest of the bytes, once the stream is left."""
        return self._hash.digest()

    def complete(self) -> None:
        """Say that nothing more is to be done for this tensor before its file is finished."""
        self._writer._complete(self._name)

    def __enter__(self) -> TensorStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._hash_filled()
            if self._taken != self._place.nbytes:
                raise ValueError(f"tensor {self._name}: {self._taken} bytes came, {self._place.nbytes} were announced")
            self._flush(last=True)
        self._view = memoryview(b"")
        if self._buffer is not None:
            self._staging.give(self._buffer)
            self._buffer = None

    def _hash_filled(self) -> None:
        self._hash.update(self._view[self._open_from : self._filled])
        self._open_from = self._filled

    def _start(self, offset: int) -> None:
        """Begin a buffer so that what lies at a block's start in the file lies at one in the buffer."""
        self._buffer = self._staging.take()
        self._view = memoryview(self._buffer)
        self._filled = self._open_from = offset % BLOCK_BYTES
        self._origin = offset - self._filled

    def _flush(self, last: bool = False) -> None:
        """Send whole blocks on their way; keep what is before the first and, at the end, after the last of them."""
        buffer = self._buffer
        if buffer is None:
            return
        head = self._place.offset - self._origin if self._origin < self._place.offset else 0
        first = -(-head // BLOCK_BYTES) * BLOCK_BYTES
        whole = self._filled // BLOCK_BYTES * BLOCK_BYTES
        if head:
            self._file.keep(bytes(self._view[head : min(first, self._filled)]), self._place.offset)
        rest = bytes(self._view[max(whole, first) : self._filled])
        rest_at = self._origin + max(whole, first)
        self._buffer = None
        if whole > first:
            self._carry_away(buffer, first, whole)
        else:
            self._staging.give(buffer)
        if last:
            if rest:
                self._file.keep(rest, rest_at)
            return
        self._start(rest_at)
        self._view[: len(rest)] = rest
        self._filled = self._open_from = len(rest)

    def _carry_away(self, buffer: mmap.mmap, first: int, whole: int) -> None:
        self._writer._carry(self._place, buffer, first, whole, self._origin)


def shard_files(count: int) -> tuple[str, ...]:
    """Return the names of so many weight files, as transformers expects them."""
    if count == 1:
        return ("model.safetensors",)
    return tuple(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


def split_into_shards(tensors: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Return the tensors file by file, in their order, each file within `shard_bytes` unless one tensor is larger.

    Raises:
        InputError: a dtype that safetensors cannot hold.
    """
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in tensors:
        if spec.dtype not in SAFETENSORS_NAMES:
            raise InputError(
                f"tensor '{spec.name}' has dtype {spec.dtype}, which is not written",
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
