"""`dapt-merge statistics`: what a model makes of held-out text, for merges that weigh models by it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def statistics(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    corpus: Annotated[Path, typer.Option(help="Held-out text: .jsonl or .txt, or a folder of them.")],
    kind: Annotated[str, typer.Option(help="fisher (for fisher merges) or gram (for regmean).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write.")],
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to read.")] = 100_000,
    sequence_length: Annotated[int, typer.Option(min=2, help="Longer documents are read in parts.")] = 1024,
    text_field: Annotated[str, typer.Option(help="Field of a JSON line that holds the text.")] = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Collect Fisher information or Gram matrices of a model on held-out text.

    dapt-merge statistics MODEL --corpus heldout.jsonl --tokens 100000 --kind fisher -o model-fisher.safetensors
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

    from dapt_merge.pretraining.config import CorpusSource
    from dapt_merge.statistics.collecting import collect_statistics
    from dapt_merge.statistics.files import write_statistics

    source = CorpusSource(path=corpus, text_field=text_field)
    with progress(f"{kind} of {model}", "tokens") as on_progress:
        found = collect_statistics(
            model, source, kind, tokens, sequence_length=sequence_length, on_progress=on_progress
        )
    write_statistics(found.tensors, found.about, out, overwrite=overwrite)
    if found.tokens < tokens // 2:
        console.print(f"[yellow]warning:[/] the corpus has only {found.tokens:,} of the {tokens:,} tokens asked for")
    if json:
        print_json({"out": str(out), "tensors": len(found.tensors), **found.about})
    else:
        output.print(f"{out}: {kind} of {len(found.tensors):,} tensors from {found.tokens:,} tokens", soft_wrap=True)
