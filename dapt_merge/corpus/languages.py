"""The language of a text: py3langid's model and its answers, with the walk over the text's bytes compiled.

The library goes through a text byte by byte in Python, which took more than half of the time that cleaning takes.
Here the same tables give the same counts in the same order, so that the probabilities are the library's bit for bit.
Which documents are left out for their language is `filters`' business.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from dapt_merge.compiling import compiled


def language_of(text: str) -> tuple[str, float]:
    """Return the most probable language (ISO 639-1 where there is one) and its probability.

    Example:
        >>> language_of("Le patient présente une fièvre depuis trois jours.")[0]
        'fr'
    """
    language, probability = _identifier().classify(text)
    return language, probability


@cache
def known_languages() -> tuple[str, ...]:
    """Return the languages that can be told, sorted."""
    return tuple(sorted(str(label) for label in _identifier().labels))


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    class Compiled(LanguageIdentifier):  # type: ignore[misc]  # the library has no types
        """The library's identifier, but for the walk."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._moves = np.frombuffer(self.tk_nextmove, dtype=np.uint32)
            self._rows = np.asarray(self.tk_row, dtype=np.int64) << 8
            self._features = np.asarray(self.tk_output, dtype=np.int32)
            self._places = np.zeros(len(self.nb_ptc), dtype=np.int32)

        def _raw_score(self, text: bytes) -> np.ndarray:
            letters = np.frombuffer(text, dtype=np.uint8)
            found, counts = _visits(letters, self._moves, self._rows, self._features, self._places)
            if not len(found):
                return super()._raw_score(text)  # type: ignore[no-any-return]
            return np.log1p(counts) @ self.nb_ptc[found] + self.nb_pc  # type: ignore[no-any-return]

    return Compiled.from_model_file(MODEL_FILE, norm_probs=True)


@compiled()
def _visits(
    letters: np.ndarray, moves: np.ndarray, rows: np.ndarray, features: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Walk an automaton over bytes; return the features met, in the order in which they were, and how often each was.

    Args:
        letters: the bytes, uint8.
        moves: the next state, by row and byte, uint32.
        rows: where each state's row starts in `moves`, int64.
        features: the feature of each state, −1 for none, int32.
        places: zeros, one a feature, int32; zeros again afterwards.
    """
    found = np.empty(len(letters), dtype=np.int64)
    counts = np.zeros(len(letters), dtype=np.float32)
    state = count = 0
    for letter in letters:
        state = moves[rows[state] + letter]
        feature = features[state]
        if feature >= 0:
            if not places[feature]:
                found[count] = feature
                count += 1
                places[feature] = count
            counts[places[feature] - 1] += 1
    for feature in found[:count]:
        places[feature] = 0
    return found[:count], counts[:count]
