"""How two texts are recognised as the same material: normalised labels, shared word n-grams, contained phrases.

The idea: a held-out score means something only if neither the text nor a light rewording of it was trained on. So case,
accents and punctuation are put aside, and prose is compared by runs of eight words. What this module does not know:
which texts are held out.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise

NGRAM_WORDS = 8
_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Return the lower-case words of `text` without accents or punctuation.

    Example:
        >>> words("L'Œdème, aigu (2)")
        ['l', 'œdeme', 'aigu', '2']
    """
    decomposed = unicodedata.normalize("NFKD", text.lower())
    return _WORD.findall("".join(character for character in decomposed if not unicodedata.combining(character)))


def normalised(text: str) -> str:
    """Return `words(text)` joined by single spaces: equal if two texts differ in case, accents or punctuation."""
    return " ".join(words(text))


def ngrams(text: str, length: int = NGRAM_WORDS) -> set[tuple[str, ...]]:
    """Return the runs of `length` words of `text`; a shorter text counts as one run of all its words."""
    sequence = words(text)
    if len(sequence) < length:
        return {tuple(sequence)} if sequence else set()
    return {tuple(sequence[start : start + length]) for start in range(len(sequence) - length + 1)}


class PhraseIndex:
    """Answers whether a phrase occurs, word for word after normalisation, inside any of many texts.

    Example:
        >>> index = PhraseIndex(["Péritonite typhoïde aiguë", "Choléra"])
        >>> "peritonite TYPHOÏDE" in index, "typhoïde" in index, "peritonite cholera" in index
        (True, True, False)
    """

    def __init__(self, texts: Iterable[str]) -> None:
        lines = [words(text) for text in texts]
        self._pairs = {pair for line in lines for pair in pairwise(line)}
        self._all = "\n".join(f" {' '.join(line)} " for line in lines)

    def __contains__(self, phrase: object) -> bool:
        sequence = words(str(phrase))
        # Most phrases have a pair of neighbours that occurs nowhere, which is found out much faster than by searching.
        return self._pairs.issuperset(pairwise(sequence)) and f" {' '.join(sequence)} " in self._all


def connected_groups(links: Sequence[Iterable[Hashable]]) -> list[int]:
    """Group things that share a link, directly or through others.

    Args:
        links: for each thing, the marks that tie it to others with the same mark.

    Returns:
        For each thing the index of the first thing of its group.

    Example:
        >>> connected_groups([{"a"}, {"b"}, {"a", "c"}, {"c"}])
        [0, 1, 0, 0]
    """
    parent = list(range(len(links)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_with: dict[Hashable, int] = {}
    for index, marks in enumerate(links):
        for mark in marks:
            left, right = sorted((root(index), root(first_with.setdefault(mark, index))))
            parent[right] = left
    return [root(index) for index in range(len(links))]
