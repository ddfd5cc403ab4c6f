"""A corpus from its sources to packed rows: the story, with the work done elsewhere.

Read, clean, deduplicate, decontaminate, tokenise, mix, pack, and say in a manifest what became of every document.
What is long is kept under a fingerprint of all that decides it (texts, steps, tokenizer), so that a second build that
differs in the budget only packs again. Training is not known here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from dapt_merge.atomic import atomic_folder, refuse_existing
from dapt_merge.corpus.built import MANIFEST, TRAIN, BuiltCorpus, open_corpus
from dapt_merge.corpus.cleaned_file import REMOVED
from dapt_merge.corpus.config import CorpusConfig
from dapt_merge.corpus.documents import (
    CONTACTS,
    DocumentStore,
    documents_fingerprint,
    load_item_runs,
    store_documents,
)
from dapt_merge.corpus.manifest import corpus_manifest, notes_on
from dapt_merge.corpus.manifest_page import manifest_in_markdown
from dapt_merge.corpus.mixing import Mix, resolve_mix
from dapt_merge.corpus.packing import lay_out, write_rows
from dapt_merge.corpus.reading import content_fingerprint
from dapt_merge.corpus.tokens import TokenStore, require_separator, store_tokens, tokenizer_fingerprint
from dapt_merge.errors import InputError

OnProgress = Callable[[str, int, int], None]
_FORMAT = "1"
_BUDGET = ("replay_share", "sequence_length", "attention", "tokens", "epochs", "seed")


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
    require_separator(tokenizer)
    cache = _cache_folder(config)
    note = on_note or (lambda text: None)
    if out is not None and not overwrite:
        found = _same_corpus(out, config, tokenizer, rows_multiple)
        if found is not None:
            note(f"the corpus in {out} is complete; nothing to do")
            return found
    progress = {"processes": config.processes, "on_progress": on_progress}
    documents = store_documents(config.documents, cache, **progress)  # type: ignore[arg-type]
    tokens = store_tokens(documents, tokenizer, cache, **progress)  # type: ignore[arg-type]
    mix = resolve_mix(config, _held(tokens, len(config.sources)), rows_multiple)
    fingerprint = _fingerprint(config, documents.fingerprint, tokenizer, rows_multiple)
    folder = out or cache / f"rows-{_with_labels(fingerprint, config)}"
    if out is not None or not (folder / MANIFEST).is_file():
        with atomic_folder(folder, overwrite=overwrite or out is None) as temporary:
            _write(config, documents, tokens, mix, tokenizer, fingerprint, temporary, on_progress)
    built = open_corpus(folder)
    for line in notes_on(built.manifest):
        note(line)
    return built


def corpus_fingerprint(config: CorpusConfig, tokenizer: Any, *, rows_multiple: int = 1) -> str:
    """Return the fingerprint that the built corpus will have, by reading (not cleaning) the sources' files.

    Raises:
        InputError: an unusable source or suite.
    """
    contents = [content_fingerprint(source) for source in config.sources]
    documents = documents_fingerprint(config.documents, load_item_runs(config.documents), contents)
    return _fingerprint(config, documents, tokenizer, rows_multiple)


def _cache_folder(config: CorpusConfig) -> Path:
    if config.cache_folder is not None:
        return config.cache_folder.expanduser()
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "dapt-merge"


def _held(tokens: TokenStore, sources: int) -> list[int]:
    return [int(tokens.lengths[tokens.sources == number].sum()) for number in range(sources)]


def _fingerprint(config: CorpusConfig, documents: str, tokenizer: Any, rows_multiple: int) -> str:
    key = {
        "format": _FORMAT,
        "documents": documents,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "sources": [[source.role, source.weight, source.share] for source in config.sources],
        "rows_multiple": rows_multiple,
        **{name: getattr(config, name) for name in _BUDGET},
    }
    return f"xxh3:{xxhash.xxh3_128_hexdigest(json.dumps(key, sort_keys=True).encode())}"


def _with_labels(fingerprint: str, config: CorpusConfig) -> str:
    """Name rows by their content and by what the manifest says of the sources, which may change without them."""
    labels = [[source.title, source.licence, source.language, source.place] for source in config.sources]
    return xxhash.xxh3_128_hexdigest(f"{fingerprint}{json.dumps(labels)}".encode())


def _same_corpus(out: Path, config: CorpusConfig, tokenizer: Any, rows_multiple: int) -> BuiltCorpus | None:
    """Open what is in `out` if it is this corpus; refuse anything else there."""
    if not (out / MANIFEST).is_file():
        refuse_existing(out, overwrite=False)
        return None
    found = open_corpus(out)
    if found.fingerprint != corpus_fingerprint(config, tokenizer, rows_multiple=rows_multiple):
        raise InputError(
            "the output holds another corpus (other texts, steps, tokenizer or budget)",
            where=out,
            remedy="Choose another folder, or pass --overwrite to replace it.",
        )
    return found


def _write(
    config: CorpusConfig,
    documents: DocumentStore,
    tokens: TokenStore,
    mix: Mix,
    tokenizer: Any,
    fingerprint: str,
    folder: Path,
    on_progress: OnProgress | None,
) -> None:
    (folder / TRAIN).mkdir()
    counts = write_rows(
        lay_out(config, tokens, mix),
        tokens,
        folder / TRAIN,
        sequence_length=config.sequence_length,
        fingerprint=fingerprint,
        on_progress=on_progress,
    )
    manifest = corpus_manifest(config, documents, tokens, mix, counts, tokenizer, fingerprint)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "manifest.md").write_text(manifest_in_markdown(manifest), encoding="utf-8")
    for name in (REMOVED, CONTACTS):
        if name == REMOVED or (manifest["contamination"] and manifest["contamination"]["found"]):
            shutil.copyfile(documents.folder / name, folder / name)


def load_tokenizer(config: CorpusConfig) -> Any:
    """Load the tokenizer that a corpus names.

    Raises:
        InputError: it names none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if config.tokenizer is None:
        raise InputError(
            "the corpus names no tokenizer",
            where="tokenizer",
            remedy="Set 'tokenizer' to the folder or hub id of the base model.",
        )
    folder = Path(config.tokenizer).expanduser()
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("*vocab*")):
        raise InputError(
            "the folder holds no tokenizer (such as tokenizer.json)",
            where=folder,
            remedy="Name the folder of the base model, with its tokenizer's files.",
        )
    try:
        return AutoTokenizer.from_pretrained(config.tokenizer)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"the tokenizer cannot be loaded ({str(error).strip().splitlines()[0]})",
            where=config.tokenizer,
            remedy="Name the folder or hub id of the base model; offline, a folder or a model in the cache.",
        ) from None
