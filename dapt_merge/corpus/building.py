"""A corpus from its sources to packed rows: the story, with the work done elsewhere.

Read, clean, deduplicate, decontaminate, tokenise, mix, pack, and say in a manifest what became of every document.
What is long is kept under a fingerprint of all that decides it (texts, steps, tokenizer), so that a second build that
differs in the budget only packs again. Training is not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dapt_merge.corpus.built import BuiltCorpus
from dapt_merge.corpus.config import CorpusConfig

OnProgress = Callable[[str, int, int], None]


def build_corpus(
    config: CorpusConfig,
    tokenizer: Any,
    out: Path | None = None,
    *,
    rows_multiple: int = 1,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> BuiltCorpus:
    """Build a corpus, or open it when the same was built before.

    Args:
        config: the corpus; its `output` and `tokenizer` are for the command line and not read here.
        tokenizer: a `transformers` tokenizer; its end-of-sequence token ends every document.
        out: the folder to build; None keeps the rows in the cache folder, under their fingerprint.
        rows_multiple: rows are rounded up to a multiple of this (the sequences of an optimizer step).
        overwrite: replace what is in `out`.
        on_progress: called with (step, done, total); the total is 0 while it is not known.
        on_note: called with sentences that the user should see.

    Raises:
        InputError: an unusable source, suite or tokenizer; nothing is left after the filters; `out` exists.
    """
    raise NotImplementedError


def corpus_fingerprint(config: CorpusConfig, tokenizer: Any, *, rows_multiple: int = 1) -> str:
    """Return the fingerprint that the built corpus will have, by reading (not cleaning) the sources' files."""
    raise NotImplementedError
