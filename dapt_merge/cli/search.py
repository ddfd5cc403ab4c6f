"""`dapt-merge search`: a study, run or gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dapt_merge.study import StudyResult, StudyTrial


def search(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study's file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Override keys of the file, such as budget.trials=20."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The study's folder (default: the file's `output`).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the study as JSON on stdout.")] = False,
) -> None:
    """Search the merges with the best trade. Interrupt it when you like: the same command goes on.

    dapt-merge search search/linear-sweep.yaml base=models/base checkpoints=runs/dapt -o studies/sweep
    """
    from dapt_merge.cli.console import console, print_json, progress
    from dapt_merge.study import load_study_config, run_study

    named = [] if output is None else [f"output={output}"]
    config = load_study_config(study, [*(overrides or []), *named])

    told: list[str] = []

    def on_trial(trial: StudyTrial, result: StudyResult) -> None:
        if not told:
            told.append("warnings")
            for warning in result.warnings:
                console.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
        console.print(_trial_line(trial, result), soft_wrap=True, markup=False)

    try:
        with progress("search", "items") as on_progress:
            result = run_study(config, on_trial=on_trial, on_progress=on_progress)
    except KeyboardInterrupt:
        line = f"\nInterrupted. Finished trials are in {config.folder}; the same command goes on from there."
        console.print(line, soft_wrap=True, markup=False)
        raise typer.Exit(130) from None
    if json:
        print_json(_summary(result))
    else:
        _print_front(result)


def _trial_line(trial: StudyTrial, result: StudyResult) -> str:
    """One finished trial: number, recipe in words, gains over the base with their paired standard errors."""
    start = f"{trial.number:>4}  {trial.label:<48}"
    if trial.state != "complete":
        return f"{start} failed: {(trial.failure or '').splitlines()[0]}"
    if trial.endpoint == "base":
        return f"{start} " + "   ".join(f"{name} {value:.4g}" for name, value in trial.values.items())
    return f"{start} " + _gains(trial, result)


def _gains(trial: StudyTrial, result: StudyResult) -> str:
    gains, errors = result.gains(trial), trial.gain_standard_errors
    return "   ".join(
        f"{o.name} {gains[o.name]:+.3f} ±{errors.get(o.name, float('nan')):.3f} {o.unit}" for o in result.objectives
    )


def _summary(result: StudyResult) -> dict[str, Any]:
    from dapt_merge.study import front_trials, hypervolume, knee

    return {
        **result.to_dict(),
        "front": [trial.number for trial in front_trials(result)],
        "knee": knee(result).number,
        "hypervolume": hypervolume(result),
    }


def _print_front(result: StudyResult) -> None:
    from dapt_merge.cli.console import output
    from dapt_merge.study import front_trials, hypervolume, knee

    chosen = knee(result).number
    output.print(f"{len(result.finished)} trials; the Pareto front, as gains over the base on the search items:")
    for trial in sorted(front_trials(result), key=lambda trial: trial.values[result.objectives[0].name]):
        mark = "  <- knee" if trial.number == chosen else ""
        shown = "the origin" if trial.endpoint == "base" else _gains(trial, result)
        output.print(f"{trial.number:>4}  {trial.label:<48} {shown}{mark}", soft_wrap=True, markup=False)
    ends = [trial for trial in result.complete if trial.endpoint]
    output.print(f"hypervolume {hypervolume(result):.3f}; of the two ends alone {hypervolume(result, ends):.3f}")
    output.print(f"next: dapt-merge plot {result.folder}", soft_wrap=True)
    output.print(f"      dapt-merge export {result.folder} --pick knee -o OUT", soft_wrap=True)
