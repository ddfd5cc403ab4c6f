"""Which documents repeat others: exactly, by a hash, and nearly, by MinHash-LSH and then the true similarity.

Documents are gone through in order, and each is compared with those that were kept before it. So the first copy stays,
and of every document left out it holds that a kept one is at least as similar as the threshold: no chains of ever less
similar documents, and no similarity that was only estimated. datasketch chooses the bands. Its index of dictionaries
takes some kilobytes a document; here a document that shares no band with any other, which sorting tells, is not looked
at again (about 30 bytes each while that is told), and the others are indexed in arrays: 12 bytes a band and document.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dapt_merge.compiling import compiled
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
    from datasketch import MinHashLSH

    weights = (_FALSE_POSITIVE_WEIGHT, _FALSE_NEGATIVE_WEIGHT)
    index = MinHashLSH(threshold=settings.threshold, num_perm=settings.permutations, weights=weights)
    return index.b, index.r


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
    count, rows = bands(settings)
    suspects = candidates[_share_a_band(signatures, candidates, count, rows)]
    index = _Buckets(signatures, suspects, count, rows)
    runs = _RememberedRuns(text_at, settings.ngram)
    error = np.sqrt(settings.threshold * (1 - settings.threshold) / settings.permutations)
    least = settings.threshold - _STANDARD_ERRORS * error
    pairs = []
    for place, document in enumerate(suspects.tolist()):
        found = suspects[index.kept_beside(place)]
        row = signatures[document]
        pair = _most_similar(document, found, signatures, row, least, runs, settings.threshold) if len(found) else None
        if pair is not None:
            pairs.append(pair)
        else:
            index.keep(place)
        if on_progress and place % 1000 == 0:
            on_progress(place, len(suspects))
    return pairs


def _share_a_band(signatures: np.ndarray, candidates: np.ndarray, count: int, rows: int) -> np.ndarray:
    """Say of each candidate whether another one has the same numbers in some band, bool [candidates]."""
    shares = np.zeros(len(candidates), dtype=bool)
    for band in range(count):
        keys = _band_keys(signatures, candidates, band * rows, rows)
        ordered = np.sort(keys)
        _mark_repeated(keys, np.unique(ordered[1:][ordered[1:] == ordered[:-1]]), shares)
    return shares


class _Buckets:
    """Which of the suspects that were kept lie in a bucket with another suspect, in any band.

    A bucket is a number that suspects with the same key in a band have in common; each holds the place of the suspect
    kept last, and each suspect that of the one kept before it in the same bucket.

    Args:
        signatures: of all documents.
        suspects: the documents to index, in the order in which they are asked for.
        count: bands.
        rows: numbers in a band.
    """

    def __init__(self, signatures: np.ndarray, suspects: np.ndarray, count: int, rows: int) -> None:
        self._bucket = np.empty((len(suspects), count), dtype=np.int32)
        buckets = 0
        for band in range(count):
            keys = _band_keys(signatures, suspects, band * rows, rows)
            ordered, inverse = np.unique(keys, return_inverse=True)
            self._bucket[:, band] = inverse + buckets
            buckets += len(ordered)
        self._last = np.full(buckets, -1, dtype=np.int32)
        self._before = np.full((len(suspects), count), -1, dtype=np.int32)
        self._asked_by = np.full(len(suspects), -1, dtype=np.int32)

    def kept_beside(self, place: int) -> np.ndarray:
        """Return the places of the kept suspects that share a bucket with one, ascending, int32."""
        return np.sort(_kept_beside(place, self._bucket, self._last, self._before, self._asked_by))

    def keep(self, place: int) -> None:
        """Let a suspect be found by those after it."""
        self._before[place] = self._last[self._bucket[place]]
        self._last[self._bucket[place]] = place


@compiled()
def _band_keys(signatures: np.ndarray, documents: np.ndarray, first: int, rows: int) -> np.ndarray:
    """Return a hash of each document's numbers in a band, uint64 [documents]."""
    keys = np.empty(len(documents), dtype=np.uint64)
    for place in range(len(documents)):
        key = np.uint64(0x9E3779B97F4A7C15)
        for column in range(first, first + rows):
            key = (key ^ np.uint64(signatures[documents[place], column])) * np.uint64(0xFF51AFD7ED558CCD)
            key ^= key >> np.uint64(32)
        keys[place] = key
    return keys


@compiled()
def _mark_repeated(keys: np.ndarray, repeated: np.ndarray, marks: np.ndarray) -> None:
    """Set the marks of those keys that are among the sorted `repeated`."""
    for place in range(len(keys)):
        found = np.searchsorted(repeated, keys[place])
        if found < len(repeated) and repeated[found] == keys[place]:
            marks[place] = True


@compiled()
def _kept_beside(
    place: int, bucket: np.ndarray, last: np.ndarray, before: np.ndarray, asked_by: np.ndarray
) -> np.ndarray:
    """Return the places in the chains of a suspect's buckets, each once, in no order, int32."""
    found = np.empty(8, dtype=np.int32)
    count = 0
    for band in range(bucket.shape[1]):
        other = last[bucket[place, band]]
        while other >= 0:
            if asked_by[other] != place:
                asked_by[other] = place
                if count == len(found):
                    found = np.concatenate((found, np.empty(count, dtype=np.int32)))
                found[count] = other
                count += 1
            other = before[other, band]
    return found[:count]


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
