"""`dapt-merge pretrain`: a corpus and a base model to DAPT checkpoints."""

from __future__ import annotations

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
    as_json: bool = typer.Option(False, "--json", help="Print the run's checkpoints as JSON on stdout."),
) -> None:
    """Continue the pre-training of a model on your corpus, and keep checkpoints to merge.

    A killed run goes on from its newest checkpoint with the same command.

    dapt-merge pretrain recipes/pretrain-demo.yaml -o run tokens=40000
    """
    import json

    from rich.markup import escape

    from dapt_merge.cli.console import console, print_json, progress
    from dapt_merge.pretraining import load_pretrain_config
    from dapt_merge.pretraining import pretrain as train

    run = load_pretrain_config(config, overrides or [])
    if out is not None:
        run = run.model_copy(update={"output": out})
    with progress("training", "tokens") as on_progress:
        folders = train(
            run,
            overwrite=overwrite,
            on_progress=on_progress,
            on_note=lambda text: console.print(escape(text), soft_wrap=True),
        )
    checkpoints = [_summary(folder, json.loads((folder / "dapt_checkpoint.json").read_text())) for folder in folders]
    if as_json:
        print_json({"output": str(run.output), "checkpoints": checkpoints})
        return
    for row in checkpoints:
        console.print(
            f"{escape(row['folder'])}: {row['tokens_seen']:,} tokens, loss {row['loss']:.3f}, "
            f"{100 * row['relative_delta_norm']:.2f}% from the base",
            soft_wrap=True,
        )


def _summary(folder: Path, details: dict[str, Any]) -> dict[str, Any]:
    shown = ("step", "tokens_seen", "learning_rate", "loss", "relative_delta_norm", "domain_tokens", "replay_tokens")
    return {"folder": str(folder), **{key: details[key] for key in shown}}
