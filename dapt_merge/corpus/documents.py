"""The documents of a corpus as they are trained on, in one memory-mapped file, and what became of all the others.

The sources are read once in batches, cleaned by several processes, written in order, and then thinned: contaminated
documents go first, exact copies next, near copies last. The texts that go stay in the file and are only no longer
pointed to. A folder made here is found again by what decides it: the sources' content and every option of a step.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dapt_merge.atomic import atomic_folder
from dapt_merge.corpus.boilerplate import LineCounter
from dapt_merge.corpus.characters import shown_character
from dapt_merge.corpus.cleaning import CleanBatch, CleaningCounts, Treatment, clean_batch, prepare_process
from dapt_merge.corpus.config import Boilerplate, CorpusDocuments, CorpusSource
from dapt_merge.corpus.contamination import Contact, ItemRuns, item_runs
from dapt_merge.corpus.duplicates import Pair, exact_duplicates, near_duplicates
from dapt_merge.corpus.filters import known_languages
from dapt_merge.corpus.parallel import ordered_map, usable_cores
from dapt_merge.corpus.reading import Document, content_fingerprint, read_source
from dapt_merge.errors import InputError

OnProgress = Callable[[str, int, int], None]
REMOVED = "removed.jsonl"
CONTACTS = "contamination.jsonl"
_FORMAT = "3"
_DOCUMENTS_AT_ONCE = 500
_CHARACTERS_AT_ONCE = 2_000_000
# Below this many documents starting processes costs more than it saves.
_WORTH_PROCESSES = 3000
_SAMPLE_PAIRS = 5
_REPORTED_CONTACTS = 1000
_SAMPLE_CHARACTERS = 160


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

        return Dataset.from_file(str(self.folder / "documents.arrow")).select(self.kept)


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
            _Making(config, runs, temporary, Path(scratch), processes, on_progress or (lambda *_: None)).make()
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


@dataclass
class _Tally:
    """What happened to the documents of one source."""

    counts: CleaningCounts = field(default_factory=CleaningCounts)
    left: Counter[str] = field(default_factory=Counter)


class _Making:
    """One making of a store; its steps in order are the methods."""

    def __init__(
        self,
        config: CorpusDocuments,
        runs: ItemRuns | None,
        folder: Path,
        scratch: Path,
        processes: int | None,
        on_progress: OnProgress,
    ) -> None:
        self._config, self._runs, self._folder, self._scratch = config, runs, folder, scratch
        self._processes, self._progress = processes, on_progress
        self._tallies = [_Tally() for _ in config.sources]
        self._contacts: dict[int, Contact] = {}
        self._largest_shares: dict[str, float] = {}
        self._near = config.deduplicate.near if config.deduplicate is not None else None

    def make(self) -> None:
        """Write everything that a store holds."""
        total = self._count_lines()
        sources = self._write_cleaned(total)
        texts = _Texts(self._folder / "documents.arrow")
        gone: dict[int, str] = {}
        contamination = self._decontaminate(gone, sources, texts)
        duplication = self._deduplicate(gone, sources, texts)
        kept = np.setdiff1d(np.arange(len(sources)), np.fromiter(gone, dtype=np.int64, count=len(gone)))
        self._write_removed(gone, sources, texts)
        np.save(self._folder / "kept.npy", kept)
        np.save(self._folder / "sources.npy", sources[kept])
        self._refuse_nothing_left(sources[kept])
        report = {
            "sources": self._source_rows(kept, sources, texts),
            "contamination": contamination,
            "duplication": duplication,
        }
        (self._folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")

    def _count_lines(self) -> int:
        """Find the boilerplate lines; return how many documents there are (0: not known, for nothing was counted)."""
        settings = self._boilerplate
        if settings is None:
            return 0
        counter, done = LineCounter(self._scratch, settings), 0
        for source in self._config.sources:
            for document in self._read(source):
                counter.add(document.text)
                done += 1
                if done % 10_000 == 0:
                    self._progress("counting lines", done, 0)
        np.save(self._scratch / "repeated.npy", counter.repeated())
        return done

    def _read(self, source: CorpusSource) -> Iterator[Document]:
        return islice(read_source(source), self._config.first_documents)

    @property
    def _boilerplate(self) -> Boilerplate | None:
        return self._config.clean.boilerplate if self._config.clean is not None else None

    def _write_cleaned(self, total: int) -> np.ndarray:
        """Clean all documents into `documents.arrow`; return the number of each one's source."""
        import pyarrow

        treatment = Treatment(
            self._config.clean,
            self._near,
            self._scratch / "repeated.npy" if self._boilerplate is not None else None,
            self._scratch / "items.npz" if self._runs is not None else None,
        )
        if self._runs is not None and treatment.item_runs is not None:
            self._runs.save(treatment.item_runs)
        schema = pyarrow.schema({"text": pyarrow.large_string(), "place": pyarrow.string(), "source": pyarrow.int32()})
        numbers: list[np.ndarray] = []
        done = written = 0
        with ExitStack() as stack:
            removed = stack.enter_context((self._folder / REMOVED).open("w", encoding="utf-8"))
            digests = stack.enter_context((self._scratch / "digests").open("wb"))
            signatures = stack.enter_context((self._scratch / "signatures").open("wb"))
            writer = stack.enter_context(pyarrow.ipc.new_stream(str(self._folder / "documents.arrow"), schema))
            for number, batch in self._cleaned_batches(treatment):
                self._take(number, batch, written)
                for left in batch.left:
                    removed.write(_line(left.reason, f"{left.file}:{left.number}", self._title(number)))
                owner = np.full(len(batch.texts), number, dtype=np.int32)
                places = [f"{file}:{line}" for file, line in batch.places]
                writer.write_batch(pyarrow.record_batch([batch.texts, places, owner], schema=schema))
                batch.digests.tofile(digests)
                if batch.signatures is not None:
                    batch.signatures.tofile(signatures)
                numbers.append(owner)
                done += batch.counts.read
                written += len(batch.texts)
                self._progress("cleaning", done, total)
        for number, source in enumerate(self._config.sources):
            self._refuse_empty(number, source)
        return np.concatenate([*numbers, np.empty(0, dtype=np.int32)])

    def _take(self, number: int, batch: CleanBatch, first_row: int) -> None:
        tally = self._tallies[number]
        tally.counts.merge(batch.counts)
        tally.left.update(left.reason for left in batch.left)
        if self._config.decontaminate is None or self._runs is None:
            return
        least = self._config.decontaminate.minimum_share
        for place, contact in batch.contacts.items():
            for owner, share in contact.shares.items():
                task = self._runs.items[owner].task
                self._largest_shares[task] = max(self._largest_shares.get(task, 0.0), share)
            enough = {owner: share for owner, share in contact.shares.items() if share >= least}
            if enough:
                self._contacts[first_row + place] = contact._replace(shares=enough)

    def _cleaned_batches(self, treatment: Treatment) -> Iterator[tuple[int, CleanBatch]]:
        numbers: list[int] = []

        def batches() -> Iterator[tuple[str | None, list[Document]]]:
            for number, source in enumerate(self._config.sources):
                for batch in _batches(self._read(source)):
                    numbers.append(number)
                    yield source.language, batch

        stream = batches()
        first: list[Any] = []
        held = 0
        for batch in stream:
            first.append(batch)
            held += len(batch[1])
            if held >= _WORTH_PROCESSES:
                break
        processes = (self._processes or usable_cores()) if held >= _WORTH_PROCESSES else 1

        def all_batches() -> Iterator[tuple[str | None, list[Document]]]:
            yield from first
            first.clear()
            yield from stream

        cleaned = ordered_map(clean_batch, all_batches(), processes, prepare_process, (treatment,))
        for place, result in enumerate(cleaned):
            yield numbers[place], result

    def _refuse_empty(self, number: int, source: CorpusSource) -> None:
        tally = self._tallies[number]
        if tally.counts.read == tally.left["empty"]:
            raise InputError(
                "the corpus is empty: no document holds any text", where=source.place, remedy="Give one that does."
            )

    def _refuse_nothing_left(self, kept: np.ndarray) -> None:
        for number, source in enumerate(self._config.sources):
            if not np.any(kept == number):
                most = ", ".join(f"{reason} ({count:,})" for reason, count in self._tallies[number].left.most_common(3))
                raise InputError(
                    f"no document of this source is left after the filters: {most}",
                    where=source.place,
                    remedy="Widen the bounds under 'clean', or leave the source out.",
                )

    def _decontaminate(self, gone: dict[int, str], sources: np.ndarray, texts: _Texts) -> dict[str, Any] | None:
        if self._runs is None or self._config.decontaminate is None:
            return None
        remove = self._config.decontaminate.action == "remove"
        rows: list[dict[str, Any]] = []
        for document, contact in self._contacts.items():
            items = {self._runs.items[owner]: share for owner, share in contact.shares.items()}
            rows.append(
                {
                    "document": texts.place(document),
                    "source": self._title(int(sources[document])),
                    "words": contact.words,
                    "items": [[item.task, item.item, round(share, 4)] for item, share in items.items()],
                }
            )
            if remove:
                self._leave(document, sources, gone, f"contaminated: {', '.join(sorted({i.task for i in items}))}")
        with (self._folder / CONTACTS).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        rows.sort(key=lambda row: -max(share for _, _, share in row["items"]))
        return {
            "removed": remove,
            "tasks": self._task_rows(),
            "found": len(rows),
            "documents": rows[:_REPORTED_CONTACTS],
        }

    def _task_rows(self) -> list[dict[str, Any]]:
        """Return, for each task, how many of its items were looked for, found, and in how many documents."""
        assert self._runs is not None
        total = Counter(item.task for item in self._runs.items)
        found: dict[str, set[int]] = {task: set() for task in total}
        documents: Counter[str] = Counter()
        for contact in self._contacts.values():
            documents.update({self._runs.items[owner].task for owner in contact.shares})
            for owner in contact.shares:
                found[self._runs.items[owner].task].add(owner)
        return [
            {
                "task": task,
                "version": self._runs.versions.get(task, ""),
                "items": count,
                "items_too_short_to_look_for": self._runs.unchecked.get(task, 0),
                "items_found": len(found[task]),
                "documents": documents[task],
                "largest_share_of_an_item": round(self._largest_shares.get(task, 0.0), 4),
            }
            for task, count in sorted(total.items())
        ]

    def _deduplicate(self, gone: dict[int, str], sources: np.ndarray, texts: _Texts) -> dict[str, Any] | None:
        settings = self._config.deduplicate
        if settings is None:
            return None
        report: dict[str, Any] = {}
        if settings.exact:
            digests = np.fromfile(self._scratch / "digests", dtype=np.uint64)
            rows = np.setdiff1d(np.arange(len(digests)), list(gone))
            pairs = [
                Pair(int(rows[p.document]), int(rows[p.kept]), 1.0)
                for p in exact_duplicates(digests[rows], lambda row: texts.text(int(rows[row])))
            ]
            report["exact"] = self._pair_rows("exact copy", pairs, sources, texts, gone)
        if settings.near is not None and len(sources):
            shape = (len(sources), settings.near.permutations)
            signatures = np.memmap(self._scratch / "signatures", dtype=np.uint32, mode="r", shape=shape)
            rows = np.setdiff1d(np.arange(len(sources)), list(gone))
            pairs = near_duplicates(
                signatures,
                rows,
                settings.near,
                texts.text,
                lambda done, total: self._progress("comparing", done, total),
            )
            report["near"] = self._pair_rows("near copy", pairs, sources, texts, gone)
        return report

    def _pair_rows(
        self, reason: str, pairs: Sequence[Pair], sources: np.ndarray, texts: _Texts, gone: dict[int, str]
    ) -> dict[str, Any]:
        """Leave out the documents of the pairs; return their counts by source, and samples over the range."""
        counts: Counter[tuple[str, str]] = Counter()
        for pair in pairs:
            similarity = "" if pair.similarity == 1.0 else f" (similarity {pair.similarity:.2f})"
            self._leave(pair.document, sources, gone, reason, f"of {texts.place(pair.kept)}{similarity}")
            counts[self._title(int(sources[pair.document])), self._title(int(sources[pair.kept]))] += 1
        spread = sorted(pairs, key=lambda pair: pair.similarity)
        chosen = spread[:: max(1, -(-len(spread) // _SAMPLE_PAIRS))]
        return {
            "documents": len(pairs),
            "between": [
                {"left_out_of": one, "kept_in": other, "documents": n} for (one, other), n in counts.most_common()
            ],
            "samples": [
                {
                    "similarity": round(pair.similarity, 3),
                    "left_out": {"document": texts.place(pair.document), "text": _excerpt(texts.text(pair.document))},
                    "kept": {"document": texts.place(pair.kept), "text": _excerpt(texts.text(pair.kept))},
                }
                for pair in chosen
            ],
        }

    def _leave(self, row: int, sources: np.ndarray, gone: dict[int, str], reason: str, more: str = "") -> None:
        gone[row] = f"{reason} {more}".strip()
        self._tallies[int(sources[row])].left[reason.split(":")[0] if "contaminated" in reason else reason] += 1

    def _write_removed(self, gone: dict[int, str], sources: np.ndarray, texts: _Texts) -> None:
        with (self._folder / REMOVED).open("a", encoding="utf-8") as removed:
            for row in sorted(gone):
                removed.write(_line(gone[row], texts.place(row), self._title(int(sources[row]))))

    def _title(self, number: int) -> str:
        return self._config.sources[number].title

    def _source_rows(self, kept: np.ndarray, sources: np.ndarray, texts: _Texts) -> list[dict[str, Any]]:
        documents = np.bincount(sources[kept], minlength=len(self._tallies))
        characters = np.bincount(sources[kept], texts.characters()[kept], minlength=len(self._tallies))
        return [
            {
                "documents_read": tally.counts.read,
                "characters_read": tally.counts.read_characters,
                "documents_kept": int(documents[number]),
                "characters_kept": int(characters[number]),
                "left_out": dict(tally.left.most_common()),
                "cleaning": _cleaning_row(tally.counts) if self._config.clean is not None else None,
                "lone_surrogates_replaced": tally.counts.lone_surrogates,
            }
            for number, tally in enumerate(self._tallies)
        ]


def _cleaning_row(counts: CleaningCounts) -> dict[str, Any]:
    return {
        "unicode": {
            "documents_changed": counts.unicode.changed_documents,
            "characters_lost": counts.unicode.by_class(),
            "characters_gained": _shown(counts.unicode.gained),
        },
        "whitespace": {
            "documents_changed": counts.whitespace.changed_documents,
            "characters_lost": counts.whitespace.by_class(),
            "characters_gained": _shown(counts.whitespace.gained),
        },
        "boilerplate": {
            "documents_changed": counts.boilerplate_documents,
            "lines_lost": counts.boilerplate_lines_lost,
            "lines": dict(counts.boilerplate_lines.most_common(20)),
        },
    }


def _shown(characters: Counter[str]) -> dict[str, int]:
    return {shown_character(character): count for character, count in characters.most_common(12)}


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= _DOCUMENTS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _line(reason: str, place: str, source: str) -> str:
    return json.dumps({"document": place, "source": source, "reason": reason}, ensure_ascii=False) + "\n"


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SAMPLE_CHARACTERS else text[: _SAMPLE_CHARACTERS - 1] + "…"


class _Texts:
    """Texts and places of all documents in a file, by row, memory-mapped."""

    def __init__(self, file: Path) -> None:
        import pyarrow

        with pyarrow.memory_map(str(file)) as source:
            self._batches = list(pyarrow.ipc.open_stream(source))
        self._starts = np.cumsum([0, *(len(batch) for batch in self._batches)])

    def text(self, row: int) -> str:
        return str(self._at(0, row))

    def place(self, row: int) -> str:
        return str(self._at(1, row))

    def _at(self, column: int, row: int) -> Any:
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batches[batch].column(column)[row - int(self._starts[batch])].as_py()

    def characters(self) -> np.ndarray:
        """Return the number of characters of every text, int64."""
        import pyarrow.compute

        lengths = [pyarrow.compute.utf8_length(batch.column(0)).to_numpy() for batch in self._batches]
        return np.concatenate([*lengths, np.empty(0, dtype=np.int64)])
