"""Files written at the speed of the disk beside threads that compute: buffers, positioned writes, direct if possible.

The idea: bytes are gathered in a few page-aligned buffers, and threads of their own carry full ones to the file, past
the page cache (O_DIRECT). That costs next to no processor time and leaves nothing for the final flush to wait for. What
does not fill whole blocks, at the borders between tensors, is kept and written last. Where a file system has no direct
writes, ordinary ones are made. What the bytes are, this module does not know.
"""

from __future__ import annotations

import errno
import mmap
import os
import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

BLOCK_BYTES = 4096  # what offset, length and address of a direct write are multiples of
# Room for at least two runs of float64; larger ones mean fewer and cheaper writes.
_LARGEST_BUFFER_BYTES = 8 * 2**20
_SMALLEST_BUFFER_BYTES = 4 * 2**20
_ALL_BUFFERS_BYTES = 96 * 2**20


class Staging:
    """Two buffers for each computing thread, and the threads that carry full ones to their files.

    Args:
        threads: how many threads compute.
    """

    def __init__(self, threads: int) -> None:
        room = _ALL_BUFFERS_BYTES // (2 * threads) // BLOCK_BYTES * BLOCK_BYTES
        self.buffer_bytes = min(max(room, _SMALLEST_BUFFER_BYTES), _LARGEST_BUFFER_BYTES)
        self._free: queue.SimpleQueue[mmap.mmap | None] = queue.SimpleQueue()
        for _ in range(2 * threads):
            self._free.put(None)  # made when first taken: a small merge needs few
        self._pool = ThreadPoolExecutor(max(2, threads), thread_name_prefix="writing")

    def take(self) -> mmap.mmap:
        """Return a free page-aligned buffer; waits until there is one."""
        return self._free.get() or mmap.mmap(-1, self.buffer_bytes)

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

    def write(self, content: memoryview, offset: int) -> None:
        """Write bytes, whose offset, length and address are multiples of `BLOCK_BYTES` except in `keep`; blocking."""
        if self._direct is not None:
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

    def finish(self) -> None:
        """Write what was kept, and wait until the disk has everything."""
        for offset, content in self._fragments:
            _write_at(self._descriptor, memoryview(content), offset)
        self._fragments.clear()
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
