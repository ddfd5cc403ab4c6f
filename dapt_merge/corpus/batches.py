"""The documents of all sources in batches, cleaned in order by as many processes as are worth starting.

A batch never holds documents of two sources. What cleaning does is `cleaning`'s business, what becomes of the batches
is `cleaned_file`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

from dapt_merge.corpus.cleaning import CleanBatch, Treatment, clean_batch, prepare_process
from dapt_merge.corpus.config import CorpusDocuments, CorpusSource
from dapt_merge.corpus.parallel import ordered_map, usable_cores
from dapt_merge.corpus.reading import read_source
from dapt_merge.corpus.records import Document

_DOCUMENTS_AT_ONCE = 500
_CHARACTERS_AT_ONCE = 2_000_000
# Below this many documents starting processes costs more than it saves.
_WORTH_PROCESSES = 3000

LanguageBatch = tuple[str | None, list[Document]]


def documents_of(config: CorpusDocuments, source: CorpusSource) -> Iterator[Document]:
    """Yield the documents of a source that the corpus reads."""
    return islice(read_source(source), config.first_documents)


def cleaned_batches(
    config: CorpusDocuments, treatment: Treatment, processes: int | None
) -> Iterator[tuple[int, CleanBatch]]:
    """Yield every batch, cleaned, with the number of its source, in the order of the sources.

    Args:
        config: the sources.
        treatment: what is done to the documents.
        processes: how many clean at once (default: one for each usable core); a small corpus is cleaned by one.
    """
    numbers: list[int] = []
    batches = _numbered(config, numbers)
    first, many = _worth_processes(batches)
    count = (processes or usable_cores()) if many else 1
    cleaned = ordered_map(clean_batch, chain(_released(first), batches), count, prepare_process, (treatment,))
    for place, batch in enumerate(cleaned):
        yield numbers[place], batch


def _numbered(config: CorpusDocuments, numbers: list[int]) -> Iterator[LanguageBatch]:
    """Yield the batches with their language, and append the number of each one's source to a list."""
    for number, source in enumerate(config.sources):
        for batch in _batches(documents_of(config, source)):
            numbers.append(number)
            yield source.language, batch


def _worth_processes(batches: Iterator[LanguageBatch]) -> tuple[list[LanguageBatch], bool]:
    """Take the first batches; say whether they hold so many documents that processes are worth starting."""
    first: list[LanguageBatch] = []
    held = 0
    for batch in batches:
        first.append(batch)
        held += len(batch[1])
        if held >= _WORTH_PROCESSES:
            return first, True
    return first, False


def _released(first: list[LanguageBatch]) -> Iterator[LanguageBatch]:
    """Yield the batches that were taken, and hold them no longer than that."""
    yield from first
    first.clear()


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
