"""ICD-11 and CIM-10 in French: terms, their place in the tree, and short texts that put both into words.

The idea: a label alone is no text. Each ICD-11 term becomes a short passage from one of several templates (its French
and English label, parent, chapter), so a held-out passage asks for what was learned about neighbouring terms. Whole
subtrees are held out, and a held-out label must occur nowhere in what is trained on. A template can be learned without
any medicine in it: `shuffled_passages` measures how much of a gain is just that. What this module does not know: how
many items are wanted.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import random
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dapt_merge.demo.documents import Document, Split
from dapt_merge.demo.french import tidy
from dapt_merge.demo.leaks import PhraseIndex, normalised
from dapt_merge.demo.packages import ICD10, ICD11

# Seventeen thousand substances, organs and plants; codes kept free; and two supplements outside clinical French.
_LEFT_OUT_CHAPTERS = ("Extension Codes", "Codes for special purposes", "Supplementary")
_PASSAGES = (
    "« {label} » est une catégorie de la CIM-11, rangée sous « {parent} » dans le chapitre « {chapter} ». "
    "En anglais : {english}.",
    "{label} (en anglais : {english}). Catégorie supérieure : {parent}. Chapitre de la CIM-11 : {chapter}.",
    "Dans la CIM-11, la rubrique « {parent} » comprend « {label} ». Le terme anglais est « {english} ». "
    "Chapitre : {chapter}.",
    "Terme français : {label}. Terme anglais : {english}. Chapitre de la CIM-11 : {chapter}. "
    "Catégorie supérieure : {parent}.",
)
_SUBTREE_CONCEPTS = range(4, 61)


@dataclass(frozen=True)
class Concept:
    """One ICD-11 entry with clean labels. `parent` and `chapter` are French labels, `unit` the subtree held together.

    `is_leaf` is true when the entry has no children but the "other" and "unspecified" ones, which are left out.
    """

    id: str
    label: str
    english: str
    parent: str
    parent_id: str
    chapter: str
    unit: str
    is_leaf: bool
    children: tuple[str, ...]


def read_icd11(folder: Path) -> list[Concept]:
    """Read the unpacked terminology, without the left-out chapters, residual entries and empty labels; sorted by id."""
    file = next(folder.rglob("cim-11.sqlite3"))
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as connection:
        rows = connection.execute("SELECT idc_id, label, parent_idc_id, label_en FROM cim11").fetchall()
    connection.close()
    labels = {key: (tidy(french or ""), tidy(english or "")) for key, french, _, english in rows}
    parents = {key: parent for key, _, parent, _ in rows}
    children: dict[str, list[str]] = {}
    for key in sorted(labels):
        # "Other" and "unspecified" entries repeat their parent's label, often ungrammatically ("Autres fièvre …").
        if "/mms/" not in key and all(labels[key]) and "|" not in labels[key][0]:
            children.setdefault(parents[key] or "", []).append(key)
    concepts = []
    for chapter in children[""]:
        if not labels[chapter][1].startswith(_LEFT_OUT_CHAPTERS):
            concepts.extend(_chapter_concepts(chapter, labels, children))
    return concepts


def _chapter_concepts(
    chapter: str, labels: Mapping[str, tuple[str, str]], children: Mapping[str, list[str]]
) -> list[Concept]:
    """Walk one chapter; a subtree small enough becomes one unit, a larger one is cut at its children."""
    concepts = []

    def visit(key: str, parent: str, unit: str | None) -> None:
        below = children.get(key, [])
        if unit is None and parent and _size(key, children) < _SUBTREE_CONCEPTS.stop:
            unit = key
        concepts.append(
            Concept(
                id=key,
                label=labels[key][0],
                english=labels[key][1],
                parent=labels[parent][0] if parent else "",
                parent_id=parent,
                chapter=labels[chapter][0],
                unit=unit or key,
                is_leaf=not below,
                children=tuple(below),
            )
        )
        for child in below:
            visit(child, key, unit)

    visit(chapter, "", None)
    return concepts


def _size(key: str, children: Mapping[str, list[str]]) -> int:
    return 1 + sum(_size(child, children) for child in children.get(key, []))


def read_icd10(folder: Path) -> dict[str, str]:
    """Read code → French label of the CIM-10, all chapters, codes in order."""
    with gzip.open(next(folder.rglob("cim10.csv.gz")), "rb") as stream:
        rows = csv.DictReader(io.StringIO(stream.read().decode("utf-8")))
        return {row["code"]: tidy(row["long"]) for row in rows if row["long"]}


def split_units(concepts: Sequence[Concept], shares: Mapping[Split, float], seed: int) -> dict[str, Split]:
    """Give whole subtrees to the held-out sides until each has its share of all concepts; the rest is for training."""
    sizes: dict[str, int] = {}
    for concept in concepts:
        sizes[concept.unit] = sizes.get(concept.unit, 0) + 1
    eligible = sorted(unit for unit, size in sizes.items() if size in _SUBTREE_CONCEPTS)
    random.Random(f"{seed}:icd11 units").shuffle(eligible)
    sides: dict[str, Split] = {}
    for side, share in shares.items():
        taken = 0
        while eligible and taken < share * len(concepts):
            unit = eligible.pop()
            sides[unit] = side
            taken += sizes[unit]
    return {unit: sides.get(unit, "train") for unit in sizes}


def held_out_leaves(
    concepts: Sequence[Concept], sides: Mapping[str, Split], side: Split, forbidden: PhraseIndex
) -> list[Concept]:
    """Return the leaves of one held-out side of which neither label occurs in `forbidden`, one for each label."""
    leaves: dict[str, Concept] = {}
    for concept in concepts:
        if concept.is_leaf and sides[concept.unit] == side and concept.parent_id and concept.parent != concept.chapter:
            seen = concept.label in forbidden or concept.english in forbidden
            # The same word in both languages ("Melanoma") asks nothing, and a one-word label is often within others.
            if not seen and normalised(concept.label) != normalised(concept.english):
                leaves.setdefault(normalised(concept.label), concept)
    return list(leaves.values())


def passage(concept: Concept, seed: int) -> str:
    """Put one concept into words; the template is chosen by the seed and the concept."""
    template = random.Random(f"{seed}:template:{concept.id}").choice(_PASSAGES)
    return template.format(label=concept.label, english=concept.english, parent=concept.parent, chapter=concept.chapter)


def shuffled_passages(concepts: Sequence[Concept], seed: int) -> list[str]:
    """Put concepts into the same templates with every field from another concept: the form without the knowledge."""
    order = list(concepts)
    random.Random(f"{seed}:shuffled").shuffle(order)

    def mixed(index: int) -> Concept:
        english, parent, chapter = (order[(index + step) % len(order)] for step in (1, 2, 3))
        return dataclasses.replace(order[index], english=english.english, parent=parent.parent, chapter=chapter.chapter)

    return [passage(mixed(index), seed) for index in range(len(order))]


def icd11_documents(concepts: Sequence[Concept], sides: Mapping[str, Split], seed: int) -> list[Document]:
    """Return the training texts: a passage for each concept below the chapters, and a list for each inner one."""
    labels = {concept.id: concept.label for concept in concepts}
    units = {concept.id: concept.unit for concept in concepts}
    documents = []
    for concept in concepts:
        if sides[concept.unit] != "train":
            continue
        if concept.parent_id and concept.parent != concept.chapter:
            documents.append(_icd11_document(concept, "passage", passage(concept, seed)))
        known = [labels[child] for child in concept.children if sides[units[child]] == "train"]
        if len(known) >= 2:
            text = f"La rubrique « {concept.label} » de la CIM-11 regroupe : {' ; '.join(known)}."
            documents.append(_icd11_document(concept, "list", text))
    return documents


def _icd11_document(concept: Concept, kind: str, text: str) -> Document:
    number = "".join(re.findall(r"\d+$", concept.id))
    return Document(
        id=f"icd11-{kind}-{number}",
        text=text,
        source="icd11",
        licence=ICD11.licence,
        language="fr",
        split="train",
        group=concept.unit,
    )


def icd10_documents(labels: Mapping[str, str]) -> list[Document]:
    """Return one text for each three-character category of the chapters before V: codes of up to four characters.

    Chapters V to Y repeat one sentence for every place and activity; longer codes repeat one for every joint.
    """
    categories: dict[str, list[str]] = {}
    for code in labels:
        if code[0] not in "VWXY" and len(code) <= 4:
            categories.setdefault(code[:3], []).append(code)
    return [
        Document(
            id=f"icd10-{category}",
            text=_category_text(category, codes, labels),
            source="icd10",
            licence=ICD10.licence,
            language="fr",
            split="train",
            group=category,
        )
        for category, codes in categories.items()
    ]


def _category_text(category: str, codes: Iterable[str], labels: Mapping[str, str]) -> str:
    below = [f"{code[:3]}.{code[3:]}, {labels[code]}" for code in codes if len(code) == 4]
    title = labels.get(category, "")
    if not below:
        return f"Dans la CIM-10, le code {category} désigne : {title}."
    heading = f"la catégorie {category} (« {title} »)" if title else f"la catégorie {category}"
    return f"Dans la CIM-10, {heading} comprend : {' ; '.join(below)}."
