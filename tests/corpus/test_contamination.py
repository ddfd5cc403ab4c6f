"""Text of the items that judge a model is found in the corpus, named, and told apart from shared wording."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_corpora import texts

from dapt_merge.corpus.contamination import Contact, Detector, ItemRuns, hash_items
from dapt_merge.corpus.shingles import folded


class Search:
    def __init__(self, runs: ItemRuns, folder: Path) -> None:
        runs.save(folder / "runs.npz")
        self._detector = Detector(folder / "runs.npz")

    def contact(self, text: str) -> Contact | None:
        return self._detector.contact(folded(text))


def items(count: int = 20, **more: list[str]) -> dict[str, dict[str, list[str]]]:
    return {"qcm": {f"item-{n}": [text] for n, text in enumerate(texts(count, 7, words=30))} | more}


def test_an_item_inside_a_document_is_found_with_its_share(tmp_path: Path) -> None:
    found = items()
    runs = hash_items(found, 13)
    words = found["qcm"]["item-3"][0].split()
    before, after = texts(2, 8)
    contact = Search(runs, tmp_path).contact(f"{before} {' '.join(words).upper()} ! {after}")
    assert contact is not None
    assert [runs.items[owner].item for owner in contact.shares] == ["item-3"]
    assert list(contact.shares.values()) == [1.0]
    assert contact.words == " ".join(words[:13]).casefold()
    # Half of the words hold a part of the runs.
    half = Search(runs, tmp_path).contact(" ".join(words[:20]))
    assert half is not None
    assert list(half.shares.values()) == [pytest.approx(8 / 18)]


def test_a_document_without_a_whole_run_is_clean(tmp_path: Path) -> None:
    found = items()
    words = found["qcm"]["item-3"][0].split()
    search = Search(hash_items(found, 13), tmp_path)
    assert search.contact(" ".join(words[:12])) is None
    assert search.contact(texts(1, 9)[0]) is None
    assert search.contact("") is None


def test_the_wording_of_the_prompts_is_not_looked_for(tmp_path: Path) -> None:
    prompt = "Voici une question à choix multiple de médecine ; répondez par la lettre de la seule bonne réponse : "
    found = {"qcm": {name: [prompt + text for text in shown] for name, shown in items()["qcm"].items()}}
    runs = hash_items(found, 13)
    search = Search(runs, tmp_path)
    assert search.contact(prompt + texts(1, 9)[0]) is None
    assert search.contact(found["qcm"]["item-0"][0]) is not None
    assert runs.unchecked["qcm"] == 0


def test_a_text_that_a_few_items_share_is_content(tmp_path: Path) -> None:
    passage = texts(1, 11, words=40)[0]
    found = items(18, **{f"about-{n}": [f"{passage} Question {n} ?"] for n in range(3)})
    contact = Search(hash_items(found, 13), tmp_path).contact(passage)
    assert contact is not None
    assert len(contact.shares) == 3


def test_short_items_are_looked_for_whole_and_the_shortest_counted(tmp_path: Path) -> None:
    nine, five = "un deux trois quatre cinq six sept huit neuf", "un deux trois quatre cinq"
    runs = hash_items(items(10, nine=[nine], five=[five]), 13)
    assert runs.unchecked == {"qcm": 1}
    assert runs.lengths == (9, 13)
    search = Search(runs, tmp_path)
    contact = search.contact(f"zéro {nine} dix")
    assert contact is not None
    assert [runs.items[owner].item for owner in contact.shares] == ["nine"]
    assert search.contact(f"zéro {five} dix") is None


def test_every_choice_of_a_question_is_looked_for(tmp_path: Path) -> None:
    question, right, wrong = texts(3, 12, words=20)
    runs = hash_items({"qcm": {"one": [f"{question} {right}", f"{question} {wrong}"]}}, 13)
    for text in (question, right, wrong):
        assert Search(runs, tmp_path).contact(text) is not None


def test_no_items_mean_no_contacts(tmp_path: Path) -> None:
    assert Search(hash_items({}, 13), tmp_path).contact(texts(1, 1)[0]) is None
