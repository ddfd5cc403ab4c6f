"""A function over a stream of items in several processes: results in the order of the items, memory bounded.

An executor's own `map` takes the whole stream in before it gives anything out; here no more than a few items a process
are under way. Where processes are forked, what the function needs is made ready before, so that all of them share it
in memory. What the function does is not known here.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from dapt_merge.errors import DaptMergeError

Item = TypeVar("Item")
Result = TypeVar("Result")
_UNDER_WAY_PER_PROCESS = 3


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    processes: int,
    prepare: Callable[..., None],
    prepare_with: tuple[object, ...],
) -> Iterator[Result]:
    """Yield `function(item)` for every item, in order.

    Args:
        function: a function of a module (processes receive it by name).
        items: read as results are taken, a few ahead.
        processes: 1 calls the function here.
        prepare: called with `prepare_with` before the first item: once here where processes are forked (they share
            what it makes), else once in each process.
        prepare_with: what `prepare` is given.

    Raises:
        DaptMergeError: a process was killed.
    """
    if processes == 1:
        prepare(*prepare_with)
        yield from map(function, items)
        return
    with _pool(processes, prepare, prepare_with) as pool:
        under_way: deque[Future[Result]] = deque()
        try:
            for item in items:
                under_way.append(pool.submit(function, item))
                if len(under_way) >= processes * _UNDER_WAY_PER_PROCESS:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool:
            raise DaptMergeError(
                "a process that was cleaning or tokenising the corpus was killed",
                remedy="If the machine ran out of memory, start again with fewer: processes=1.",
            ) from None
        finally:
            # After a fault nobody takes the results of what is still waiting.
            for future in under_way:
                future.cancel()


@contextmanager
def _pool(
    processes: int, prepare: Callable[..., None], prepare_with: tuple[object, ...]
) -> Iterator[ProcessPoolExecutor]:
    if multiprocessing.get_start_method() != "fork":
        with ProcessPoolExecutor(processes, initializer=partial(_begin, prepare, prepare_with)) as pool:
            yield pool
        return
    prepare(*prepare_with)
    gc.collect()
    # The collector writes into every object that it looks at, which would give each process a copy of its page.
    gc.freeze()
    try:
        with ProcessPoolExecutor(processes, initializer=_begin) as pool:
            yield pool
    finally:
        gc.unfreeze()


def _begin(prepare: Callable[..., None] | None = None, prepare_with: tuple[object, ...] = ()) -> None:
    """Begin a process: it ends with the one that started it, also when that one is killed and cannot say so."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare is not None:
        prepare(*prepare_with)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
