"""The written tasks are lm-eval tasks, and their version follows their items."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dapt_merge.demo.documents import Document, read_jsonl
from dapt_merge.demo.items import SuitePlan, write_choice_task, write_suite, write_text_task
from dapt_merge.demo.questions import Question
from dapt_merge.evaluation.suites import load_suite

TEXTS = [Document(f"d{n}", f"Texte « {n} ».", "icd11", "", "fr", "search", f"g{n}") for n in range(4)]
QUESTION = Question("q1", "Choléra", ("Tumeurs", "Maladies infectieuses", "Maladies de la peau", "Anomalies"), 1, "g")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    tasks, suites = tmp_path / "tasks", tmp_path / "suites"
    tasks.mkdir()
    suites.mkdir()
    write_text_task(tasks, tasks, "search", "icd11_fr_bpb", TEXTS)
    write_choice_task(tasks, tasks, "search", "icd11_chapter_fr", [QUESTION])
    plan = SuitePlan("domain", "domain", "fr", ("icd11_fr_bpb", "icd11_chapter_fr"), "A description.")
    write_suite(suites, "search", plan)
    return tmp_path


def test_a_suite_finds_its_tasks(written: Path) -> None:
    suite = load_suite(written / "suites" / "search-domain.yaml")
    assert suite.tasks == ["demo_search_icd11_fr_bpb", "demo_search_icd11_chapter_fr"]
    assert suite.include_path == [written / "tasks"]


def test_lm_eval_reads_the_tasks_as_they_are_meant(written: Path) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(written / "tasks"), include_defaults=False)
    tasks = manager.load(["demo_search_icd11_fr_bpb", "demo_search_icd11_chapter_fr"])["tasks"]
    text, choice = tasks["demo_search_icd11_fr_bpb"], tasks["demo_search_icd11_chapter_fr"]
    assert [text.doc_to_target(doc) for doc in text.test_docs()] == [document.text for document in TEXTS]
    assert text.higher_is_better() == {"bits_per_byte": False}
    (doc,) = choice.test_docs()
    assert choice.doc_to_text(doc) == "« Choléra »\nChapitre de la CIM-11 :"
    assert choice.doc_to_choice(doc)[choice.doc_to_target(doc)] == "Maladies infectieuses"


def test_other_items_give_another_version(written: Path, tmp_path: Path) -> None:
    def version(folder: Path) -> str:
        return yaml.safe_load((folder / "demo_search_icd11_fr_bpb.yaml").read_text("utf-8"))["metadata"]["version"]

    other = tmp_path / "other"
    other.mkdir()
    write_text_task(other, other, "search", "icd11_fr_bpb", TEXTS[:3])
    assert version(other) != version(written / "tasks")
    write_text_task(other, other, "search", "icd11_fr_bpb", TEXTS)
    assert version(other) == version(written / "tasks")
    assert len(list(read_jsonl(other / "demo_search_icd11_fr_bpb.jsonl"))) == 4
