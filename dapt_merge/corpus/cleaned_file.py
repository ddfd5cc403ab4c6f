"""Every document that cleaning kept, in one memory-mapped file, and what cleaning did to each source.

The sources are read in batches, cleaned by several processes and written in order; where boilerplate is looked for,
one pass before that counts their lines. Which of the cleaned documents go as well is `thinning`'s business: their texts
stay in the file and are only no longer pointed to.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dapt_merge.corpus.batches import cleaned_batches, documents_of
from dapt_merge.corpus.boilerplate import LineCounter
from dapt_merge.corpus.cleaning import EMPTY, CleanBatch, CleaningCounts, Treatment
from dapt_merge.corpus.config import CorpusDocuments
from dapt_merge.corpus.contamination import ContactsFound, ItemRuns
from dapt_merge.errors import InputError

OnProgress = Callable[[str, int, int], None]
DOCUMENTS = "documents.arrow"
REMOVED = "removed.jsonl"
_REPEATED, _ITEMS, _DIGESTS, _SIGNATURES = "repeated.npy", "items.npz", "digests", "signatures"


@dataclass
class SourceCounts:
    """What cleaning did to the documents of one source, and how many it left out for which reason."""

    cleaning: CleaningCounts = field(default_factory=CleaningCounts)
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Cleaned:
    """What cleaning made, beside the file of texts.

    Attributes:
        sources: of each document, the number of its source, int32 [documents].
        counts: of each source.
        contacts: the documents that hold text of items; None when no items are kept out.
        scratch: the folder with digests and signatures.
    """

    sources: np.ndarray
    counts: list[SourceCounts]
    contacts: ContactsFound | None
    scratch: Path

    def digests(self) -> np.ndarray:
        """Return a hash of each text, uint64 [documents]."""
        return np.fromfile(self.scratch / _DIGESTS, dtype=np.uint64)

    def signatures(self, permutations: int) -> np.ndarray:
        """Return the MinHash signatures of at least one document, memory-mapped, uint32 [documents, permutations]."""
        shape = (len(self.sources), permutations)
        return np.memmap(self.scratch / _SIGNATURES, dtype=np.uint32, mode="r", shape=shape)


class CleanedTexts:
    """Texts and places of all documents in the file, by row, memory-mapped."""

    def __init__(self, file: Path) -> None:
        import pyarrow

        with pyarrow.memory_map(str(file)) as source:
            self._batches = list(pyarrow.ipc.open_stream(source))
        self._starts = np.cumsum([0, *(len(batch) for batch in self._batches)])

    def text(self, row: int) -> str:
        """Return the text of a document."""
        return str(self._at(0, row))

    def place(self, row: int) -> str:
        """Return `file:line` of a document."""
        return str(self._at(1, row))

    def _at(self, column: int, row: int) -> Any:
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batches[batch].column(column)[row - int(self._starts[batch])].as_py()

    def characters(self) -> np.ndarray:
        """Return the number of characters of every text, int64."""
        import pyarrow.compute

        lengths = [pyarrow.compute.utf8_length(batch.column(0)).to_numpy() for batch in self._batches]
        return np.concatenate([*lengths, np.empty(0, dtype=np.int64)])


def write_cleaned(
    config: CorpusDocuments,
    runs: ItemRuns | None,
    folder: Path,
    scratch: Path,
    processes: int | None,
    on_progress: OnProgress,
) -> Cleaned:
    """Clean all documents into `documents.arrow`, and name in `removed.jsonl` those that were left out.

    Raises:
        InputError: an unusable source, or one without any text.
    """
    total = _count_lines(config, scratch, on_progress)
    treatment = _treatment(config, runs, scratch)
    counts = [SourceCounts() for _ in config.sources]
    contacts = None
    if config.decontaminate is not None and runs is not None:
        contacts = ContactsFound(runs, config.decontaminate.minimum_share)
    owners: list[np.ndarray] = []
    done = written = 0
    on_progress("cleaning", 0, total)
    with _CleanedWriter(folder, scratch) as writer:
        for number, batch in cleaned_batches(config, treatment, processes):
            counts[number].cleaning.merge(batch.counts)
            counts[number].left_out.update(left.reason for left in batch.left)
            if contacts is not None:
                contacts.add(batch.contacts, first_document=written)
            owners.append(np.full(len(batch.texts), number, dtype=np.int32))
            writer.write(batch, owners[-1], config.sources[number].title)
            done += batch.counts.read
            written += len(batch.texts)
            on_progress("cleaning", done, total)
    _refuse_empty(config, counts)
    return Cleaned(np.concatenate([*owners, np.empty(0, dtype=np.int32)]), counts, contacts, scratch)


def _count_lines(config: CorpusDocuments, scratch: Path, on_progress: OnProgress) -> int:
    """Find the boilerplate lines; return how many documents there are (0: not known, for nothing was counted)."""
    settings = config.clean.boilerplate if config.clean is not None else None
    if settings is None:
        return 0
    counter, done = LineCounter(scratch, settings), 0
    on_progress("counting lines", 0, 0)
    for source in config.sources:
        for document in documents_of(config, source):
            counter.add(document.text)
            done += 1
            if done % 10_000 == 0:
                on_progress("counting lines", done, 0)
    np.save(scratch / _REPEATED, counter.repeated())
    return done


def _treatment(config: CorpusDocuments, runs: ItemRuns | None, scratch: Path) -> Treatment:
    """Say what is done to the documents, with what processes load lying in the scratch folder."""
    clean = config.clean
    if runs is not None:
        runs.save(scratch / _ITEMS)
    return Treatment(
        clean,
        config.deduplicate.near if config.deduplicate is not None else None,
        scratch / _REPEATED if clean is not None and clean.boilerplate is not None else None,
        scratch / _ITEMS if runs is not None else None,
    )


def _refuse_empty(config: CorpusDocuments, counts: list[SourceCounts]) -> None:
    for source, found in zip(config.sources, counts, strict=True):
        if found.cleaning.read == found.left_out[EMPTY]:
            raise InputError(
                "this source of the corpus is empty: no document holds any text",
                where=source.place,
                remedy="Name a source that has text, or take this one out.",
            )


class _CleanedWriter:
    """Writes batches to the file of texts, their hashes and signatures, and the list of what was left out."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._folder, self._scratch = folder, scratch

    def __enter__(self) -> _CleanedWriter:
        import pyarrow

        self._schema = pyarrow.schema(
            {"text": pyarrow.large_string(), "place": pyarrow.string(), "source": pyarrow.int32()}
        )
        with ExitStack() as stack:
            self._removed = stack.enter_context((self._folder / REMOVED).open("w", encoding="utf-8"))
            self._digests = stack.enter_context((self._scratch / _DIGESTS).open("wb"))
            self._signatures = stack.enter_context((self._scratch / _SIGNATURES).open("wb"))
            stream = pyarrow.ipc.new_stream(str(self._folder / DOCUMENTS), self._schema)
            self._documents = stack.enter_context(stream)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *fault: Any) -> None:
        self._open.__exit__(*fault)

    def write(self, batch: CleanBatch, owners: np.ndarray, title: str) -> None:
        """Write a batch of the source with this title; `owners` holds its number for every kept document."""
        import pyarrow

        for left in batch.left:
            self._removed.write(removed_line(left.reason, f"{left.file}:{left.number}", title))
        places = [f"{file}:{line}" for file, line in batch.places]
        self._documents.write_batch(pyarrow.record_batch([batch.texts, places, owners], schema=self._schema))
        batch.digests.tofile(self._digests)
        if batch.signatures is not None:
            batch.signatures.tofile(self._signatures)


def removed_line(reason: str, place: str, source: str) -> str:
    """Return the line of `removed.jsonl` that names a document that was left out."""
    return json.dumps({"document": place, "source": source, "reason": reason}, ensure_ascii=False) + "\n"
