"""A function over a stream of items in several processes: results in the order of the items, memory bounded.

`multiprocessing`'s own `imap` takes the whole stream in before it gives anything out; here no more than a few items a
process are under way. What the function does is not known here.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

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
        prepare: called once in each process, with `prepare_with`, before the first item.
        prepare_with: what `prepare` is given.
    """
    if processes == 1:
        prepare(*prepare_with)
        yield from map(function, items)
        return
    with multiprocessing.get_context().Pool(processes, prepare, prepare_with) as pool:
        under_way: deque[multiprocessing.pool.AsyncResult[Result]] = deque()
        for item in items:
            under_way.append(pool.apply_async(function, (item,)))
            if len(under_way) >= processes * _UNDER_WAY_PER_PROCESS:
                yield under_way.popleft().get()
        while under_way:
            yield under_way.popleft().get()
