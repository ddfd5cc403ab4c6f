"""Held-out texts are measured as every score is, change nothing, and end a run by the declared rule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from running import assert_same_weights, details_of, log_of, train
from tiny_corpora import notes, write_jsonl

from dapt_merge.errors import InputError
from dapt_merge.pretraining import training
from dapt_merge.pretraining.config import EarlyStop
from dapt_merge.pretraining.heldout import stop_reason


@pytest.fixture
def watched(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The run of six steps, watched on French domain text and on two kinds of general text."""
    domain = write_jsonl(tmp_path / "domain-fr.jsonl", notes(4, 77))
    english = write_jsonl(tmp_path / "english.jsonl", ["The weather is fine today.", "Hello there, world."])
    german = write_jsonl(tmp_path / "german.jsonl", ["Heute ist das Wetter schön."])
    entries = [
        {"path": str(domain), "axis": "domain", "language": "fr"},
        {"path": str(english), "axis": "general", "language": "en"},
        {"path": str(german), "axis": "general", "language": "de"},
    ]
    return {**settings, "heldout": entries, "learning_rate": 1e-2}


def bits_per_byte(folder: Path, texts: list[str]) -> float:
    """By the definition: −Σ log₂ p of all tokens after an end-of-sequence token, over the UTF-8 bytes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.requires_grad_(False)
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        logs = model(ids).logits[0, :-1].double().log_softmax(-1)
        nats -= float(logs.gather(1, ids[0, 1:, None]).sum())
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def test_bits_per_byte_are_logged_by_axis_and_language_at_the_checkpoints(watched: dict[str, Any]) -> None:
    folders = train(watched)
    lines = log_of(Path(watched["output"]))
    measured = {line["step"]: line["heldout"] for line in lines if "heldout" in line}
    assert list(measured) == [0, 3, 6]
    assert set(measured[6]) == {"domain", "domain/fr", "general", "general/de", "general/en"}
    assert measured[6]["domain"] == pytest.approx(bits_per_byte(folders[-1], notes(4, 77)), rel=1e-4)
    assert measured[6]["general"] == pytest.approx((measured[6]["general/de"] + measured[6]["general/en"]) / 2)
    assert measured[6]["domain"] < measured[0]["domain"]
    assert details_of(folders[-1])["heldout"] == measured[6]


@pytest.mark.slow
def test_the_cadence_in_tokens_is_kept_and_measuring_changes_no_weight(watched: dict[str, Any], tmp_path: Path) -> None:
    plain = {key: value for key, value in watched.items() if key != "heldout"}
    unwatched = train({**plain, "output": str(tmp_path / "plain")}, "adapter.rank=2", "adapter.dropout=0.1")
    folders = train(watched, "adapter.rank=2", "adapter.dropout=0.1", "heldout_every_tokens=128")
    steps = [line["step"] for line in log_of(Path(watched["output"])) if "heldout" in line]
    assert steps == [0, 2, 3, 4, 6]
    assert_same_weights(unwatched[-1], folders[-1])


@pytest.mark.slow
def test_figures_reach_tensorboard(watched: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(watched)
    events = EventAccumulator(str(Path(watched["output"]) / "tensorboard"))
    events.Reload()
    assert {"loss", "grad_norm", "heldout/general/en", "relative_delta_norm"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("heldout/domain")] == [0, 3, 6]


RULE = EarlyStop(general_rise=0.02, domain_gain_per_million_tokens=0.5)


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ([(0, 1.0, 3.0)], None),
        ([(0, 1.0, 3.0), (1_000_000, 1.01, 2.4)], None),
        ([(0, 1.0, 3.0), (1_000_000, 1.03, 2.0)], "risen by 0.0300"),
        ([(0, 1.0, 3.0), (1_000_000, 0.9, 2.0), (1_500_000, 1.03, 1.0)], "risen by 0.0300"),
        ([(0, 1.0, 3.0), (1_000_000, 1.0, 2.0), (3_000_000, 1.0, 1.2)], "fall by 0.4000 a million"),
        ([(0, 1.0, 3.0), (100_000, 1.0, 3.0)], None),  # still warming up
    ],
)
def test_the_rule_for_stopping_early(measured: list[tuple[int, float, float]], said: str | None) -> None:
    figures = [(tokens, {"general": general, "domain": domain}) for tokens, general, domain in measured]
    reason = stop_reason(RULE, figures, warmup_tokens=50_000)
    assert (reason is None) if said is None else (reason is not None and said in reason)


def test_a_run_stops_early_with_a_checkpoint_and_says_why(watched: dict[str, Any]) -> None:
    told: list[str] = []
    rule = ["early_stop.domain_gain_per_million_tokens=1e9", "heldout_every_tokens=256", "checkpoints=1"]
    folders = train(watched, *rule, on_note=told.append)
    assert [folder.name for folder in folders] == ["checkpoint-4"]
    assert "a million tokens" in details_of(folders[-1])["stopped_early"]
    assert any(text.startswith("stopped early: domain bits per byte fall") for text in told)
    again: list[str] = []
    assert train(watched, *rule, on_note=again.append) == folders
    assert "nothing to do" in again[-1]


def test_a_run_killed_between_its_early_stop_and_the_record_does_not_train_on(
    watched: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = ["early_stop.general_rise=1e-9", "heldout_every_tokens=64"]
    monkeypatch.setattr(training, "_tell_of_lost_updates", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(watched, *rule)
    monkeypatch.undo()
    lines: list[dict[str, Any]] = []
    folders = train(watched, *rule, on_log=lines.append)
    assert not lines
    assert "risen" in details_of(folders[-1])["stopped_early"]


def test_a_rule_without_its_text_is_refused_before_training(watched: dict[str, Any]) -> None:
    lacking = {**watched, "heldout": watched["heldout"][:1]}
    with pytest.raises(InputError, match="asks for general text, and there is none"):
        train(lacking, "early_stop.general_rise=0.1")
    # What the refusal left in the folder is no reason to refuse the corrected run.
    assert train(watched, "early_stop.general_rise=100", "checkpoints=1")


def test_a_missing_file_is_refused(watched: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a held-out file is a"):
        train({**watched, "heldout": [{"path": str(tmp_path / "none.jsonl"), "axis": "domain"}]})


def test_a_suite_of_questions_is_refused(watched: dict[str, Any], tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text('{"q": "le patient", "choices": ["fort", "faible"], "a": 0}\n', encoding="utf-8")
    task = {
        "task": "tiny_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "choices",
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    suite = tmp_path / "suite.yaml"
    content = {"name": "questions", "axis": "domain", "tasks": ["tiny_questions"], "include_path": ["tasks"]}
    suite.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(InputError, match="scored by acc, and training is watched in bits_per_byte"):
        train({**watched, "heldout": [str(suite)]})
