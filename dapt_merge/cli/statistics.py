"""`dapt-merge statistics`: what a model makes of held-out text, for merges that weigh models by it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer


def statistics(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    corpus: Annotated[Path, typer.Option(help="Held-out text: .jsonl or .txt, or a folder of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write.")],
    kind: Annotated[str, typer.Option(help="fisher (for fisher merges) or gram (for regmean).")] = "fisher",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to read.")] = 100_000,
    sequence_length: Annotated[int, typer.Option(min=2, help="Longer documents are read in parts.")] = 1024,
    text_field: Annotated[str, typer.Option(help="Field of a JSON line that holds the text.")] = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Collect Fisher information or Gram matrices of a model on held-out text.

    Fisher information is as large as the model in float32; Gram matrices are inputs × inputs for each input of linear
    layers (0.4 GB for a 135M model, 33 GB for 8B). A pass that was cut off goes on from where it kept its sums.

    dapt-merge statistics MODEL --corpus heldout.jsonl --tokens 100000 -o model-fisher.safetensors
    """
    from dapt_merge.atomic import refuse_existing
    from dapt_merge.cli.console import console, output, print_json, progress
    from dapt_merge.errors import InputError

    refuse_existing(out, overwrite)
    if out.suffix != ".safetensors":
        raise InputError(
            f"the output is a safetensors file, and '{out.name}' does not say so",
            where=out,
            remedy=f"Name it {out.stem}.safetensors.",
        )

    from dapt_merge.corpus.config import CorpusSource
    from dapt_merge.statistics.collecting import collect_statistics
    from dapt_merge.statistics.files import write_statistics

    source = CorpusSource(path=corpus, text_field=text_field)
    unfinished = out.with_name(f".{out.name}.unfinished")

    def check_size(numbers: int, memory: int) -> None:
        console.print(
            f"{kind}: {numbers / 1e9:.2f} GB to write, {memory / 1e9:.2f} GB of memory beside the activations"
        )
        room = shutil.disk_usage(next(parent for parent in out.absolute().parents if parent.exists())).free
        if room < 2 * numbers:
            raise InputError(
                f"{2 * numbers / 1e9:.2f} GB are needed (the sums on the way count too), {room / 1e9:.2f} GB are free",
                where=out,
                remedy="Free space there, or write to another disk.",
            )

    with progress(f"{kind} of {model}", "tokens") as on_progress:
        found = collect_statistics(
            model,
            source,
            kind,
            tokens,
            sequence_length=sequence_length,
            keep=unfinished,
            on_size=check_size,
            on_progress=on_progress,
        )
    write_statistics(found.tensors, found.about, out, overwrite=overwrite)
    unfinished.unlink(missing_ok=True)
    if found.tokens < tokens // 2:
        console.print(f"[yellow]warning:[/] the corpus has only {found.tokens:,} of the {tokens:,} tokens asked for")
    if json:
        print_json({"out": str(out), "tensors": len(found.tensors), **found.about})
    else:
        output.print(f"{out}: {kind} of {len(found.tensors):,} tensors from {found.tokens:,} tokens", soft_wrap=True)
