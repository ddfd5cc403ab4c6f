"""What every command prints with: messages on stderr, results on stdout, progress with rate and time left."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

console = Console(stderr=True, highlight=False)
output = Console(highlight=False)


def print_json(result: Any) -> None:
    """Print one JSON document on stdout, and nothing else there."""
    json.dump(result, sys.stdout, indent=2, ensure_ascii=False, default=str)
    sys.stdout.write("\n")


@contextmanager
def progress(label: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """Yield `on_progress(done, total)`, drawn as a bar with rate (units/s) and time left.

    Off a terminal (a log file, CI) no bar is drawn; a line is printed at each tenth of the way instead.
    """
    if not console.is_terminal:
        yield _line_reporter(label, unit)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as bars:
        task = bars.add_task(label, total=1, rate=unit)

        def report(done: int, total: int) -> None:
            speed = bars.tasks[0].speed
            rate = f"{unit} · {speed:,.0f} {unit}/s" if speed and unit else unit
            bars.update(task, completed=done, total=total, rate=rate)

        yield report


def _line_reporter(label: str, unit: str) -> Callable[[int, int], None]:
    import time

    started = time.monotonic()
    last_tenth = 0
    # The rate counts from the first report on: a resumed run's first one tells what an earlier process did.
    first: tuple[int, float] | None = None

    def report(done: int, total: int) -> None:
        nonlocal last_tenth, first
        now = time.monotonic()
        first = first or (done, now)
        tenth = 10 * done // max(total, 1)
        # What ends within two seconds needs no progress.
        if tenth > last_tenth and now - started > 2:
            last_tenth = tenth
            seconds = now - first[1]
            rate = f" ({(done - first[0]) / seconds:,.1f} {unit}/s)" if seconds > 0 else ""
            console.print(f"{label}: {done:,}/{total:,} {unit}".rstrip() + rate)

    return report
