"""Which documents repeat others: exactly, by a hash, and nearly, by MinHash-LSH and then the true similarity.

Documents are gone through in order, and each is compared with those that were kept before it. So the first copy stays,
and of every document left out it holds that a kept one is at least as similar as the threshold: no chains of ever less
similar documents, and no similarity that was only estimated. datasketch chooses the bands and keeps the index; a
document that shares no band with any other, which sorting tells, never enters it, so that its memory grows with the
repetitions in a corpus and not with the corpus.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dapt_merge.corpus.config import NearDuplicates
from dapt_merge.corpus.shingles import jaccard, shingles

# Candidates are checked against the true similarity, so a missed pair is worse than a needless candidate.
_FALSE_POSITIVE_WEIGHT, _FALSE_NEGATIVE_WEIGHT = 0.1, 0.9
# Candidates whose estimate is so many standard errors below the threshold are not looked at.
_STANDARD_ERRORS = 4.0
_REMEMBERED_DOCUMENTS = 4096


class Pair(NamedTuple):
    """A document to leave out, the kept one that it repeats, and their similarity (1 for exact copies)."""

    document: int
    kept: int
    similarity: float


def exact_duplicates(digests: np.ndarray, text_at: Callable[[int], str]) -> list[Pair]:
    """Return the documents that are equal to one before them.

    Args:
        digests: a hash of each text, uint64 [documents].
        text_at: gives a document's text; equal hashes are checked.
    """
    order = np.argsort(digests, kind="stable")
    ordered = digests[order]
    starts = np.flatnonzero(np.concatenate([np.ones(1, dtype=bool), ordered[1:] != ordered[:-1]])[: len(ordered)])
    sizes = np.diff(starts, append=len(ordered))
    pairs: list[Pair] = []
    for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
        first, *others = order[start : start + size].tolist()
        text = text_at(first)
        pairs.extend(Pair(other, first, 1.0) for other in others if text_at(other) == text)
    return sorted(pairs)


def bands(settings: NearDuplicates) -> tuple[int, int]:
    """Return the number of bands and the rows in each that datasketch takes for a threshold."""
    index = _index(settings)
    return index.b, index.r


def _index(settings: NearDuplicates) -> Any:
    from datasketch import MinHashLSH

    weights = (_FALSE_POSITIVE_WEIGHT, _FALSE_NEGATIVE_WEIGHT)
    return MinHashLSH(threshold=settings.threshold, num_perm=settings.permutations, weights=weights)


def near_duplicates(
    signatures: np.ndarray,
    candidates: np.ndarray,
    settings: NearDuplicates,
    text_at: Callable[[int], str],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Pair]:
    """Return the documents that are nearly equal to a kept one before them.

    Args:
        signatures: MinHash signatures, uint32 [documents, permutations].
        candidates: the documents to look at (those that are still kept), ascending, int64.
        settings: threshold, n-gram, permutations.
        text_at: gives a document's text.
        on_progress: called with (done, total) documents.
    """
    from datasketch import LeanMinHash

    index = _index(settings)
    suspects = candidates[_share_a_band(signatures, candidates, index.b, index.r)]
    runs = _RememberedRuns(text_at, settings.ngram)
    error = np.sqrt(settings.threshold * (1 - settings.threshold) / settings.permutations)
    least = settings.threshold - _STANDARD_ERRORS * error
    pairs = []
    for done, document in enumerate(suspects.tolist()):
        row = np.array(signatures[document])
        sketch = LeanMinHash(seed=1, hashvalues=row, scheme="affine32")
        found = np.array(index.query(sketch), dtype=np.int64)
        pair = _most_similar(document, found, signatures, row, least, runs, settings.threshold) if len(found) else None
        if pair is not None:
            pairs.append(pair)
        else:
            index.insert(document, sketch, check_duplication=False)
        if on_progress and done % 1000 == 0:
            on_progress(done, len(suspects))
    return pairs


def _share_a_band(signatures: np.ndarray, candidates: np.ndarray, count: int, rows: int) -> np.ndarray:
    """Say of each candidate whether another one has the same numbers in some band, bool [candidates]."""
    shares = np.zeros(len(candidates), dtype=bool)
    for band in range(count):
        columns = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows][candidates])
        keys = _hash_rows(columns)
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        shares |= counts[inverse] > 1
    return shares


def _hash_rows(columns: np.ndarray) -> np.ndarray:
    keys = np.full(len(columns), 0x9E3779B97F4A7C15, dtype=np.uint64)
    for column in columns.T:
        keys = (keys ^ column) * np.uint64(0xFF51AFD7ED558CCD)
        keys ^= keys >> np.uint64(32)
    return keys


def _most_similar(
    document: int,
    found: np.ndarray,
    signatures: np.ndarray,
    row: np.ndarray,
    least: float,
    runs: _RememberedRuns,
    threshold: float,
) -> Pair | None:
    """Return the first candidate, by falling estimate, whose true similarity reaches the threshold."""
    found.sort()
    estimates = (signatures[found] == row).mean(axis=1)
    for place in np.argsort(-estimates, kind="stable").tolist():
        if estimates[place] < least:
            return None
        similarity = jaccard(runs.of(document), runs.of(int(found[place])))
        if similarity >= threshold:
            return Pair(document, int(found[place]), similarity)
    return None


@dataclass
class _RememberedRuns:
    """The word runs of the documents looked at last, since the first copy of a notice is asked for again and again."""

    text_at: Callable[[int], str]
    ngram: int

    def __post_init__(self) -> None:
        self._held: OrderedDict[int, np.ndarray] = OrderedDict()

    def of(self, document: int) -> np.ndarray:
        found = self._held.pop(document, None)
        if found is None:
            found = np.unique(shingles(self.text_at(document), self.ngram))
            if len(self._held) >= _REMEMBERED_DOCUMENTS:
                self._held.popitem(last=False)
        self._held[document] = found
        return found
