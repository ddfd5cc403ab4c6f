"""A built corpus: what is in the folder and its manifest, what a second build reuses, and what is refused."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_corpora import texts, write_jsonl

from dapt_merge.corpus import (
    BuiltCorpus,
    CorpusConfig,
    batches,
    build_corpus,
    corpus_fingerprint,
    load_corpus_config,
    open_corpus,
    tokens,
)
from dapt_merge.corpus.building import load_tokenizer
from dapt_merge.errors import InputError

FOOTER = "Document imprimé par le service informatique"


def long_texts(count: int, seed: int) -> list[str]:
    return texts(count, seed, words=120)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Two domain sources and one of replay, with one fault of each kind."""
    notes = long_texts(30, 1)
    notes = [*notes, notes[3], notes[4] + " et fin", "", "court", "|--|--|" * 30, f"{notes[5]} oÃ¹ 500 Âµg"]
    notes[:25] = [f"{note}\n{FOOTER}" for note in notes[:25]]
    return {
        "sources": [
            {"path": str(write_jsonl(tmp_path / "notes.jsonl", notes)), "licence": "CC-BY-4.0", "language": "fr"},
            {"path": str(write_jsonl(tmp_path / "papers.jsonl", [*long_texts(20, 2), notes[7]]))},
            {"path": str(write_jsonl(tmp_path / "web.jsonl", long_texts(20, 3))), "role": "replay"},
        ],
        "clean": {"language": False},
        "deduplicate": {},
        "replay_share": 0.25,
        "sequence_length": 64,
        "epochs": 2,
        "cache_folder": str(tmp_path / "cache"),
    }


def build(settings: dict[str, Any], tokenizer: Any, out: Path | None = None, **options: Any) -> BuiltCorpus:
    return build_corpus(CorpusConfig.model_validate(settings), tokenizer, out, **options)


def rows_of(corpus: BuiltCorpus) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in corpus.train]


def test_the_manifest_accounts_for_every_document_and_token(settings: dict[str, Any], tokenizer: Any) -> None:
    corpus = build(settings, tokenizer)
    notes, papers, web = corpus.manifest["sources"]
    assert notes["documents_read"] == 36
    assert notes["left_out"] == {
        "near copy": 2,
        "exact copy": 1,
        "empty": 1,
        "shorter than minimum_characters": 1,
        "above maximum_symbol_share": 1,
    }
    assert papers["left_out"] == {"exact copy": 1}
    assert web["left_out"] == {}
    for source in (notes, papers, web):
        assert source["documents_read"] == source["documents_kept"] + sum(source["left_out"].values())
        assert source["tokens_read"] == pytest.approx(source["epochs"] * source["tokens_held"])
    tokens = corpus.manifest["tokens"]
    assert tokens["read"] == len(corpus) * 64 == sum(s["tokens_read"] for s in (notes, papers, web))
    assert abs(tokens["replay_share"] - 0.25) < 0.001
    assert tokens["highest_id"] == max(max(row) for row in rows_of(corpus))
    assert notes["cleaning"]["boilerplate"]["lines"] == {FOOTER: 25}
    assert notes["cleaning"]["unicode"]["documents_changed"] == 1
    assert notes["licence"] == "CC-BY-4.0"


def test_every_document_left_out_is_named_with_its_reason(
    settings: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    corpus = build(settings, tokenizer)
    removed = [json.loads(line) for line in (corpus.folder / "removed.jsonl").read_text(encoding="utf-8").splitlines()]
    reasons = {row["document"]: row["reason"] for row in removed}
    assert len(removed) == 7
    assert reasons[f"{tmp_path}/notes.jsonl:33"] == "empty"
    assert reasons[f"{tmp_path}/notes.jsonl:31"] == f"exact copy of {tmp_path}/notes.jsonl:4"
    assert reasons[f"{tmp_path}/papers.jsonl:21"] == f"exact copy of {tmp_path}/notes.jsonl:8"
    assert reasons[f"{tmp_path}/notes.jsonl:32"].startswith(f"near copy of {tmp_path}/notes.jsonl:5 (similarity 0.9")


def test_the_page_shows_licences_losses_and_copies(settings: dict[str, Any], tokenizer: Any) -> None:
    page = (build(settings, tokenizer).folder / "manifest.md").read_text(encoding="utf-8")
    for said in (
        "CC-BY-4.0",
        "not told",
        "25.0",
        FOOTER,
        "Near copies: 2 documents",
        "Exact copies: 2",
        "Ã",
        "notes.jsonl:32",
    ):
        assert said in page
    # Every row of a table has the cells of its head.
    for block in page.split("\n\n"):
        widths = {line.replace("\\|", "").count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, block


def test_the_folder_is_a_data_set_of_datasets(settings: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    corpus = build(settings, tokenizer, tmp_path / "out")
    plain = datasets.load_from_disk(str(tmp_path / "out" / "train"))
    assert plain.column_names == ["input_ids", "starts", "replay_tokens"]
    assert plain[0]["input_ids"] == rows_of(corpus)[0]
    reopened = open_corpus(tmp_path / "out")
    assert torch.equal(reopened.train[3]["position_ids"], corpus.train[3]["position_ids"])
    assert corpus.tokens_by_role(len(corpus)) == {
        role: corpus.manifest["tokens"][role] for role in ("domain", "replay")
    }


def test_every_stretch_of_rows_has_about_its_share_of_replay(settings: dict[str, Any], tokenizer: Any) -> None:
    corpus = build(settings, tokenizer)
    longest = max(source["tokens_of_a_document"]["longest"] for source in corpus.manifest["sources"])
    for rows in range(len(corpus) + 1):
        found = corpus.tokens_by_role(rows)
        assert sum(found.values()) == rows * 64
        assert abs(found["replay"] - 0.25 * rows * 64) <= 2 * longest


def test_a_second_build_reuses_what_is_the_same(
    settings: dict[str, Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def built(**more: Any) -> BuiltCorpus:
        steps.clear()
        return build({**settings, **more}, tokenizer, on_progress=lambda step, *_: steps.append(step))

    first = built()
    assert {"cleaning", "tokenising", "packing"} <= set(steps)
    assert rows_of(built()) == rows_of(first)
    assert steps == []
    assert len(built(epochs=1)) < len(first)
    assert set(steps) == {"packing"}
    other = built(deduplicate={"near": False})
    assert other.manifest["sources"][0]["documents_kept"] > first.manifest["sources"][0]["documents_kept"]
    assert "cleaning" in steps
    # A change of a text is another corpus, though the file's name is the same.
    write_jsonl(Path(settings["sources"][2]["path"]), long_texts(20, 4))
    assert built().fingerprint != first.fingerprint


def build_and_die(settings: dict[str, Any], tokenizer: Any, out: Path, step: str, workers: Any) -> None:
    def on_progress(at: str, done: int, total: int) -> None:
        if at == step and (done or step == "comparing"):
            workers.send([child.pid for child in multiprocessing.active_children()])
            os.kill(os.getpid(), signal.SIGKILL)

    build(settings, tokenizer, out, on_progress=on_progress)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.parametrize(
    ("step", "again"),
    [
        ("cleaning", {"cleaning", "tokenising", "packing"}),
        ("comparing", {"cleaning", "tokenising", "packing"}),
        ("tokenising", {"tokenising", "packing"}),
        ("packing", {"packing"}),
    ],
)
def test_a_killed_build_goes_on_with_what_was_finished(
    settings: dict[str, Any],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    again: set[str],
) -> None:
    monkeypatch.setattr(batches, "_WORTH_PROCESSES", 1)
    monkeypatch.setattr(tokens, "_WORTH_PROCESSES", 1)
    settings["processes"] = 2
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    child = fork.Process(target=build_and_die, args=(settings, tokenizer, tmp_path / "out", step, there))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    workers = here.recv()
    assert bool(workers) == (step in ("cleaning", "tokenising"))
    patience = time.monotonic() + 30
    while any(map(is_running, workers)) and time.monotonic() < patience:
        time.sleep(0.01)
    assert not [worker for worker in workers if is_running(worker)]
    steps: set[str] = set()
    found = build(settings, tokenizer, tmp_path / "out", on_progress=lambda at, *_: steps.add(at))
    assert {"cleaning", "tokenising", "packing"} & steps == again
    clean = build({**settings, "cache_folder": str(tmp_path / "other")}, tokenizer)
    assert rows_of(found) == rows_of(clean)
    assert found.fingerprint == clean.fingerprint
    # Nothing of the killed build is left beside the finished one.
    assert not [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_another_licence_is_another_manifest_of_the_same_corpus(settings: dict[str, Any], tokenizer: Any) -> None:
    first = build(settings, tokenizer)
    settings["sources"][1] |= {"licence": "Etalab-2.0", "name": "articles"}
    second = build(settings, tokenizer)
    assert second.fingerprint == first.fingerprint
    assert second.manifest["sources"][1]["licence"] == "Etalab-2.0"
    assert "articles" in (second.folder / "removed.jsonl").read_text(encoding="utf-8")


def test_the_fingerprint_is_known_before_the_corpus_is_built(settings: dict[str, Any], tokenizer: Any) -> None:
    config = CorpusConfig.model_validate(settings)
    expected = corpus_fingerprint(config, tokenizer, rows_multiple=4)
    corpus = build_corpus(config, tokenizer, rows_multiple=4)
    assert corpus.fingerprint == expected
    assert len(corpus) % 4 == 0
    assert corpus_fingerprint(config, tokenizer) != expected


@pytest.mark.parametrize("count", [1, 3])
def test_processes_change_nothing(settings: dict[str, Any], tokenizer: Any, tmp_path: Path, count: int) -> None:
    from dapt_merge.corpus import batches, tokens

    expected = rows_of(build(settings, tokenizer))
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((batches, "_WORTH_PROCESSES"), (tokens, "_WORTH_PROCESSES")):
            patch.setattr(module, name, 1)
        patch.setattr(batches, "_DOCUMENTS_AT_ONCE", 4)
        patch.setattr(tokens, "_DOCUMENTS_AT_ONCE", 7)
        other = build({**settings, "cache_folder": str(tmp_path / "other"), "processes": count}, tokenizer)
    assert rows_of(other) == expected


def test_another_corpus_in_the_folder_is_kept(settings: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    notes: list[str] = []
    build(settings, tokenizer, tmp_path / "out")
    build(settings, tokenizer, tmp_path / "out", on_note=notes.append)
    assert "nothing to do" in notes[0]
    with pytest.raises(InputError, match="holds another corpus"):
        build({**settings, "seed": 1}, tokenizer, tmp_path / "out")
    assert build({**settings, "seed": 1}, tokenizer, tmp_path / "out", overwrite=True).manifest["packing"]["seed"] == 1
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="exists already"):
        build(settings, tokenizer, tmp_path / "other")


def test_without_steps_documents_are_taken_as_they_are(tmp_path: Path, tokenizer: Any) -> None:
    found = [*texts(3, 1), "oÃ¹  ", texts(1, 1)[0], " "]
    source = str(write_jsonl(tmp_path / "c.jsonl", found))
    corpus = build({"sources": [source], "sequence_length": 32}, tokenizer)
    assert corpus.manifest["sources"][0]["left_out"] == {"empty": 1}
    text = tokenizer.decode([token for row in rows_of(corpus) for token in row])
    assert "oÃ¹  " in text


def test_a_lone_surrogate_is_replaced_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text('{"text": "une moiti\\u00e9 \\ud83d seule"}\n', encoding="utf-8")
    for clean in (None, {"quality": False, "language": False}):
        corpus = build({"sources": [str(file)], "clean": clean, "sequence_length": 8}, tokenizer)
        assert corpus.manifest["sources"][0]["lone_surrogates_replaced"] == 1


def test_a_trial_reads_the_first_documents_of_each_source(settings: dict[str, Any], tokenizer: Any) -> None:
    corpus = build({**settings, "first_documents": 10}, tokenizer)
    assert [source["documents_read"] for source in corpus.manifest["sources"]] == [10, 10, 10]


@pytest.mark.parametrize("found", [[], ["", "  \n"]])
def test_a_source_without_text_is_refused(tmp_path: Path, tokenizer: Any, found: list[str]) -> None:
    good, bad = write_jsonl(tmp_path / "a.jsonl", texts(3, 1)), write_jsonl(tmp_path / "b.jsonl", found)
    with pytest.raises(InputError, match="source of the corpus is empty") as caught:
        build({"sources": [str(good), str(bad)]}, tokenizer)
    assert caught.value.where == str(bad)


def test_a_source_of_which_nothing_is_left_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl", ["court", "bref"]))
    with pytest.raises(InputError, match=r"shorter than minimum_characters \(2\)"):
        build({"sources": [source], "clean": True}, tokenizer)


def test_a_language_that_cannot_be_told_is_refused_and_one_that_is_not_given_said(
    tmp_path: Path, tokenizer: Any
) -> None:
    file = str(write_jsonl(tmp_path / "a.jsonl", long_texts(3, 1)))
    with pytest.raises(InputError, match="cannot tell 'qq'"):
        build({"sources": [{"path": file, "language": "qq"}], "clean": True}, tokenizer)
    notes: list[str] = []
    build({"sources": [file], "clean": True, "sequence_length": 32}, tokenizer, on_note=notes.append)
    assert any("no language is told for a" in note for note in notes)


def test_a_tokenizer_without_a_separator_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        build({"sources": [str(write_jsonl(tmp_path / "c.jsonl", ["x"]))]}, bare)


def suite_of(folder: Path, items: list[str]) -> Path:
    """A suite of one bits-per-byte task."""
    write_jsonl(folder / "items.jsonl", items)
    task = {
        "task": "held_out_notes",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        "metadata": {"version": 1},
    }
    # JSON is YAML.
    (folder / "held_out_notes.yaml").write_text(json.dumps(task), encoding="utf-8")
    suite = {"name": "held-out", "axis": "domain", "tasks": ["held_out_notes"], "include_path": ["."]}
    (folder / "suite.yaml").write_text(json.dumps(suite), encoding="utf-8")
    return folder / "suite.yaml"


@pytest.mark.parametrize("action", ["remove", "report"])
def test_documents_with_items_of_the_suites_are_found_and_named(
    settings: dict[str, Any], tokenizer: Any, tmp_path: Path, action: str
) -> None:
    items = [*texts(8, 20, words=40), long_texts(30, 1)[6].upper()]
    (tmp_path / "tasks").mkdir()
    suite = suite_of(tmp_path / "tasks", items)
    settings["decontaminate"] = {"suites": [str(suite)], "action": action}
    corpus = build(settings, tokenizer)
    found = corpus.manifest["contamination"]
    (task,) = found["tasks"]
    assert (task["task"], task["items"], task["items_found"], task["documents"]) == ("held_out_notes", 9, 1, 1)
    assert task["largest_share_of_an_item"] == 1.0
    (document,) = found["documents"]
    assert document["document"] == f"{tmp_path}/notes.jsonl:7"
    assert document["items"][0][0] == "held_out_notes"
    contaminated = corpus.manifest["sources"][0]["left_out"].get("contaminated", 0)
    assert contaminated == (1 if action == "remove" else 0)
    page = (corpus.folder / "manifest.md").read_text(encoding="utf-8")
    assert "held_out_notes" in page
    assert "notes.jsonl:7" in page


@pytest.mark.parametrize(("minimum_share", "found"), [(0.0, 1), (0.3, 1), (0.5, 0)])
def test_a_part_of_an_item_counts_from_the_share_asked_for(
    tmp_path: Path, tokenizer: Any, minimum_share: float, found: int
) -> None:
    (item,) = texts(1, 20, words=52)
    suite = suite_of(tmp_path, [item, *texts(8, 21, words=40)])
    # 27 of 52 words hold 15 of 40 runs.
    part = " ".join(item.split()[:27])
    source = str(write_jsonl(tmp_path / "c.jsonl", [*texts(3, 1), part]))
    against = {"suites": [str(suite)], "minimum_share": minimum_share}
    corpus = build({"sources": [source], "decontaminate": against, "sequence_length": 32}, tokenizer)
    contamination = corpus.manifest["contamination"]
    assert contamination["found"] == corpus.manifest["sources"][0]["left_out"].get("contaminated", 0) == found
    assert contamination["tasks"][0]["largest_share_of_an_item"] == 15 / 40
    assert (corpus.folder / "contamination.jsonl").is_file() == bool(found)


def test_a_configuration_is_read_beside_its_inputs_and_checked(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "notes.jsonl", ["x"])
    file = tmp_path / "corpus.yaml"
    file.write_text("sources: [notes.jsonl]\nclean: {quality: {minimum_characters: 9}}\n", encoding="utf-8")
    config = load_corpus_config(file, ["replay_share=0", "clean.language=false"])
    assert config.sources[0].path == tmp_path / "notes.jsonl"
    assert config.clean is not None
    assert config.clean.quality is not None
    assert config.clean.quality.minimum_characters == 9
    assert config.clean.quality.maximum_symbol_share == 0.4
    assert config.clean.language is None
    for wrong, said in (
        ("clean: {qualty: true}", "Did you mean 'quality'"),
        ("clean: {quality: {minimum_chars: 9}}", "Did you mean 'minimum_characters'"),
        ("deduplicate: {near: {treshold: 1}}", "Did you mean 'threshold'"),
        ("tokens: 5\nepochs: 1", "either 'tokens' or 'epochs'"),
        ("sources: [{path: notes.jsonl, weight: 0}]", "weight 0 is never read"),
        ("sources: [notes.jsonl, {path: sub/notes.jsonl}]", "called 'notes' .*notes.jsonl and sub/notes.jsonl"),
        ("sources: []", "sources"),
    ):
        sources = "" if wrong.startswith("sources") else "sources: [notes.jsonl]\n"
        file.write_text(f"{sources}{wrong}\n", encoding="utf-8")
        with pytest.raises(InputError, match=said) as caught:
            load_corpus_config(file)
        assert str(file) in str(caught.value.where)


def test_a_missing_suite_or_tokenizer_is_told(settings: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such suite to decontaminate against") as caught:
        build({**settings, "decontaminate": [str(tmp_path / "none.yaml")]}, tokenizer)
    assert str(caught.value.where) == str(tmp_path / "none.yaml")
    (tmp_path / "bare").mkdir()
    for name, said in (("bare", "holds no tokenizer"), ("none", "cannot be loaded")):
        with pytest.raises(InputError, match=said) as caught:
            load_tokenizer(CorpusConfig.model_validate({**settings, "tokenizer": str(tmp_path / name)}))
        assert str(caught.value.where) == str(tmp_path / name)


@pytest.fixture
def config_file(settings: dict[str, Any], tokenizer: Any, tmp_path: Path) -> Path:
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "corpus.yaml").write_text(json.dumps({**settings, "tokenizer": str(tmp_path / "base")}))
    return tmp_path / "corpus.yaml"


def invoke(*arguments: str) -> Any:
    from typer.testing import CliRunner

    from dapt_merge.cli import build_app

    return CliRunner().invoke(build_app(["corpus"]), ["corpus", *arguments])


def test_the_command_builds_shows_and_prints_json(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke("build", str(config_file), "-o", str(out), "epochs=1").exit_code == 0
    shown = invoke("show", str(out))
    assert "# Corpus xxh3:" in shown.stdout
    manifest = json.loads(invoke("show", str(out), "--json").stdout)
    assert manifest["packing"]["sequence_length"] == 64
    trial = invoke("build", str(config_file), "--trial")
    assert trial.exit_code == 0
    assert "## What was left out" in trial.stdout


@pytest.mark.parametrize(
    "content",
    [b"", b'{"text": "a"}\n{"text": \n', "où".encode("latin1"), gzip.compress(b"{}", mtime=0)],
    ids=["empty", "broken JSON", "latin1", "gzip"],
)
def test_a_bad_source_is_refused_by_the_command(config_file: Path, tmp_path: Path, content: bytes) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(content)
    result = invoke("build", str(config_file), f"sources.1.path={bad}", "-o", str(tmp_path / "out"))
    assert isinstance(result.exception, InputError)
    assert "bad.jsonl" in str(result.exception.where)
    assert result.exception.remedy
    assert not (tmp_path / "out").exists()


def test_the_preset_is_a_corpus() -> None:
    from dapt_merge.presets import preset

    config = load_corpus_config(preset("recipes/corpus-french-biomedical.yaml"))
    assert [source.role for source in config.sources] == ["domain", "replay"]
    assert config.clean is not None
    assert config.decontaminate is not None
