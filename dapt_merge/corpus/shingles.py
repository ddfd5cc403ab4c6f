"""Texts as sets of hashed word n-grams, and sets as MinHash signatures: datasketch's, a thousand times over.

A text is folded to lower-case words with one space between; every run of n words is hashed to 64 bits. The lower 32 of
these go through datasketch's own permutations (scheme `affine32`), so a signature made here is the one that
`datasketch.MinHash(hashfunc=identity)` makes, bit for bit; only the loop is compiled. What is similar, and what is done
about it, is not known here.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from dapt_merge.compiling import compiled

_WORD = re.compile(r"\w+")
_FNV_OFFSET = np.uint64(0xCBF29CE484222325)
_FNV_PRIME = np.uint64(0x100000001B3)
_MIX_1, _MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_SPACE = 32


def shingles(text: str, ngram: int) -> np.ndarray:
    """Return the hash of every run of `ngram` words of a text, uint64, in order, repeated ones too.

    A text of fewer words is one run; a text without words has none.

    Example:
        >>> a, b = shingles("Le patient, fébrile.", 3), shingles("le PATIENT fébrile", 3)
        >>> len(a), bool((a == b).all())
        (1, True)
    """
    return runs_of(folded(text), ngram)


def folded(text: str) -> str:
    """Return the words of a text in lower case, one space between them.

    Example:
        >>> folded("L’ÉTÉ : 0,5 µg !")
        'l été 0 5 μg'
    """
    return " ".join(_WORD.findall(text.casefold()))


def runs_of(words: str, ngram: int) -> np.ndarray:
    """Return what `shingles` does, of a text that is `folded` already."""
    return _hash_runs(np.frombuffer(words.encode("utf-8", "replace"), dtype=np.uint8), ngram)


@compiled()
def _mixed(value: np.uint64) -> np.uint64:
    value ^= value >> np.uint64(33)
    value *= _MIX_1
    value ^= value >> np.uint64(33)
    value *= _MIX_2
    return value ^ (value >> np.uint64(33))


@compiled()
def _hash_runs(letters: np.ndarray, ngram: int) -> np.ndarray:
    words = np.empty(len(letters) // 2 + 1, dtype=np.uint64)
    count = 0
    value = _FNV_OFFSET
    for i in range(len(letters)):
        if letters[i] == _SPACE:
            words[count] = value
            count += 1
            value = _FNV_OFFSET
        else:
            value = (value ^ np.uint64(letters[i])) * _FNV_PRIME
    if len(letters):
        words[count] = value
        count += 1
    length = min(ngram, count)
    runs = np.empty(count - length + 1 if count else 0, dtype=np.uint64)
    for first in range(len(runs)):
        total = np.uint64(length)
        for word in words[first : first + length]:
            total = _mixed(total * _FNV_PRIME + word)
        runs[first] = total
    return runs


@cache
def permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the multipliers and offsets of datasketch's first `count` permutations, uint32 [count] each."""
    from datasketch import MinHash

    multipliers, offsets = MinHash(num_perm=count).permutations
    return np.asarray(multipliers, dtype=np.uint32), np.asarray(offsets, dtype=np.uint32)


def signature(hashes: np.ndarray, count: int) -> np.ndarray:
    """Return the MinHash signature of a set of hashes, uint32 [count]; all ones of an empty set."""
    return _signature(hashes, *permutations(count))


@compiled()
def _signature(hashes: np.ndarray, multipliers: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    least = np.full(len(multipliers), 0xFFFFFFFF, dtype=np.uint32)
    for value in hashes:
        # MurmurHash3's finalizer, as datasketch applies it before the permutations.
        h = np.uint32(value & np.uint64(0xFFFFFFFF))
        h ^= h >> np.uint32(16)
        h = np.uint32(h * np.uint32(0x85EBCA6B))
        h ^= h >> np.uint32(13)
        h = np.uint32(h * np.uint32(0xC2B2AE35))
        h ^= h >> np.uint32(16)
        for k in range(len(multipliers)):
            permuted = np.uint32(multipliers[k] * h + offsets[k])
            if permuted < least[k]:
                least[k] = permuted
    return least


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Return |A ∩ B| / |A ∪ B| of two sets of hashes, given with or without repetitions; 0 when both are empty.

    Example:
        >>> jaccard(np.array([1, 2, 3, 3], dtype=np.uint64), np.array([2, 3, 4], dtype=np.uint64))
        0.5
    """
    return float(_jaccard(np.sort(one), np.sort(other)))


@compiled()
def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    i = j = shared = union = 0
    while i < len(one) or j < len(other):
        from_one = j >= len(other) or (i < len(one) and one[i] < other[j])
        value = one[i] if from_one else other[j]
        in_one = in_other = False
        while i < len(one) and one[i] == value:
            in_one = True
            i += 1
        while j < len(other) and other[j] == value:
            in_other = True
            j += 1
        union += 1
        shared += in_one and in_other
    return shared / union if union else 0.0
