"""Threads change the time of the work, not its result, its memory or its errors."""

import threading
import time

import pytest
import torch

from dapt_merge.checkpoints import threads as module
from dapt_merge.checkpoints.threads import map_in_threads


def test_results_come_in_the_order_of_the_items():
    assert map_in_threads(lambda x: x * x, [3, 1, 2], size=lambda x: x, threads=3) == [9, 1, 4]
    assert map_in_threads(lambda x: x, [], size=lambda x: x) == []


def test_the_first_error_stops_the_rest_and_is_raised():
    started = []

    def work(item):
        started.append(item)
        if item == 0:
            raise ValueError("item 0")
        time.sleep(0.005)

    with pytest.raises(ValueError, match="item 0"):
        map_in_threads(work, range(500), size=lambda item: 1, threads=2)
    assert len(started) < 500


def test_sizes_in_flight_stay_within_twice_the_largest(monkeypatch):
    monkeypatch.setattr(module, "MINIMUM_BUDGET", 0)
    lock, flying, highest = threading.Lock(), 0, 0

    def work(size):
        nonlocal flying, highest
        with lock:
            flying += size
            highest = max(highest, flying)
        time.sleep(0.002)
        with lock:
            flying -= size

    map_in_threads(work, [10, 10, 10, 10, 3, 3, 3, 3], size=lambda size: size, threads=8)
    assert 10 < highest <= 20


def test_progress_reaches_the_total_in_order():
    seen = []
    map_in_threads(
        str, [1, 2, 3], size=lambda x: x, threads=3, on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen == sorted(seen)
    assert seen[-1] == (6, 6)


def test_torch_works_on_one_core_inside_and_as_before_outside():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert set(map_in_threads(lambda _: torch.get_num_threads(), range(4), size=lambda _: 1, threads=2)) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
