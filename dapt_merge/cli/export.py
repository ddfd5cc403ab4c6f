"""`dapt-merge export`: one trial of a study, written as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    study: Annotated[Path, typer.Argument(help="The folder that a search wrote to.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "--output", "-o", help="The new model's folder.", show_default=False)],
    pick: Annotated[
        str,
        typer.Option(
            help="knee, best-OBJECTIVE, a trial's number, or a least gain over the base such as 'general>=-1' "
            "(points for accuracies, bits per byte for bits_per_byte; positive is better)."
        ),
    ] = "knee",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="the checkpoints' own")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was exported as JSON on stdout.")] = False,
) -> None:
    """Write a trial's merge as an ordinary checkpoint, with its recipe and the record of the pick.

    dapt-merge export studies/sweep --pick knee -o merged/
    """
    from dapt_merge.atomic import refuse_existing
    from dapt_merge.cli.console import console, print_json, progress
    from dapt_merge.study import export_trial, load_study

    refuse_existing(out, overwrite)
    result = load_study(study)
    with progress("writing", "elements") as on_progress:
        trial, report = export_trial(result, pick, out, out_dtype=dtype, overwrite=overwrite, on_progress=on_progress)
    gains = result.gains(trial)
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
    if json:
        print_json({"out": out, "trial": trial.number, "label": trial.label, "gains": gains, "merge": report.to_dict()})
        return
    shown = ", ".join(f"{o.name} {gains[o.name]:+.3f} {o.unit}" for o in result.objectives)
    console.print(f"trial {trial.number}, {trial.label}: {shown} over the base, on the search items", markup=False)
    console.print(str(out), markup=False, soft_wrap=True)
