"""Results come in order, few items are under way, and a killed process is told instead of waited for."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator

import pytest

from dapt_merge.corpus.parallel import ordered_map
from dapt_merge.errors import DaptMergeError, InputError

_offset = 0


def prepare(offset: int) -> None:
    global _offset
    _offset = offset


def slow_for_even(number: int) -> int:
    if number % 2 == 0:
        time.sleep(0.01)
    return number + _offset


def killed(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def refused(number: int) -> int:
    raise InputError("bad", where=f"line {number}", remedy="Mend it.")


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order_and_the_stream_is_read_a_few_items_ahead(processes: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(60):
            taken.append(number)
            yield number

    found = []
    for result in ordered_map(slow_for_even, items(), processes, prepare, (100,)):
        found.append(result)
        assert len(taken) - len(found) <= 6
    assert found == list(range(100, 160))


def test_a_killed_process_is_an_error_with_a_remedy() -> None:
    with pytest.raises(DaptMergeError, match="was killed") as caught:
        list(ordered_map(killed, range(10), 2, prepare, (0,)))
    assert "processes=1" in str(caught.value.remedy)


def test_an_error_of_the_function_comes_through_whole() -> None:
    with pytest.raises(InputError) as caught:
        list(ordered_map(refused, range(10), 2, prepare, (0,)))
    assert (caught.value.where, caught.value.remedy) == ("line 0", "Mend it.")


def told(number: int) -> int:
    return _offset


def add(offset: int) -> None:
    global _offset
    _offset += offset


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="processes are not forked here")
def test_forked_processes_share_what_was_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "_offset", 0)
    assert set(ordered_map(told, range(20), 2, add, (7,))) == {7}
    assert _offset == 7
    assert gc.get_freeze_count() == 0
