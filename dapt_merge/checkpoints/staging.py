"""Files written at the speed of the disk beside threads that compute: buffers, positioned writes, direct if possible.

The idea: bytes are gathered in a few page-aligned buffers, and threads of their own carry full ones to the file, past
the page cache (O_DIRECT). That costs next to no processor time and leaves nothing for the final flush to wait for. What
does not fill whole blocks, at the borders between tensors, is kept and written last. Where a file system has no direct
writes, ordinary ones are made.

A disk can be slower than the threads. Where the caller does not wait for the disk anyway, a thread that has had to wait
for a buffer writes the next pieces into the page cache itself, while they are in the processor's: a burst, in which the
disk catches up, as long as there is room, and as long as a byte costs less time than the disk would take. (Fresh memory
can be dear: a virtual machine may have to ask its host for it.) It is bursts, because both ways at once would wait for
each other at the file's lock. What the bytes are, this module does not know.
"""

from __future__ import annotations

import errno
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

BLOCK_BYTES = 4096  # what offset, length and address of a direct write are multiples of
# Room for at least two runs of float64; larger ones mean fewer and cheaper writes.
_LARGEST_BUFFER_BYTES = 8 * 2**20
_SMALLEST_BUFFER_BYTES = 4 * 2**20
_ALL_BUFFERS_BYTES = 96 * 2**20
# What goes into the page cache is still in the processor's own when it is copied.
_CACHED_PIECE_BYTES = 2 * 2**20
# How much goes there after a wait, and how long all waits together are let pass before that.
_BURST_BYTES = 32 * 2**20
_PATIENCE_SECONDS = 0.02
# A byte in the page cache may take as much of a processor as a fast disk takes for it, judged by the first so many.
_DEAREST_SECONDS_PER_BYTE = 0.7e-9
_TELLING_BYTES = 32 * 2**20


class Staging:
    """Two buffers for each computing thread, and the threads that carry full ones to their files.

    Args:
        threads: how many threads compute.
        cached_bytes: how much may be left to the page cache where the disk cannot keep up; 0: everything goes past it.
    """

    def __init__(self, threads: int, *, cached_bytes: int = 0) -> None:
        room = _ALL_BUFFERS_BYTES // (2 * threads) // BLOCK_BYTES * BLOCK_BYTES
        self.buffer_bytes = min(max(room, _SMALLEST_BUFFER_BYTES), _LARGEST_BUFFER_BYTES)
        self._free: queue.SimpleQueue[mmap.mmap | None] = queue.SimpleQueue()
        for _ in range(2 * threads):
            self._free.put(None)  # made when first taken: a small merge needs few
        self._pool = ThreadPoolExecutor(max(2, threads), thread_name_prefix="writing")
        self._lock = threading.Lock()
        self._cached_bytes = cached_bytes  # what is left of them
        self._burst_bytes = 0  # likewise
        self._waited_seconds = 0.0
        self._caching = (0, 0.0)  # bytes, processor seconds

    def take(self) -> mmap.mmap:
        """Return a free page-aligned buffer; waits until there is one."""
        try:
            free = self._free.get_nowait()
        except queue.Empty:
            started = time.monotonic()
            free = self._free.get()
            with self._lock:
                self._waited_seconds += time.monotonic() - started
                if self._waited_seconds > _PATIENCE_SECONDS:
                    self._burst_bytes = _BURST_BYTES
        return free or mmap.mmap(-1, self.buffer_bytes)

    @property
    def piece_bytes(self) -> int:
        """How much of a buffer is to be filled before it is carried away."""
        return min(_CACHED_PIECE_BYTES, self.buffer_bytes) if self._caches() else self.buffer_bytes

    def carry(self, write: Callable[[bool], None], nbytes: int) -> Future[None] | None:
        """Have so many bytes written: `write(False)` by a writing thread, or `write(True)`, cached, by this one now.

        Returns:
            What tells when it is done, or None when it is.
        """
        with self._lock:
            cached = self._caches() and nbytes <= self._cached_bytes
            if cached:
                self._cached_bytes -= nbytes
                self._burst_bytes -= nbytes
        if not cached:
            return self._pool.submit(write, False)
        started = time.thread_time()
        write(True)
        seconds = time.thread_time() - started
        with self._lock:
            self._caching = (self._caching[0] + nbytes, self._caching[1] + seconds)
            if self._caching[0] >= _TELLING_BYTES and self._caching[1] > self._caching[0] * _DEAREST_SECONDS_PER_BYTE:
                self._cached_bytes = 0
        return None

    def _caches(self) -> bool:
        return min(self._cached_bytes, self._burst_bytes) > 0

    def give(self, buffer: mmap.mmap) -> None:
        """Take a buffer back."""
        self._free.put(buffer)

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Run work in a writing thread; what was submitted first starts first."""
        return self._pool.submit(work)

    def close(self) -> None:
        """Carry out what was submitted, and end the writing threads."""
        self._pool.shutdown(wait=True)


class OutputFile:
    """A file of known length: its space is taken when it is made, its content comes in any order.

    Raises:
        OSError: the file exists, or there is no space for it.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._direct: int | None = None
        self._fragments: list[tuple[int, bytes]] = []
        try:
            _reserve(self._descriptor, nbytes)
            self._direct = _open_directly(path)
        except BaseException:
            self.close()
            raise

    def write(self, content: memoryview, offset: int, *, cached: bool = False) -> None:
        """Write bytes, whose offset, length and address are multiples of `BLOCK_BYTES` except in `keep`; blocking."""
        if self._direct is not None and not cached:
            try:
                _write_at(self._direct, content, offset)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        _write_at(self._descriptor, content, offset)

    def keep(self, content: bytes, offset: int) -> None:
        """Remember a few bytes that fill no block; `finish` writes them. From one thread at a time or many."""
        self._fragments.append((offset, content))

    def finish(self, *, flush: bool = True) -> None:
        """Write what was kept, and wait until the disk has everything, unless that is left to the kernel."""
        for offset, content in self._fragments:
            _write_at(self._descriptor, memoryview(content), offset)
        self._fragments.clear()
        if flush:
            os.fsync(self._descriptor)
        self.close()

    def close(self) -> None:
        """Close the file, finished or not."""
        for descriptor in (self._descriptor, self._direct):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._descriptor, self._direct = -1, None


def _open_directly(path: Path) -> int | None:
    flag = getattr(os, "O_DIRECT", 0)
    try:
        return os.open(path, os.O_WRONLY | flag) if flag else None
    except OSError:
        return None


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
