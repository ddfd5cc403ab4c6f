"""`dapt-merge plot`: the Pareto picture of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plot(
    study: Annotated[Path, typer.Argument(help="The folder that a search wrote to.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A file (.png, .svg, .pdf, .html); default: png, svg and html in STUDY."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the points as JSON too.")] = False,
) -> None:
    """Draw a study's Pareto front with its error bars."""
    from dapt_merge.cli.console import output as stdout
    from dapt_merge.cli.console import print_json, progress
    from dapt_merge.reports.assemble import report_study
    from dapt_merge.reports.plot import save_front

    with progress("scoring the front", "items") as on_progress:
        report = report_study(study, on_progress=on_progress)
    paths = [output] if output else [study / f"front.{kind}" for kind in ("png", "svg", "html")]
    for path in paths:
        save_front(report.picture(), path)
    if json:
        print_json({"pictures": paths, "held_out": report.held_out, "rows": [row.to_dict() for row in report.rows]})
    else:
        for path in paths:
            stdout.print(str(path), soft_wrap=True)
        stdout.print("\n".join(report.verdict), soft_wrap=True)
