"""Which documents hold text of the items that will judge the model, told by runs of words that both have.

The items are taken as lm-eval renders them, question and answers together; how much of an item a document has is told
beside it, since a sentence shared by chance and an item copied whole are not the same. Runs that more than a tenth of
a task's items share are its prompt, not its content, and are not looked for. An item shorter than a run is looked for
whole, if it has at least eight words: below that a match says nothing, and the report says how many items that leaves
unchecked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dapt_merge.corpus.config import Decontaminate
from dapt_merge.corpus.shingles import folded, runs_of
from dapt_merge.errors import InputError, nearest

SHORTEST_ITEM_WORDS = 8
_PROMPT_SHARE, _PROMPT_ITEMS = 0.1, 4


class Item(NamedTuple):
    """An item of a task: the task's name, the item's id."""

    task: str
    item: str


@dataclass(frozen=True)
class ItemRuns:
    """The runs of words of all items.

    Attributes:
        hashes: of the runs, sorted, uint64 [runs]; once for each item that has it.
        owners: the items they belong to, int32 [runs], indices into `items`.
        lengths: the lengths of the runs in words.
        items: all items.
        unchecked: by task, the items that are too short to look for.
        versions: by task, what names its content.
    """

    hashes: np.ndarray
    owners: np.ndarray
    lengths: tuple[int, ...]
    items: tuple[Item, ...]
    unchecked: Mapping[str, int]
    versions: Mapping[str, str]

    def save(self, file: Path) -> None:
        """Write what `load_runs` needs, for other processes."""
        sizes = np.bincount(self.owners, minlength=len(self.items))
        np.savez(file, hashes=self.hashes, owners=self.owners, lengths=np.array(self.lengths), sizes=sizes)


class Contact(NamedTuple):
    """A document that shares words with items.

    Attributes:
        shares: for each item (its number), the share of its runs that the document has.
        words: the first run of words that they share.
    """

    shares: Mapping[int, float]
    words: str


class ContactsFound:
    """The documents that hold enough of an item, and how much of an item any document holds at most.

    Args:
        runs: of the items.
        minimum_share: how much of an item is enough, as a share of its runs.

    Attributes:
        documents: by document, the items that it holds enough of.
        largest_shares: by task, the largest share of an item in one document, enough or not.
    """

    def __init__(self, runs: ItemRuns, minimum_share: float) -> None:
        self.runs, self._minimum_share = runs, minimum_share
        self.documents: dict[int, Contact] = {}
        self.largest_shares: dict[str, float] = {}

    def add(self, contacts: Mapping[int, Contact], *, first_document: int) -> None:
        """Add the contacts of a batch, by place in it; its documents are numbered from `first_document` on."""
        for place, contact in contacts.items():
            for owner, share in contact.shares.items():
                task = self.runs.items[owner].task
                self.largest_shares[task] = max(self.largest_shares.get(task, 0.0), share)
            enough = {owner: share for owner, share in contact.shares.items() if share >= self._minimum_share}
            if enough:
                self.documents[first_document + place] = contact._replace(shares=enough)

    def items_in(self, document: int) -> dict[Item, float]:
        """Return the items that a document holds enough of, and the share of each."""
        return {self.runs.items[owner]: share for owner, share in self.documents[document].shares.items()}


def item_runs(settings: Decontaminate) -> ItemRuns:
    """Load the suites and hash their items' runs of words.

    Raises:
        InputError: a suite or a task of it cannot be loaded.
    """
    from dapt_merge.evaluation.suites import load_suite
    from dapt_merge.evaluation.tasks import load_tasks

    for path in settings.suites:
        if not path.expanduser().is_file():
            siblings = [file.name for file in path.parent.glob("*.yaml")]
            raise InputError(
                f"there is no such suite to decontaminate against.{nearest(path.name, siblings)}",
                where=path,
                remedy="Correct the path under 'decontaminate', or leave that section out.",
            )
    tasks, _ = load_tasks([load_suite(path) for path in settings.suites])
    texts = {name: dict(zip(task.item_ids, _item_texts(task), strict=True)) for name, task in tasks.items()}
    return hash_items(texts, settings.ngram, {name: task.version for name, task in tasks.items()})


def _item_texts(task: Any) -> list[list[str]]:
    """Return what lm-eval shows of each item, one text a request."""
    shown: list[list[str]] = [[] for _ in task.item_ids]
    for request in task.task.instances:
        shown[request.doc_id].append(" ".join(part for part in request.arguments if isinstance(part, str)))
    return shown


def hash_items(
    texts: Mapping[str, Mapping[str, Sequence[str]]], ngram: int, versions: Mapping[str, str] | None = None
) -> ItemRuns:
    """Hash the runs of words of items given as task → item → its texts."""
    items: list[Item] = []
    hashes: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    unchecked: Counter[str] = Counter()
    lengths: set[int] = set()
    for task, of_task in texts.items():
        runs = {item: _runs_of_item(shown, ngram) for item, shown in of_task.items()}
        prompt = _prompt_runs([found for found, _ in runs.values()])
        for item, (found, lengths_found) in runs.items():
            lengths |= lengths_found
            own = np.setdiff1d(found, prompt)
            unchecked[task] += not len(own)
            hashes.append(own)
            owners.append(np.full(len(own), len(items), dtype=np.int32))
            items.append(Item(task, item))
    all_hashes = np.concatenate([*hashes, np.empty(0, dtype=np.uint64)])
    order = np.argsort(all_hashes, kind="stable")
    all_owners = np.concatenate([*owners, np.empty(0, dtype=np.int32)])
    return ItemRuns(
        all_hashes[order], all_owners[order], tuple(sorted(lengths)), tuple(items), dict(unchecked), versions or {}
    )


def _runs_of_item(shown: Sequence[str], ngram: int) -> tuple[np.ndarray, set[int]]:
    """Return the distinct runs of an item, and their lengths in words."""
    found, lengths = [np.empty(0, dtype=np.uint64)], set()
    for words in {folded(text) for text in shown}:
        length = min(ngram, words.count(" ") + 1)
        if length >= min(SHORTEST_ITEM_WORDS, ngram):
            found.append(runs_of(words, length))
            lengths.add(length)
    return np.unique(np.concatenate(found)), lengths


def _prompt_runs(runs: Sequence[np.ndarray]) -> np.ndarray:
    """Return the runs that so many items share that they are the task's wording."""
    hashes, counts = np.unique(np.concatenate([*runs, np.empty(0, dtype=np.uint64)]), return_counts=True)
    return hashes[counts > max(_PROMPT_ITEMS, _PROMPT_SHARE * len(runs))]


class Detector:
    """Finds the items whose runs a text has; loaded once in every process.

    Args:
        file: written by `ItemRuns.save`.
    """

    def __init__(self, file: Path) -> None:
        with np.load(file) as stored:
            self._hashes, self._owners, self._lengths = (stored[name] for name in ("hashes", "owners", "lengths"))
            self._sizes = stored["sizes"]

    def contact(self, words: str) -> Contact | None:
        """Return what a text, given as its `folded` words, shares with items, or None."""
        count = words.count(" ") + 1
        found: Counter[int] = Counter()
        shared = ""
        for length in self._lengths.tolist():
            if length > count or not len(self._hashes):
                continue
            runs = runs_of(words, length)
            first = np.searchsorted(self._hashes, runs)
            hits = np.flatnonzero(self._hashes[first.clip(max=len(self._hashes) - 1)] == runs)
            for run in np.unique(runs[hits]):
                low, high = np.searchsorted(self._hashes, run), np.searchsorted(self._hashes, run, side="right")
                found.update(self._owners[low:high].tolist())
            if len(hits) and not shared:
                shared = " ".join(words.split(" ")[hits[0] : hits[0] + length])
        shares = {owner: count / int(self._sizes[owner]) for owner, count in sorted(found.items())}
        return Contact(shares, shared) if shares else None
