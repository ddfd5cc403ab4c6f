"""Which documents are left out for what they look like: length, symbols, repetition, language.

Each filter is a bound that the configuration declares, and says its name when it strikes, so that a report can count
and the reader can doubt. No filter changes a text.
"""

from __future__ import annotations

import re

import numpy as np

from dapt_merge.corpus.config import LanguageFilter, Quality
from dapt_merge.corpus.languages import language_of
from dapt_merge.corpus.shingles import runs_of

_SYMBOL = re.compile(r"[^\w\s]")
_REPETITION_NGRAM = 3
_REPETITION_FROM_WORDS = 50
# Some lines from the start, the middle and the end tell a language; reading all of a book tells no more.
_LANGUAGE_CHARACTERS = 120


def quality_fault(text: str, words: str, bounds: Quality) -> str | None:
    """Return the name of the first bound that a text is outside of, or None.

    Args:
        text: a document.
        words: its words, `shingles.folded`.
        bounds: what a document may look like.

    Example:
        >>> quality_fault("ok", "ok", Quality()), quality_fault("| -- | -- | " * 9, "", Quality())
        ('shorter than minimum_characters', 'above maximum_symbol_share')
    """
    if bounds.minimum_characters is not None and len(text) < bounds.minimum_characters:
        return "shorter than minimum_characters"
    if bounds.maximum_characters is not None and len(text) > bounds.maximum_characters:
        return "longer than maximum_characters"
    if bounds.maximum_symbol_share is not None and symbol_share(text) > bounds.maximum_symbol_share:
        return "above maximum_symbol_share"
    if bounds.maximum_repetition_share is not None and repetition(words) > bounds.maximum_repetition_share:
        return "above maximum_repetition_share"
    return None


def symbol_share(text: str) -> float:
    """Return the share of the characters other than spaces that are neither letters nor digits of any script.

    Example:
        >>> symbol_share("0,5 µg")
        0.2
    """
    visible = len("".join(text.split()))
    return (len(_SYMBOL.findall(text)) + text.count("_")) / visible if visible else 0.0


def repetition(words: str) -> float:
    """Return the share of trigrams that occurred before among the words of a `folded` text; 0 below 50 words."""
    hashes = runs_of(words, _REPETITION_NGRAM)
    if len(hashes) + _REPETITION_NGRAM - 1 < _REPETITION_FROM_WORDS:
        return 0.0
    return 1 - len(np.unique(hashes)) / len(hashes)


def language_fault(text: str, language: str, bounds: LanguageFilter) -> str | None:
    """Return `"language: xx"` when a text is, with the probability asked for, in another language than told."""
    if len(text) < bounds.minimum_characters:
        return None
    found, probability = language_of(_excerpts(text))
    return f"language: {found}" if found != language and probability >= bounds.minimum_probability else None


def _excerpts(text: str) -> str:
    size = _LANGUAGE_CHARACTERS
    if len(text) <= 3 * size:
        return text
    middle = (len(text) - size) // 2
    return f"{text[:size]} {text[middle : middle + size]} {text[-size:]}"
