"""No held-out label, pair, mechanism or document is trained on: proved on small hand-made sources."""

from __future__ import annotations

import json
import random
import sqlite3
from pathlib import Path

import pytest

from dapt_merge.demo import classifications, drug_interactions, general_prose, questions
from dapt_merge.demo.classifications import Concept
from dapt_merge.demo.documents import Document
from dapt_merge.demo.drug_interactions import Interaction
from dapt_merge.demo.leaks import PhraseIndex, ngrams, normalised

SYLLABLES = ["cardi", "nephr", "gastr", "derm", "oste", "my", "hepat", "pneum", "ot", "rhin"]
ENDINGS = ["ite", "ose", "ome", "algie", "opathie", "ectasie"]


@pytest.fixture
def icd11_folder(tmp_path: Path) -> Path:
    """Two chapters of ten blocks with six leaves each, one residual entry a block, and the extension chapter."""
    rows = [("root/x", "Codes d'extension", None, "Extension Codes"), ("x/1", "Aspirine", "root/x", "Aspirin")]
    for chapter in range(2):
        rows.append((f"c/{chapter}", f"Chapitre {chapter}", None, f"Chapter {chapter}"))
        for block in range(10):
            key = f"b/{chapter}{block}"
            rows.append((key, f"Groupe {chapter} {block}", f"c/{chapter}", f"Group {chapter} {block}"))
            rows.append((f"{key}/mms/other", "Autres groupe", key, "Other group"))
            for leaf, ending in enumerate(ENDINGS):
                word = f"{SYLLABLES[block]}{ending} {'aiguë' if chapter else 'chronique'}"
                english = f"{'acute' if chapter else 'chronic'} {SYLLABLES[block]}{ending}n"
                rows.append((f"l/{chapter}{block}{leaf}", word, key, english))
    file = tmp_path / "pkg" / "cim_11" / "cim-11.sqlite3"
    file.parent.mkdir(parents=True)
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE cim11 (idc_id, label, parent_idc_id, label_en)")
        connection.executemany("INSERT INTO cim11 VALUES (?, ?, ?, ?)", rows)
    connection.close()
    return tmp_path


def test_extension_codes_and_residual_entries_are_not_read(icd11_folder: Path) -> None:
    labels = {concept.label for concept in classifications.read_icd11(icd11_folder)}
    assert len(labels) == 2 + 20 + 120
    assert not labels & {"Aspirine", "Codes d'extension", "Autres groupe"}


def test_whole_subtrees_are_held_out_and_their_labels_occur_nowhere_in_training(icd11_folder: Path) -> None:
    concepts = classifications.read_icd11(icd11_folder)
    sides = classifications.split_units(concepts, {"search": 0.1, "report": 0.2}, seed=3)
    training = [document.text for document in classifications.icd11_documents(concepts, sides, seed=3)]
    index = PhraseIndex(training)
    for side in ("search", "report"):
        leaves = classifications.held_out_leaves(concepts, sides, side, index)
        assert leaves
        for leaf in leaves:
            assert leaf.label not in index
            assert leaf.english not in index
            siblings = [c for c in concepts if c.parent_id == leaf.parent_id]
            assert {sides[c.unit] for c in siblings} == {side}


def test_a_label_that_another_classification_has_is_not_asked(icd11_folder: Path) -> None:
    concepts = classifications.read_icd11(icd11_folder)
    sides = classifications.split_units(concepts, {"report": 0.2}, seed=3)
    leaves = classifications.held_out_leaves(concepts, sides, "report", PhraseIndex([]))
    fewer = classifications.held_out_leaves(concepts, sides, "report", PhraseIndex([f"Autres {leaves[0].label}, SAI"]))
    assert fewer == leaves[1:]


def test_the_control_has_the_same_labels_in_the_wrong_places(icd11_folder: Path) -> None:
    leaves = [concept for concept in classifications.read_icd11(icd11_folder) if concept.is_leaf][:20]
    control = classifications.shuffled_passages(leaves, seed=0)
    assert len(control) == len(leaves)
    for leaf in leaves:
        right = [text for text in control if leaf.label in text and leaf.english in text]
        assert not right
        assert any(leaf.label in text for text in control)
    assert set(control).isdisjoint(classifications.passage(leaf, 0) for leaf in leaves)


def interactions() -> list[Interaction]:
    generator = random.Random(1)
    vocabulary = [f"mot{number}" for number in range(400)]
    found = []
    for number in range(60):
        body = " ".join(generator.choices(vocabulary, k=20)).capitalize() + "."
        found.append(Interaction(f"drogue{number}", f"produit{number}", "contre-indication", body, ""))
        if number % 3 == 0:  # the mirror image, reworded at the end
            found.append(Interaction(f"produit{number}", f"drogue{number}", "contre-indication", body, "Prudence."))
        if number % 4 == 0:  # the same mechanism for another pair
            found.append(Interaction(f"autre{number}", f"produit{number}x", "contre-indication", body, ""))
    return found


def test_no_pair_and_no_run_of_eight_words_is_on_two_sides() -> None:
    held_out, training = drug_interactions.split_interactions(interactions(), {"search": 8, "report": 12}, seed=0)
    assert [document.split for document in held_out].count("search") == 8
    assert [document.split for document in held_out].count("report") == 12
    assert len({document.group for document in held_out}) == 20
    by_side = {
        side: set().union(*(ngrams(d.text) for d in (*held_out, *training) if d.split == side))
        for side in ("train", "search", "report")
    }
    assert not by_side["train"] & by_side["search"]
    assert not by_side["train"] & by_side["report"]
    assert not by_side["search"] & by_side["report"]
    pairs = {side: _drugs(held_out + training, side) for side in by_side}
    assert not pairs["train"] & pairs["search"]
    assert not pairs["train"] & pairs["report"]
    assert not pairs["search"] & pairs["report"]


def _drugs(documents: list[Document], side: str) -> set[str]:
    return {
        word.strip(".,()")
        for document in documents
        if document.split == side
        for word in document.text.split()
        if word.startswith(("drogue", "produit"))
    }


def test_advice_that_lost_its_spaces_and_page_footers_are_repaired(tmp_path: Path) -> None:
    row = {
        "main_drug": "VITAMINE D",
        "plus_drug": "RIFAMPICINE",
        "severity_levels": [{"level": "Précaution d'emploi", "info": "Dosage et supplémentation sinécessaire."}],
        "interaction_mechanism": "Diminution des \nconcentrations.\nThésaurus des interactions médicamenteuses",
        "description": "Précaution d'emploi\nDosage et supplémentation si \nnécessaire.\n\nDiminution",
    }
    (tmp_path / "edition.json").write_text(json.dumps([row]), encoding="utf-8")
    (read,) = drug_interactions.read_interactions(tmp_path)
    assert read.conduct == "Dosage et supplémentation si nécessaire."
    assert read.mechanism == "Diminution des concentrations."
    assert read.level == "précaution d'emploi"


def test_general_documents_that_share_a_passage_are_never_held_out() -> None:
    def document(name: str, text: str) -> Document:
        return Document(name, text, "c4", "", "en", "train", name)

    shared = "all rights reserved by the owner of this very page"
    documents = [document(f"d{n}", f"text number {n} speaks of thing{n} and thing{n}b only here") for n in range(6)]
    documents += [document("s1", f"one {shared}"), document("s2", f"two {shared}")]
    held_out, replay = general_prose.split_general_prose(documents, {"search": 3, "report": 3}, seed=0)
    assert {d.id for d in held_out} == {f"d{n}" for n in range(6)}
    assert {d.id for d in replay} == {"s1", "s2"}


def test_questions_have_the_right_answer_where_they_say(icd11_folder: Path) -> None:
    leaves: list[Concept] = [c for c in classifications.read_icd11(icd11_folder) if c.is_leaf]
    english = {normalised(leaf.label): leaf.english for leaf in leaves}
    for question in questions.translation_questions(leaves[:30], leaves, seed=0):
        assert question.choices[question.answer] == english[normalised(question.question)]
        assert len(set(question.choices)) == 4
    chapters = [f"Chapitre {n}" for n in range(6)]
    asked = questions.chapter_questions(leaves, chapters, seed=0)
    assert all(q.choices[q.answer] in ("Chapitre 0", "Chapitre 1") and len(set(q.choices)) == 4 for q in asked)
    assert {q.answer for q in asked} == {0, 1, 2, 3}


def test_questions_whose_options_point_at_each_other_are_left_out(tmp_path: Path) -> None:
    def row(question: str, *options: str) -> dict[str, str]:
        marks = zip("ABCDE", options, strict=False)
        lines = "\n".join([question, *(f"{mark}. {option}" for mark, option in marks)])
        return {"question": f"{lines}\nAnswer:", "answer": "B"}

    rows = [
        row("What is two and two?", "3", "4", "5", "6"),
        row("Which one?", "red", "green", "both", "none of the above"),
        row("Which one then?", "red", "green", "A and B", "blue"),
        row("Five options?", "1", "2", "3", "4", "5"),
        row("Same twice?", "one", "One", "two", "three"),
    ]
    file = tmp_path / "sandbagging" / "samples-all-large.jsonl"
    file.parent.mkdir()
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (kept,) = questions.read_mmlu(tmp_path)
    assert (kept.question, kept.choices[kept.answer]) == ("What is two and two?", "4")
    sides = questions.shared_out([kept] * 5, 2, "key")
    assert (len(sides["search"]), len(sides["report"])) == (2, 3)
