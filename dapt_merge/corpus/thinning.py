"""Which of the cleaned documents go because of what others hold: items that will judge the model, or the same text.

Contaminated documents go first, exact copies next, near copies last, each step looking at what those before it left.
How contacts and copies are found is told in `contamination` and `duplicates`; nothing is written here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dapt_merge.corpus.cleaned_file import Cleaned, CleanedTexts, OnProgress
from dapt_merge.corpus.config import CorpusDocuments, NearDuplicates
from dapt_merge.corpus.contamination import ContactsFound
from dapt_merge.corpus.duplicates import Pair, exact_duplicates, near_duplicates


class Removal(NamedTuple):
    """Why a cleaned document goes: the kind of reason, which is counted, and the reason in full."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Thinned:
    """What is left of the cleaned documents.

    Attributes:
        kept: the documents that stay, ascending, int64 [documents].
        removed: those that go, by document, in the order of the steps.
        copies: by the steps that ran (`exact`, `near`), the documents that repeat another.
    """

    kept: np.ndarray
    removed: Mapping[int, Removal]
    copies: Mapping[str, Sequence[Pair]]


def thin(config: CorpusDocuments, cleaned: Cleaned, texts: CleanedTexts, on_progress: OnProgress) -> Thinned:
    """Decide which of the cleaned documents stay."""
    removed: dict[int, Removal] = {}
    copies: dict[str, Sequence[Pair]] = {}
    if config.decontaminate is not None and config.decontaminate.action == "remove" and cleaned.contacts is not None:
        removed |= _contaminated(cleaned.contacts)
    steps = config.deduplicate
    if steps is not None:
        on_progress("comparing", 0, 0)
    if steps is not None and steps.exact:
        copies["exact"] = _exact_copies(cleaned, _without(removed, cleaned), texts)
        removed |= _repeating("exact copy", copies["exact"], texts)
    if steps is not None and steps.near is not None and len(cleaned.sources):
        copies["near"] = _near_copies(steps.near, cleaned, _without(removed, cleaned), texts, on_progress)
        removed |= _repeating("near copy", copies["near"], texts)
    return Thinned(_without(removed, cleaned), removed, copies)


def left_out(cleaned: Cleaned, thinned: Thinned) -> list[Counter[str]]:
    """Count for each source the documents left out, by reason: in cleaning, then in thinning."""
    counts = [Counter(of_source.left_out) for of_source in cleaned.counts]
    for document, removal in thinned.removed.items():
        counts[int(cleaned.sources[document])][removal.kind] += 1
    return counts


def _without(removed: Mapping[int, Removal], cleaned: Cleaned) -> np.ndarray:
    """Return the documents that are still there, ascending, int64."""
    gone = np.fromiter(removed, dtype=np.int64, count=len(removed))
    return np.setdiff1d(np.arange(len(cleaned.sources)), gone)


def _contaminated(contacts: ContactsFound) -> dict[int, Removal]:
    return {
        document: Removal(
            "contaminated", f"contaminated: {', '.join(sorted({item.task for item in contacts.items_in(document)}))}"
        )
        for document in contacts.documents
    }


def _exact_copies(cleaned: Cleaned, rows: np.ndarray, texts: CleanedTexts) -> list[Pair]:
    pairs = exact_duplicates(cleaned.digests()[rows], lambda place: texts.text(int(rows[place])))
    return [Pair(int(rows[pair.document]), int(rows[pair.kept]), pair.similarity) for pair in pairs]


def _near_copies(
    settings: NearDuplicates, cleaned: Cleaned, rows: np.ndarray, texts: CleanedTexts, on_progress: OnProgress
) -> list[Pair]:
    return near_duplicates(
        cleaned.signatures(settings.permutations),
        rows,
        settings,
        texts.text,
        lambda done, total: on_progress("comparing", done, total),
    )


def _repeating(kind: str, pairs: Sequence[Pair], texts: CleanedTexts) -> dict[int, Removal]:
    removed = {}
    for pair in pairs:
        similarity = "" if pair.similarity == 1.0 else f" (similarity {pair.similarity:.2f})"
        removed[pair.document] = Removal(kind, f"{kind} of {texts.place(pair.kept)}{similarity}")
    return removed
