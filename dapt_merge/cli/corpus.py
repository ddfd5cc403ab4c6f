"""`dapt-merge corpus`: texts to packed rows of tokens, and what became of every document."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

corpus = typer.Typer(
    help="Build the corpus of a DAPT run: cleaned, deduplicated, decontaminated, mixed in tokens, packed.",
    no_args_is_help=True,
)

_TRIAL_DOCUMENTS = 1000


@corpus.command()
def build(
    config: Path = typer.Argument(..., metavar="CONFIG.yaml", help="The corpus; see recipes/corpus-*.yaml."),
    overrides: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Overrides such as replay_share=0.05.", show_default=False
    ),
    out: Path = typer.Option(
        None, "--out", "-o", help="The folder to build [default: the config's 'output'].", show_default=False
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace another corpus in the folder."),
    trial: bool = typer.Option(
        False, "--trial", help=f"Show what happens to the first {_TRIAL_DOCUMENTS:,} documents of each source."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the manifest as JSON on stdout."),
) -> None:
    """Build a corpus and its manifest. `pretrain` does the same for its own corpus.

    The folder holds the rows in training order (train/, which datasets.load_from_disk opens), manifest.md,
    manifest.json, and removed.jsonl with every document that was left out.

    dapt-merge corpus build recipes/corpus-french-biomedical.yaml -o corpus/
    """
    import tempfile

    from rich.markup import escape

    from dapt_merge.cli.console import console
    from dapt_merge.corpus import build_corpus, load_corpus_config
    from dapt_merge.corpus.building import load_tokenizer
    from dapt_merge.corpus.config import required_output

    loaded = load_corpus_config(config, overrides or [])
    if out is not None:
        loaded = loaded.model_copy(update={"output": out})
    hooks: dict[str, Any] = {
        "on_progress": step_bars(),
        "on_note": lambda text: console.print(escape(text), soft_wrap=True),
    }
    tokenizer = load_tokenizer(loaded)
    if not trial:
        _show(build_corpus(loaded, tokenizer, required_output(loaded), overwrite=overwrite, **hooks), as_json)
        return
    with tempfile.TemporaryDirectory() as scratch:
        first = {"first_documents": _TRIAL_DOCUMENTS, "cache_folder": Path(scratch)}
        _show(build_corpus(loaded.model_copy(update=first), tokenizer, **hooks), as_json, page=True)


@corpus.command()
def show(
    folder: Path = typer.Argument(..., metavar="FOLDER", help="A built corpus."),
    as_json: bool = typer.Option(False, "--json", help="Print the manifest as JSON on stdout."),
) -> None:
    """Print a built corpus's manifest: what is in it, what is read, what was left out and changed.

    dapt-merge corpus show corpus/
    """
    from dapt_merge.corpus import open_corpus

    _show(open_corpus(folder), as_json, page=True)


def _show(built: Any, as_json: bool, page: bool = False) -> None:
    from rich.markdown import Markdown
    from rich.markup import escape

    from dapt_merge.cli.console import console, output, print_json

    if as_json:
        print_json(built.manifest)
    elif page:
        text = (built.folder / "manifest.md").read_text(encoding="utf-8")
        output.print(Markdown(text)) if output.is_terminal else print(text)
    else:
        console.print(f"{escape(str(built.folder / 'manifest.md'))} says what became of every document", soft_wrap=True)


def step_bars() -> Callable[[str, int, int], None]:
    """Draw one progress line a step: a bar where the total is known, a count where it is not."""
    from contextlib import ExitStack

    from dapt_merge.cli.console import console, progress

    bars = ExitStack()
    drawn: dict[str, Any] = {"step": None, "report": None}

    def report(step: str, done: int, total: int) -> None:
        if step != drawn["step"]:
            bars.close()
            drawn.update(step=step, report=None)
        if total and drawn["report"] is None:
            drawn["report"] = bars.enter_context(progress(step, "rows" if step == "packing" else "documents"))
        if drawn["report"] is not None:
            drawn["report"](done, total)
            if done >= total:
                bars.close()
                drawn["report"] = None
        elif done % 100_000 < 500 and done >= 100_000:
            console.print(f"{step}: {done:,} documents")

    return report
