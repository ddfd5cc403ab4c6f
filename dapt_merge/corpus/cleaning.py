"""Documents as they were read to documents as they are kept: each step counts what it changed and what it left out.

In this order: boilerplate lines go, Unicode is repaired, whitespace tidied, then the filters of quality and language
look at what is there. Beside its text every kept document gets a hash of it and a MinHash signature, for `duplicates`,
and is looked up among the runs of words of the items that will judge the model (`contamination`).
A batch of documents goes in, a batch comes out; the counts add up over batches and processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from dapt_merge.corpus.boilerplate import without_boilerplate
from dapt_merge.corpus.characters import (
    CharacterLosses,
    lone_surrogates_replaced,
    repair_unicode,
    tidy_whitespace,
)
from dapt_merge.corpus.config import Clean, NearDuplicates
from dapt_merge.corpus.contamination import Contact, Detector
from dapt_merge.corpus.filters import language_fault, quality_fault
from dapt_merge.corpus.records import Document
from dapt_merge.corpus.shingles import folded, runs_of, signature

EMPTY = "empty"
_SHOWN_LINES = 20
_ANY_LANGUAGE, _ANY_TEXT = "fr", "Le patient se plaint d'une fiÃ¨vre depuis trois jours. " * 8


class Left(NamedTuple):
    """A document that was left out: why, and where it stands."""

    reason: str
    file: str
    number: int


@dataclass
class CleaningCounts:
    """What cleaning did to a source; adds up.

    Attributes:
        read: documents read, characters in them.
        unicode: what `repair_unicode` took away.
        whitespace: what `tidy_whitespace` took away.
        boilerplate_lines: the lines that went, with how often each did (the most frequent ones), and all of them.
        lone_surrogates: documents with halves of surrogate pairs, replaced by U+FFFD.
    """

    read: int = 0
    read_characters: int = 0
    unicode: CharacterLosses = field(default_factory=CharacterLosses)
    whitespace: CharacterLosses = field(default_factory=CharacterLosses)
    boilerplate_lines: Counter[str] = field(default_factory=Counter)
    boilerplate_lines_lost: int = 0
    boilerplate_documents: int = 0
    lone_surrogates: int = 0

    def merge(self, other: CleaningCounts) -> None:
        """Add the counts of another batch."""
        self.read += other.read
        self.read_characters += other.read_characters
        self.unicode.merge(other.unicode)
        self.whitespace.merge(other.whitespace)
        self.boilerplate_lines.update(other.boilerplate_lines)
        self.boilerplate_lines_lost += other.boilerplate_lines_lost
        self.boilerplate_documents += other.boilerplate_documents
        self.lone_surrogates += other.lone_surrogates


@dataclass
class CleanBatch:
    """The documents of a batch that were kept, those that were left out, and the counts.

    Attributes:
        texts: the kept texts.
        places: their files and numbers.
        digests: a 64-bit hash of each kept text, uint64 [kept].
        signatures: uint32 [kept, permutations], or None when near duplicates are not looked for.
        contacts: the kept documents, by their number in `texts`, that share words with items.
        left: what was left out.
        counts: what was done.
    """

    texts: list[str]
    places: list[tuple[str, int]]
    digests: np.ndarray
    signatures: np.ndarray | None
    contacts: dict[int, Contact]
    left: list[Left]
    counts: CleaningCounts


@dataclass(frozen=True)
class Treatment:
    """What is done to the documents; sent once to every process.

    Args:
        clean: the steps, or None.
        near: how signatures are made, or None.
        repeated_lines: a file with the hashes of boilerplate lines (`.npy`), or None.
        item_runs: a file of `contamination.ItemRuns`, or None.
    """

    clean: Clean | None
    near: NearDuplicates | None
    repeated_lines: Path | None
    item_runs: Path | None


_treatment: Treatment
_repeated: np.ndarray
_detector: Detector | None


def prepare_process(treatment: Treatment) -> None:
    """Set what this process does, and load what that needs; the first thing that a process is told."""
    global _treatment, _repeated, _detector
    _treatment = treatment
    lines = treatment.repeated_lines
    _repeated = np.load(lines) if lines is not None else np.empty(0, dtype=np.uint64)
    _detector = Detector(treatment.item_runs) if treatment.item_runs is not None else None
    # Compiled loops and the language model are loaded at their first use; before processes divide, they share them.
    clean_batch((_ANY_LANGUAGE, [Document(_ANY_TEXT, "", 0)]))


def clean_batch(batch: tuple[str | None, Sequence[Document]]) -> CleanBatch:
    """Clean a batch of documents of one language (None: not told) as `prepare_process` was told."""
    language, documents = batch
    counts, kept, left = CleaningCounts(), [], []
    for document in documents:
        counts.read += 1
        counts.read_characters += len(document.text)
        text = _repaired(document.text, counts)
        words = folded(text)
        fault = _fault(text, words, language)
        if fault:
            left.append(Left(fault, document.file, document.number))
        else:
            kept.append((text, words, document))
    texts = [text for text, _, _ in kept]
    contacts = [_detector.contact(words) for _, words, _ in kept] if _detector is not None else []
    counts.boilerplate_lines = Counter(dict(counts.boilerplate_lines.most_common(10 * _SHOWN_LINES)))
    return CleanBatch(
        texts=texts,
        places=[(document.file, document.number) for _, _, document in kept],
        digests=np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in texts], dtype=np.uint64),
        signatures=_signatures([words for _, words, _ in kept]),
        contacts={number: contact for number, contact in enumerate(contacts) if contact is not None},
        left=left,
        counts=counts,
    )


def _repaired(text: str, counts: CleaningCounts) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            counts.lone_surrogates += 1
            text = lone_surrogates_replaced(text)
    clean = _treatment.clean
    if clean is not None and clean.boilerplate is not None:
        text, gone = without_boilerplate(text, _repeated, clean.boilerplate)
        if gone:
            counts.boilerplate_documents += 1
            counts.boilerplate_lines_lost += len(gone)
            counts.boilerplate_lines.update(gone)
    if clean is not None and clean.unicode:
        repaired = repair_unicode(text)
        if repaired != text:
            counts.unicode.add(text, repaired)
            text = repaired
    if clean is not None and clean.whitespace:
        tidied = tidy_whitespace(text)
        if tidied != text:
            counts.whitespace.add(text, tidied)
            text = tidied
    return text


def _fault(text: str, words: str, language: str | None) -> str | None:
    if not text or text.isspace():
        return EMPTY
    clean = _treatment.clean
    if clean is None:
        return None
    fault = quality_fault(text, words, clean.quality) if clean.quality is not None else None
    if fault is None and clean.language is not None and language is not None:
        fault = language_fault(text, language, clean.language)
    return fault


def _signatures(texts: Sequence[str]) -> np.ndarray | None:
    """Return the signatures of texts given as their words."""
    near = _treatment.near
    if near is None:
        return None
    rows = [signature(runs_of(words, near.ngram), near.permutations) for words in texts]
    return np.stack(rows) if rows else np.empty((0, near.permutations), dtype=np.uint32)
