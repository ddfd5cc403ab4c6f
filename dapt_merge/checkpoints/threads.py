"""Work on many tensors in threads, with the same result and bounded memory whatever their number.

Two things make that true: every thread runs torch single-threaded inside (a sum split over more threads is added in
another order, and rounds differently), and a thread starts a tensor only while the tensors in flight stay within a
budget. What the work is, this module does not know.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from dapt_merge.tensors.lazy_torch import is_imported, torch, when_imported

Item = TypeVar("Item")
Result = TypeVar("Result")

MINIMUM_BUDGET = 64 * 2**20
MAXIMUM_THREADS = 16


def default_threads() -> int:
    """Return how many threads to use when the caller did not say: the CPUs this process may run on."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(available, MAXIMUM_THREADS))


def map_in_threads(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    size: Callable[[Item], int],
    *,
    group: Callable[[Item], int] = lambda item: 0,
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Return `[work(item) for item in items]`, computed largest first in several threads.

    The sizes in flight sum to at most twice the largest item (or `MINIMUM_BUDGET` where that is more), so that memory
    follows the largest tensor and not the thread count. The first exception stops the rest and is raised.

    Args:
        work: called once an item, in any thread and order.
        items: what to work on.
        size: an item's size, in elements or bytes; also the unit of `on_progress(done, total)`.
        group: items of a lower group are started first, whatever their size.
        threads: how many (default: the CPUs this process may use).
        on_progress: called after each item, never by two threads at once.
    """
    total = sum(size(item) for item in items)
    room = _Budget(max(2 * max((size(item) for item in items), default=0), MINIMUM_BUDGET))
    report_lock = threading.Lock()
    done = 0

    def one(item: Item) -> Result:
        nonlocal done
        with room.taken(size(item)):
            result = work(item)
        if on_progress is not None:
            with report_lock:
                done += size(item)
                on_progress(done, total)
        return result

    largest_first = sorted(range(len(items)), key=lambda index: (group(items[index]), -size(items[index])))
    with _single_threaded_torch(min(threads or default_threads(), max(1, len(items)))) as pool:
        futures = {index: pool.submit(one, items[index]) for index in largest_first}
        try:
            finished, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
            return [futures[index].result() for index in range(len(items))]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextmanager
def _single_threaded_torch(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool whose threads each run torch operations on one core, should they need torch at all."""
    before: list[int] = []

    def note_and_use_one() -> None:
        before.append(torch.get_num_threads())
        torch.set_num_threads(1)

    if is_imported():
        before.append(torch.get_num_threads())
    initializer = partial(torch.set_num_threads, 1) if before else None
    try:
        with when_imported(note_and_use_one), ThreadPoolExecutor(threads, initializer=initializer) as pool:
            yield pool
    finally:
        # The setting is per thread once a thread has used it, but also the default of threads yet to come.
        if before:
            torch.set_num_threads(before[0])


class _Budget:
    """Hands out room; one item larger than what is left waits, but never when nothing else is in flight."""

    def __init__(self, room: int) -> None:
        self._free = room
        self._holders = 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._holders == 0 or amount <= self._free)
            self._free -= amount
            self._holders += 1
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._holders -= 1
                self._changed.notify_all()
