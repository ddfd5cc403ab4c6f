"""The demo's texts, split once: what is trained on, what is replayed, and what each side of the items is made of.

The idea: every held-out choice is made before any training text is written, and the training texts are then checked
against it, so nothing that is measured was trained on. The mix of sources is set by characters and shuffled, so that
any prefix of the training file is a fair sample of it. What this module does not know: how many items a task gets.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dapt_merge.demo import classifications, drug_interactions, general_prose, littre
from dapt_merge.demo.classifications import Concept
from dapt_merge.demo.documents import Document, Split
from dapt_merge.demo.leaks import PhraseIndex, normalised
from dapt_merge.demo.packages import DRUG_INTERACTIONS, GENERAL_TEXT, ICD10, ICD11, LITTRE

_T = TypeVar("_T")
HELD_OUT_SIDES: tuple[Split, Split] = ("search", "report")
# Held-out share of the ICD-11 concepts, groups of interactions, headwords, documents of each general source.
_ICD11_SHARES: Mapping[Split, float] = {"search": 0.06, "report": 0.12}
_INTERACTION_GROUPS: Mapping[Split, int] = {"search": 25, "report": 80}
_HEADWORDS: Mapping[Split, int] = {"search": 25, "report": 65}
_GENERAL_DOCUMENTS: Mapping[Split, int] = {"search": 10, "report": 13}
# About 350, 80 and 130 thousand tokens: templates and lists must not drown the prose.
_MOST_CHARACTERS = {"icd11": 1_000_000, "icd10": 220_000, "littre": 400_000}


@dataclass(frozen=True)
class Texts:
    """All texts of the demo.

    Attributes:
        domain_train: shuffled training documents of the domain.
        replay: shuffled general documents for replay.
        held_out: prose documents of the two held-out sides (`split` says which), of every source but ICD-11.
        held_out_concepts: for each held-out side the ICD-11 leaves that may become items.
        chapters: French titles of the ICD-11 chapters that have such leaves, sorted.
    """

    domain_train: list[Document]
    replay: list[Document]
    held_out: list[Document]
    held_out_concepts: Mapping[Split, list[Concept]]
    chapters: list[str]

    def held_out_of(self, side: Split, source: str) -> list[Document]:
        """Return the held-out documents of one side and source, in their seeded order."""
        return [document for document in self.held_out if document.split == side and document.source == source]


def build_texts(folders: Mapping[str, Path], *, seed: int = 0) -> Texts:
    """Read every source from its unpacked package and split it.

    Args:
        folders: package name → folder, from `packages.fetch_packages`; the Littré joins when its folder is there.
        seed: chooses what is held out; the same seed gives the same texts.
    """
    concepts = classifications.read_icd11(folders[ICD11.name])
    icd10_labels = classifications.read_icd10(folders[ICD10.name])
    sides = classifications.split_units(concepts, _ICD11_SHARES, seed)
    held_out, interactions = drug_interactions.split_interactions(
        drug_interactions.read_interactions(folders[DRUG_INTERACTIONS.name]), _INTERACTION_GROUPS, seed
    )
    by_source = {
        "icd11": classifications.icd11_documents(concepts, sides, seed),
        "icd10": classifications.icd10_documents(icd10_labels),
        "ansm": interactions,
    }
    if LITTRE.name in folders:
        senses, by_source["littre"] = littre.split_senses(
            littre.read_medical_senses(folders[LITTRE.name]), _HEADWORDS, seed
        )
        held_out.extend(senses)
    general, replay = general_prose.split_general_prose(
        general_prose.read_general_prose(folders[GENERAL_TEXT.name]), _GENERAL_DOCUMENTS, seed
    )
    domain = _mixed(by_source, seed)
    leaves = _clean_leaves(concepts, sides, icd10_labels, [*domain, *replay])
    return Texts(
        domain_train=domain,
        replay=_shuffled(replay, f"{seed}:replay"),
        held_out=[*held_out, *general],
        held_out_concepts={side: _shuffled(found, f"{seed}:leaves:{side}") for side, found in leaves.items()},
        chapters=sorted({concept.chapter for found in leaves.values() for concept in found}),
    )


def _clean_leaves(
    concepts: Sequence[Concept],
    sides: Mapping[str, Split],
    icd10_labels: Mapping[str, str],
    training: Sequence[Document],
) -> dict[Split, list[Concept]]:
    """Keep, on each held-out side, leaves whose labels are nowhere in training, in the CIM-10 or on the other side."""
    in_training = [concept for concept in concepts if sides[concept.unit] == "train"]
    forbidden = PhraseIndex(
        [
            *(concept.label for concept in in_training),
            *(concept.english for concept in in_training),
            *icd10_labels.values(),
            *(document.text for document in training),
        ]
    )
    leaves: dict[Split, list[Concept]] = {}
    seen: set[str] = set()
    for side in HELD_OUT_SIDES:
        found = classifications.held_out_leaves(concepts, sides, side, forbidden)
        leaves[side] = [c for c in found if not {normalised(c.label), normalised(c.english)} & seen]
        seen.update(normalised(label) for concept in leaves[side] for label in (concept.label, concept.english))
    return leaves


def _mixed(by_source: Mapping[str, Sequence[Document]], seed: int) -> list[Document]:
    """Cut each source to its share of characters, then shuffle all together."""
    chosen: list[Document] = []
    for source, documents in by_source.items():
        left = _MOST_CHARACTERS.get(source)
        for document in _shuffled(documents, f"{seed}:mix:{source}"):
            if left is not None:
                left -= len(document.text)
                if left < 0:
                    break
            chosen.append(document)
    return _shuffled(chosen, f"{seed}:mix")


def _shuffled(things: Sequence[_T], key: str) -> list[_T]:
    copy = list(things)
    random.Random(key).shuffle(copy)
    return copy
