"""What became of the documents, as rows of plain data: source by source, item by item, copy by copy.

The rows go into `report.json` beside the documents, and from there into the manifest. Nothing is decided here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dapt_merge.corpus.characters import shown_character
from dapt_merge.corpus.cleaned_file import Cleaned, CleanedTexts
from dapt_merge.corpus.cleaning import CleaningCounts
from dapt_merge.corpus.config import CorpusDocuments
from dapt_merge.corpus.contamination import ContactsFound
from dapt_merge.corpus.duplicates import Pair
from dapt_merge.corpus.thinning import Thinned

_SAMPLE_PAIRS = 5
_SAMPLE_CHARACTERS = 160
_REPORTED_CONTACTS = 1000


def documents_report(
    config: CorpusDocuments,
    cleaned: Cleaned,
    thinned: Thinned,
    left_out: Sequence[Counter[str]],
    contact_rows: Sequence[Mapping[str, Any]],
    texts: CleanedTexts,
) -> dict[str, Any]:
    """Gather what a store says of its documents; a step that did not run is None.

    Args:
        config: the sources and steps.
        cleaned: what cleaning made.
        thinned: what was left of it.
        left_out: of each source, the reasons of the documents left out.
        contact_rows: from `contact_rows`.
        texts: of the cleaned documents.
    """
    contamination = duplication = None
    if config.decontaminate is not None and cleaned.contacts is not None:
        worst = sorted(contact_rows, key=lambda row: -max(share for _, _, share in row["items"]))
        contamination = {
            "removed": config.decontaminate.action == "remove",
            "tasks": _task_rows(cleaned.contacts),
            "found": len(worst),
            "documents": worst[:_REPORTED_CONTACTS],
        }
    if config.deduplicate is not None:
        titles = [source.title for source in config.sources]
        duplication = {step: _copies(pairs, titles, cleaned, texts) for step, pairs in thinned.copies.items()}
    return {
        "sources": _source_rows(config, cleaned, thinned.kept, left_out, texts),
        "contamination": contamination,
        "duplication": duplication,
    }


def _source_rows(
    config: CorpusDocuments,
    cleaned: Cleaned,
    kept: np.ndarray,
    left_out: Sequence[Counter[str]],
    texts: CleanedTexts,
) -> list[dict[str, Any]]:
    sources = cleaned.sources[kept]
    documents = np.bincount(sources, minlength=len(config.sources))
    characters = np.bincount(sources, texts.characters()[kept], minlength=len(config.sources))
    return [
        {
            "documents_read": of_source.cleaning.read,
            "characters_read": of_source.cleaning.read_characters,
            "documents_kept": int(documents[number]),
            "characters_kept": int(characters[number]),
            "left_out": dict(left_out[number].most_common()),
            "cleaning": _cleaning_row(of_source.cleaning) if config.clean is not None else None,
            "lone_surrogates_replaced": of_source.cleaning.lone_surrogates,
        }
        for number, of_source in enumerate(cleaned.counts)
    ]


def _cleaning_row(counts: CleaningCounts) -> dict[str, Any]:
    return {
        "unicode": {
            "documents_changed": counts.unicode.changed_documents,
            "characters_lost": counts.unicode.by_class(),
            "characters_gained": _shown(counts.unicode.gained),
        },
        "whitespace": {
            "documents_changed": counts.whitespace.changed_documents,
            "characters_lost": counts.whitespace.by_class(),
            "characters_gained": _shown(counts.whitespace.gained),
        },
        "boilerplate": {
            "documents_changed": counts.boilerplate_documents,
            "lines_lost": counts.boilerplate_lines_lost,
            "lines": dict(counts.boilerplate_lines.most_common(20)),
        },
    }


def _shown(characters: Counter[str]) -> dict[str, int]:
    return {shown_character(character): count for character, count in characters.most_common(12)}


def contact_rows(config: CorpusDocuments, cleaned: Cleaned, texts: CleanedTexts) -> list[dict[str, Any]]:
    """Return, for each document that holds enough of an item, the items and how much of each it has."""
    contacts = cleaned.contacts
    if contacts is None:
        return []
    return [
        {
            "document": texts.place(document),
            "source": config.sources[int(cleaned.sources[document])].title,
            "words": contact.words,
            "items": [[item.task, item.item, round(share, 4)] for item, share in contacts.items_in(document).items()],
        }
        for document, contact in contacts.documents.items()
    ]


def _task_rows(contacts: ContactsFound) -> list[dict[str, Any]]:
    """Return, for each task, how many of its items were looked for, found, and in how many documents."""
    runs = contacts.runs
    total = Counter(item.task for item in runs.items)
    found: dict[str, set[int]] = {task: set() for task in total}
    documents: Counter[str] = Counter()
    for contact in contacts.documents.values():
        documents.update({runs.items[owner].task for owner in contact.shares})
        for owner in contact.shares:
            found[runs.items[owner].task].add(owner)
    return [
        {
            "task": task,
            "version": runs.versions.get(task, ""),
            "items": count,
            "items_too_short_to_look_for": runs.unchecked.get(task, 0),
            "items_found": len(found[task]),
            "documents": documents[task],
            "largest_share_of_an_item": round(contacts.largest_shares.get(task, 0.0), 4),
        }
        for task, count in sorted(total.items())
    ]


def _copies(pairs: Sequence[Pair], titles: Sequence[str], cleaned: Cleaned, texts: CleanedTexts) -> dict[str, Any]:
    """Return the counts of copies by source, and samples over the range of similarities."""
    counts = Counter(
        (titles[int(cleaned.sources[pair.document])], titles[int(cleaned.sources[pair.kept])]) for pair in pairs
    )
    spread = sorted(pairs, key=lambda pair: pair.similarity)
    chosen = spread[:: max(1, -(-len(spread) // _SAMPLE_PAIRS))]
    return {
        "documents": len(pairs),
        "between": [
            {"left_out_of": one, "kept_in": other, "documents": count} for (one, other), count in counts.most_common()
        ],
        "samples": [
            {
                "similarity": round(pair.similarity, 3),
                "left_out": _sample(pair.document, texts),
                "kept": _sample(pair.kept, texts),
            }
            for pair in chosen
        ],
    }


def _sample(document: int, texts: CleanedTexts) -> dict[str, str]:
    return {"document": texts.place(document), "text": _excerpt(texts.text(document))}


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SAMPLE_CHARACTERS else text[: _SAMPLE_CHARACTERS - 1] + "…"
