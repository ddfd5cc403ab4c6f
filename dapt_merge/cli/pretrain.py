"""`dapt-merge pretrain`: a corpus and a base model to DAPT checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer


def pretrain(
    config: Path = typer.Argument(..., metavar="CONFIG.yaml", help="The run; see recipes/pretrain-*.yaml."),
    overrides: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Overrides such as learning_rate=1e-4.", show_default=False
    ),
    out: Path = typer.Option(
        None, "--out", "-o", help="The run's folder [default: the config's 'output'].", show_default=False
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Start again when the folder holds another run."),
    time_limit: str = typer.Option(
        None,
        "--time-limit",
        metavar="TIME",
        help="Save and stop within this time: 55m, 7h30m, 90s. The same command goes on; exit code 75.",
        show_default=False,
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the run's checkpoints as JSON on stdout."),
) -> None:
    """Continue the pre-training of a model on your corpus, and keep checkpoints to merge.

    A killed run goes on with the same command. On several devices: torchrun --nproc-per-node 8 --no-python dapt-merge
    pretrain run.yaml, or the same with accelerate launch.

    dapt-merge pretrain recipes/pretrain-demo.yaml -o run tokens=40000
    """
    import json
    from contextlib import ExitStack

    from rich.markup import escape

    from dapt_merge.cli.console import console, print_json, progress
    from dapt_merge.cli.corpus import step_bars
    from dapt_merge.pretraining import load_pretrain_config
    from dapt_merge.pretraining import pretrain as train
    from dapt_merge.pretraining.processes import is_main

    seconds = None if time_limit is None else seconds_of(time_limit)
    run = load_pretrain_config(config, overrides or [])
    if out is not None:
        run = run.model_copy(update={"output": out})
    with ExitStack() as bars:
        report: list[Callable[[int, int], None]] = []

        def on_progress(done: int, total: int) -> None:
            # Not before training begins: building the corpus draws bars of its own.
            if not report:
                report.append(bars.enter_context(progress("training", "tokens")))
            report[0](done, total)

        folders = train(
            run,
            overwrite=overwrite,
            time_limit_seconds=seconds,
            on_progress=on_progress if is_main() else None,
            on_corpus=step_bars() if is_main() else None,
            on_note=lambda text: console.print(escape(text), soft_wrap=True),
        )
    checkpoints = [_summary(folder, json.loads((folder / "dapt_checkpoint.json").read_text())) for folder in folders]
    if not is_main():
        return
    if as_json:
        print_json({"output": str(run.output), "checkpoints": checkpoints})
        return
    for row in checkpoints:
        console.print(
            f"{escape(row['folder'])}: {row['tokens_seen']:,} tokens, loss {row['loss']:.3f}, "
            f"{100 * row['relative_delta_norm']:.2f}% from the base",
            soft_wrap=True,
        )


def seconds_of(text: str) -> float:
    """Read a time such as `55m`, `7h30m` or `90s`; a number alone is seconds.

    Raises:
        InputError: it is none.

    Example:
        >>> seconds_of("1h30m"), seconds_of("90")
        (5400.0, 90.0)
    """
    import re

    from dapt_merge.errors import InputError

    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "": 1.0}
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms]?)", text)
    total = sum(float(number) * units[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or total <= 0:
        raise InputError(f"'{text}' is no time", where="--time-limit", remedy="Write for example 55m, 7h30m or 90s.")
    return total


def _summary(folder: Path, details: dict[str, Any]) -> dict[str, Any]:
    shown = ("step", "tokens_seen", "learning_rate", "loss", "relative_delta_norm", "domain_tokens", "replay_tokens")
    optional = ("changed_share_bf16", "heldout", "stopped_early")
    return {"folder": str(folder), **{key: details[key] for key in (*shown, *optional) if key in details}}
