"""What repeats is found, by its true similarity; and what is kept is no copy of anything kept."""

from __future__ import annotations

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpora import WORDS, text_of, texts

from dapt_merge.corpus.config import NearDuplicates
from dapt_merge.corpus.duplicates import Pair, _Buckets, bands, exact_duplicates, near_duplicates
from dapt_merge.corpus.shingles import folded, jaccard, shingles, signature


def near(documents: list[str], options: NearDuplicates) -> list[Pair]:
    signatures = np.stack([signature(shingles(text, options.ngram), options.permutations) for text in documents])
    return near_duplicates(signatures, np.arange(len(documents)), options, documents.__getitem__)


def similarity(one: str, other: str, ngram: int = 5) -> float:
    return jaccard(shingles(one, ngram), shingles(other, ngram))


def edited(words: list[str], edits: int, generator: np.random.Generator) -> list[str]:
    words = list(words)
    for place in generator.integers(0, len(words), edits):
        words[place] = WORDS[generator.integers(len(WORDS))]
    return words


@given(st.text(max_size=60), st.integers(1, 6))
def test_shingles_are_the_runs_of_the_folded_words(text: str, ngram: int) -> None:
    words = folded(text).split()
    runs = [tuple(words[i : i + ngram]) for i in range(max(1, len(words) - ngram + 1))] if words else []
    hashes = shingles(text, ngram).tolist()
    assert len(hashes) == len(runs)
    assert len(set(hashes)) == len(set(runs))


@given(st.lists(st.integers(0, 2**64 - 1), max_size=40), st.integers(8, 64))
@settings(max_examples=30)
def test_a_signature_is_datasketchs_own(hashes: list[int], permutations: int) -> None:
    expected = MinHash(num_perm=permutations, hashfunc=lambda value: value)
    for value in hashes:
        expected.update(value & 0xFFFFFFFF)
    found = signature(np.array(hashes, dtype=np.uint64), permutations)
    assert found.dtype == expected.hashvalues.dtype
    assert found.tolist() == expected.hashvalues.tolist()


@given(st.lists(st.integers(0, 30)), st.lists(st.integers(0, 30)))
def test_jaccard_is_of_sets(one: list[int], other: list[int]) -> None:
    union = set(one) | set(other)
    expected = len(set(one) & set(other)) / len(union) if union else 0.0
    assert jaccard(np.array(one, dtype=np.uint64), np.array(other, dtype=np.uint64)) == expected


def test_exact_copies_point_to_the_first() -> None:
    documents = ["a", "b", "a", "c", "b", "a"]
    digests = np.array([ord(text) for text in documents], dtype=np.uint64)
    assert exact_duplicates(digests, documents.__getitem__) == [Pair(2, 0, 1.0), Pair(4, 1, 1.0), Pair(5, 0, 1.0)]
    # Equal hashes of unequal texts are no copies.
    assert exact_duplicates(np.zeros(3, dtype=np.uint64), ["a", "b", "a"].__getitem__) == [Pair(2, 0, 1.0)]
    assert exact_duplicates(np.zeros(0, dtype=np.uint64), documents.__getitem__) == []


@pytest.mark.parametrize("threshold", [0.7, 0.8])
def test_planted_near_copies_are_found_and_nothing_else(threshold: float) -> None:
    generator = np.random.default_rng(0)
    originals = [text_of(int(generator.integers(120, 260)), generator) for _ in range(400)]
    planted = [edited(originals[i], int(generator.integers(1, 4)), generator) for i in range(200)]
    # Documents that share half of their text with an original: alike, but no copies.
    alike = [original[: len(original) // 2] + text_of(100, generator) for original in originals[200:]]
    documents = [" ".join(words) for words in [*originals, *planted, *alike]]
    is_copy = [similarity(documents[400 + i], documents[i]) >= threshold for i in range(200)]
    assert sum(is_copy) > 150
    found = {pair.document for pair in near(documents, NearDuplicates(threshold=threshold))}
    true = {400 + i for i in range(200) if is_copy[i]}
    assert len(found & true) / len(true) >= 0.95
    assert len(found & true) / len(found) >= 0.99


def test_every_document_left_out_has_a_kept_one_as_similar_as_told() -> None:
    generator = np.random.default_rng(1)
    # Chains of copies of copies, ever less like the first.
    documents, words = [], text_of(150, generator)
    for _ in range(60):
        words = edited(words, 2, generator)
        documents.append(" ".join(words))
    pairs = near(documents, NearDuplicates(threshold=0.7))
    gone = {pair.document for pair in pairs}
    assert 0 < len(gone) < 59
    for pair in pairs:
        assert pair.kept not in gone
        assert pair.kept < pair.document
        assert pair.similarity == similarity(documents[pair.document], documents[pair.kept]) >= 0.7
    kept = [text for number, text in enumerate(documents) if number not in gone]
    assert max(similarity(a, b) for i, a in enumerate(kept) for b in kept[:i]) < 0.8


def test_sorting_out_the_unrepeated_first_changes_nothing() -> None:
    generator = np.random.default_rng(2)
    originals = [text_of(80, generator) for _ in range(120)]
    documents = [" ".join(words) for words in originals]
    documents += [" ".join(edited(words, int(generator.integers(1, 6)), generator)) for words in originals[:60]]
    options = NearDuplicates(threshold=0.6, permutations=64)
    count, rows = bands(options)
    index = MinHashLSH(num_perm=64, params=(count, rows))
    expected: dict[int, int] = {}
    for number, text in enumerate(documents):
        sketch = MinHash(hashvalues=signature(shingles(text, 5), 64), scheme="affine32")
        found = [other for other in index.query(sketch) if similarity(text, documents[other]) >= 0.6]
        if found:
            expected[number] = min(found)
        else:
            index.insert(number, sketch)
    assert expected
    assert {pair.document for pair in near(documents, options)} == set(expected)


def test_only_the_candidates_are_looked_at() -> None:
    documents = [*texts(3, 1), *texts(3, 1)]
    signatures = np.stack([signature(shingles(text, 5), 128) for text in documents])
    pairs = near_duplicates(signatures, np.array([1, 2, 3, 4]), NearDuplicates(), documents.__getitem__)
    assert [(pair.document, pair.kept) for pair in pairs] == [(4, 1)]


def test_the_index_takes_less_than_200_bytes_a_document() -> None:
    options = NearDuplicates()
    signatures = np.random.default_rng(0).integers(0, 2**32, (500, options.permutations), dtype=np.uint32)
    index = _Buckets(signatures, np.arange(500), *bands(options))
    for place in range(500):
        assert len(index.kept_beside(place)) == 0
        index.keep(place)
    assert sum(array.nbytes for array in vars(index).values()) <= 200 * 500


def test_a_bucket_gives_all_that_were_kept_in_it_once() -> None:
    signatures = np.zeros((40, 12), dtype=np.uint32)
    signatures[:, 4:8] = np.arange(40)[:, None] % 2
    signatures[:, 8:] = np.arange(40)[:, None]
    index = _Buckets(signatures[:, 4:], np.arange(40), 2, 4)
    for place in range(40):
        kept = [other for other in range(place) if other % 2 == place % 2 and other % 3]
        assert index.kept_beside(place).tolist() == kept
        if place % 3:
            index.keep(place)
