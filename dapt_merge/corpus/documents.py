"""The documents of a corpus as they are trained on, in one memory-mapped file, and what became of all the others.

Made in two steps: the sources are cleaned into one file (`cleaned_file`), then thinned (`thinning`); what became of the
documents is told in rows (`documents_report`). A folder made here is found again by what decides it: the sources'
content and every option of a step.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dapt_merge.atomic import atomic_folder
from dapt_merge.corpus.cleaned_file import (
    DOCUMENTS,
    REMOVED,
    Cleaned,
    CleanedTexts,
    OnProgress,
    removed_line,
    write_cleaned,
)
from dapt_merge.corpus.config import CorpusDocuments, CorpusSource
from dapt_merge.corpus.contamination import ItemRuns, item_runs
from dapt_merge.corpus.documents_report import contact_rows, documents_report
from dapt_merge.corpus.languages import known_languages
from dapt_merge.corpus.reading import content_fingerprint
from dapt_merge.corpus.thinning import Thinned, left_out, thin
from dapt_merge.errors import InputError

CONTACTS = "contamination.jsonl"
_FORMAT = "3"


@dataclass(frozen=True)
class DocumentStore:
    """The documents of a corpus, memory-mapped.

    Attributes:
        folder: where they are; `removed.jsonl` there names every document that is not among them, and why.
        fingerprint: of the sources' content and of all steps.
        kept: the rows of the documents to train on, ascending, int64 [documents].
        sources: of each of these, the number of its source, int32 [documents].
        report: what became of the documents, source by source and step by step.
    """

    folder: Path
    fingerprint: str
    kept: np.ndarray
    sources: np.ndarray
    report: dict[str, Any]

    def rows(self) -> Any:
        """Return the kept documents as a memory-mapped `datasets.Dataset` with `text`, `place` and `source`."""
        from datasets import Dataset

        return Dataset.from_file(str(self.folder / DOCUMENTS)).select(self.kept)


def documents_fingerprint(config: CorpusDocuments, runs: ItemRuns | None, contents: Sequence[str]) -> str:
    """Return `"xxh3:…"` of everything that decides the documents.

    Args:
        config: the sources and steps.
        runs: of the items to keep out, or None.
        contents: `content_fingerprint` of each source.
    """
    steps = config.model_dump(mode="json", include={"clean", "deduplicate"})
    told = config.clean is not None and config.clean.language is not None
    key: dict[str, Any] = {
        "format": _FORMAT,
        "steps": steps,
        "first_documents": config.first_documents,
        "sources": [[c, s.language if told else None] for c, s in zip(contents, config.sources, strict=True)],
        "items": None,
    }
    if config.decontaminate is not None and runs is not None:
        options = config.decontaminate.model_dump(mode="json", exclude={"suites"})
        key["items"] = [options, sorted(runs.versions.items())]
    return f"xxh3:{xxhash.xxh3_128_hexdigest(json.dumps(key, sort_keys=True).encode())}"


def load_item_runs(config: CorpusDocuments) -> ItemRuns | None:
    """Return the runs of words of the items to keep out, or None when none are."""
    return item_runs(config.decontaminate) if config.decontaminate is not None else None


def store_documents(
    config: CorpusDocuments, cache_folder: Path, *, processes: int | None = None, on_progress: OnProgress | None = None
) -> DocumentStore:
    """Make the documents of a corpus, or open those made before.

    Raises:
        InputError: an unusable source or suite; a source without any text; nothing is left after the filters.
    """
    runs = load_item_runs(config)
    if config.clean is not None and config.clean.language is not None:
        for source in config.sources:
            _refuse_untellable_language(source)
    contents = [content_fingerprint(source) for source in config.sources]
    fingerprint = documents_fingerprint(config, runs, contents)
    # The report calls sources by their titles and places, which do not change the documents.
    labels = json.dumps([[source.title, source.place] for source in config.sources])
    folder = cache_folder / f"documents-{xxhash.xxh3_128_hexdigest(f'{fingerprint}{labels}'.encode())}"
    if not (folder / "report.json").is_file():
        with atomic_folder(folder, overwrite=True) as temporary, tempfile.TemporaryDirectory(dir=temporary) as scratch:
            _make(config, runs, temporary, Path(scratch), processes, on_progress or (lambda *_: None))
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for row, content in zip(report["sources"], contents, strict=True):
        row["content"] = content
    kept = np.load(folder / "kept.npy", mmap_mode="r")
    return DocumentStore(folder, fingerprint, kept, np.load(folder / "sources.npy", mmap_mode="r"), report)


def _refuse_untellable_language(source: CorpusSource) -> None:
    if source.language is not None and source.language not in known_languages():
        raise InputError(
            f"the language filter cannot tell '{source.language}'",
            where=source.place,
            remedy=f"Give one of {', '.join(known_languages())}; or set clean.language to false.",
        )


def _make(
    config: CorpusDocuments,
    runs: ItemRuns | None,
    folder: Path,
    scratch: Path,
    processes: int | None,
    on_progress: OnProgress,
) -> None:
    """Write everything that a store holds."""
    cleaned = write_cleaned(config, runs, folder, scratch, processes, on_progress)
    texts = CleanedTexts(folder / DOCUMENTS)
    thinned = thin(config, cleaned, texts, on_progress)
    reasons = left_out(cleaned, thinned)
    sources = cleaned.sources[thinned.kept]
    _refuse_nothing_left(config, sources, reasons)
    np.save(folder / "kept.npy", thinned.kept)
    np.save(folder / "sources.npy", sources)
    _name_removed(config, cleaned, thinned, texts, folder / REMOVED)
    contacts = contact_rows(config, cleaned, texts)
    if cleaned.contacts is not None:
        with (folder / CONTACTS).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in contacts)
    report = documents_report(config, cleaned, thinned, reasons, contacts, texts)
    (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")


def _name_removed(config: CorpusDocuments, cleaned: Cleaned, thinned: Thinned, texts: CleanedTexts, file: Path) -> None:
    """Add the documents that thinning left out to those that cleaning did."""
    with file.open("a", encoding="utf-8") as removed:
        for document, removal in sorted(thinned.removed.items()):
            title = config.sources[int(cleaned.sources[document])].title
            removed.write(removed_line(removal.reason, texts.place(document), title))


def _refuse_nothing_left(config: CorpusDocuments, kept: np.ndarray, reasons: Sequence[Counter[str]]) -> None:
    for number, source in enumerate(config.sources):
        if not np.any(kept == number):
            most = ", ".join(f"{reason} ({count:,})" for reason, count in reasons[number].most_common(3))
            raise InputError(
                f"no document of this source is left after the filters: {most}",
                where=source.place,
                remedy="Widen the bounds under 'clean', or leave the source out.",
            )
