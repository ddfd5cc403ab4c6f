"""`dapt-merge extract-lora`: the difference of two models as a LoRA adapter on the first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dapt_merge.merging.extraction import Extraction


def extract_lora(
    base: Annotated[str, typer.Argument(help="The base: a folder, a file or a hub id.", show_default=False)],
    merged: Annotated[str, typer.Argument(help="The model to express on top of it.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The adapter's folder.", show_default=False)],
    rank: Annotated[int, typer.Option(min=1, help="Directions kept of each matrix.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the randomised SVD.")] = 0,
    keep_whole: Annotated[
        bool, typer.Option("--keep-whole", help="Store embeddings, norms, biases and heads that differ, whole.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the account as JSON on stdout.")] = False,
) -> None:
    """Write MERGED as a LoRA adapter on BASE, and say how much of the difference it keeps.

    Any peft program loads the folder, and so does this one, as BASE+OUT.

    dapt-merge extract-lora models/base merged --rank 32 -o adapter
    """
    from dapt_merge.atomic import refuse_existing
    from dapt_merge.checkpoints import open_checkpoint
    from dapt_merge.cli.console import console, output, print_json, progress

    refuse_existing(out, overwrite)
    from dapt_merge.merging.extraction import extract_lora as extract

    opened = open_checkpoint(base), open_checkpoint(merged)
    with progress("extracting", "elements") as on_progress:
        found = extract(
            *opened, out, rank=rank, seed=seed, keep_whole=keep_whole, overwrite=overwrite, on_progress=on_progress
        )
    if json:
        print_json(found.to_dict())
        return
    if found.left_out:
        console.print(
            f"[yellow]warning:[/] {len(found.left_out)} tensors differ and are not in the adapter (embeddings, norms, "
            f"biases, heads); they hold {found.left_out_share:.1%} of the model's difference. --keep-whole stores them "
            "whole.",
            soft_wrap=True,
        )
    for line in _summary(found, out):
        output.print(line, soft_wrap=True, markup=False)


def _summary(found: Extraction, out: Path) -> list[str]:
    lines = ["layer  energy kept"]
    lines += [f"{'-' if layer is None else layer!s:>5}  {kept:.1%}" for layer, kept in found.by_layer().items()]
    size = f"{found.bytes_written / 1e6:.2f} MB in {found.seconds:.1f} s"
    kept = f"{found.kept_of_matrices:.1%} of their difference kept, {found.kept:.1%} of the whole model's"
    return [*lines, f"{out}: {len(found.matrices)} matrices of rank {found.rank}, {kept}; {size}"]
