"""A run's description is checked key by key, and nothing in it is without effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dapt_merge.errors import InputError
from dapt_merge.presets import preset
from dapt_merge.pretraining import load_pretrain_config

MINIMAL: dict[str, Any] = {"base": "base", "corpus": ["a.jsonl"], "tokens": 1000}


def refusal(*overrides: str, **content: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_pretrain_config({**MINIMAL, **content}, overrides)
    assert caught.value.remedy
    return str(caught.value)


def test_the_smallest_description_is_a_base_a_corpus_and_a_budget() -> None:
    config = load_pretrain_config(MINIMAL)
    assert config.corpus.sources[0].role == "domain"
    assert config.precision == "bf16-master"


def test_an_unknown_key_is_refused_with_the_nearest() -> None:
    assert "Did you mean 'learning_rate'?" in refusal(learning_rte=1e-4)
    assert "Did you mean 'text_field'?" in refusal(corpus=[{"path": "a.jsonl", "text_feild": "t"}])


@pytest.mark.parametrize("missing", ["base", "corpus"])
def test_a_missing_key_is_named(missing: str) -> None:
    with pytest.raises(InputError, match=f"'{missing}' is missing"):
        load_pretrain_config({key: value for key, value in MINIMAL.items() if key != missing})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"epochs": 1}, "either 'tokens' or 'epochs'"),
        ({"tokens": None}, "either 'tokens' or 'epochs'"),
        ({"corpus": [{"path": "a.txt", "role": "replay"}], "replay_share": 0.1}, "no source with the role 'domain'"),
        ({"corpus": ["a.txt", {"path": "b.txt", "role": "replay"}]}, "never be read"),
        ({"replay_share": 0.1}, "no source has the role 'replay'"),
        ({"decay_share": 0.1}, "no effect with the schedule 'cosine'"),
        ({"schedule": "linear", "minimum_rate_share": 0.1}, "no effect with the schedule 'linear'"),
        ({"schedule": "wsd", "warmup_share": 0.9}, "more than the whole run"),
        ({"batch_tokens": 8192, "micro_batch_tokens": 6144}, "must divide"),
        ({"batch_tokens": 3000}, "take 2048 or 4096"),
        ({"corpus": []}, "corpus"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"precision": "fp16"}, "fp16"),
        ({"replay_share": 1.0}, "replay_share"),
        ({"checkpoints": {"every_tokens": 5, "count": 2}}, "give one of"),
        ({"checkpoints": {"at_tokens": []}}, "checkpoints"),
        ({"heldout": [{"path": "x.jsonl"}]}, "needs its 'axis'"),
        ({"heldout": [{"suite": "x.yaml", "axis": "domain"}]}, "states its axis and language itself"),
        ({"early_stop": {"general_rise": 0.1}}, "no effect without 'heldout'"),
        ({"heldout": ["x.yaml"], "early_stop": {}}, "no rule"),
        ({"decay_towards": "base", "weight_decay": 0}, "no effect"),
        ({"decay_towards": "base", "adapter": {}}, "leave out 'decay_towards'"),
        ({"decay_towards": "base", "precision": "bf16"}, "needs float32 weights"),
        ({"bf16_rounding": "nearest"}, "only with 'bf16'"),
        ({"optimizer": "adafactor", "adam_beta1": 0.8}, "'adam_beta1' has no effect"),
        ({"optimizer": "adafactor", "precision": "bf16"}, "goes with the optimizer 'adamw'"),
        ({"adapter": {"rnk": 8}}, "Did you mean 'rank'?"),
    ],
)
def test_contradictions_and_values_out_of_range_are_refused(content: dict[str, Any], said: str) -> None:
    assert said in refusal(**content)


def test_overrides_reach_everywhere() -> None:
    overrides = ["learning_rate=2e-4", "corpus.0=b.jsonl", "schedule=wsd", "decay_share=0.3"]
    config = load_pretrain_config(MINIMAL, overrides)
    assert (config.learning_rate, config.schedule, config.decay_share) == (2e-4, "wsd", 0.3)
    assert str(config.corpus.sources[0].path) == "b.jsonl"
    sources = {**MINIMAL, "corpus": [{"path": "a.jsonl"}]}
    assert load_pretrain_config(sources, ["corpus.0.text_field=note"]).corpus.sources[0].text_field == "note"


def test_an_override_of_something_that_is_not_there_is_refused() -> None:
    assert "'3' is not an index into the list 'corpus'" in refusal("corpus.3.path=x")
    assert "'base' is a text" in refusal("base.path=x")


def test_inputs_are_found_beside_the_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.jsonl").touch()
    (tmp_path / "model").mkdir()
    file = tmp_path / "run.yaml"
    file.write_text("base: model\ncorpus: [notes.jsonl]\nepochs: 1\n", encoding="utf-8")
    config = load_pretrain_config(file)
    assert config.base == str(tmp_path / "model")
    assert config.corpus.sources[0].path == tmp_path / "notes.jsonl"


@pytest.mark.parametrize(
    ("text", "said"),
    [("- a\n", "a mapping"), ("base: [\n", "line 2"), ("", "is empty"), ("a: \xe9".encode("latin1"), "UTF-8")],
)
def test_a_file_that_is_no_description_is_refused(tmp_path: Path, text: str | bytes, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said):
        load_pretrain_config(file)


PRESETS = sorted((Path(__file__).parents[2] / "recipes").glob("pretrain-*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_presets_are_valid_and_say_how_to_run_them(path: Path) -> None:
    config = load_pretrain_config(path)
    assert preset(f"recipes/{path.name}") == path
    text = path.read_text(encoding="utf-8")
    assert f"dapt-merge pretrain recipes/{path.name}" in text
    assert "# Cost:" in text
    assert "# Needs:" in text
    assert config.checkpoints.every_tokens or (config.checkpoints.count or 0) > 1


def test_the_study_preset_holds_the_known_values() -> None:
    config = load_pretrain_config(preset("recipes/pretrain-study-2604.06903-qwen3-8b.yaml"))
    known = {"learning_rate": 2e-5, "schedule": "cosine", "warmup_share": 0, "weight_decay": 0.05, "epochs": 4}
    assert {key: getattr(config, key) for key in known} == known
    assert (config.sequence_length, config.micro_batch_tokens, config.sharding) == (2048, 2048, "fsdp2")
    assert config.batch_sequences % 24 == 0


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("lower-rate", {"learning_rate"}),
        ("replay-1", {"corpus", "replay_share"}),
        ("replay-5", {"corpus", "replay_share", "tokens"}),
        ("replay-25", {"corpus", "replay_share", "tokens"}),
        ("early-stop", {"early_stop", "heldout_every_tokens"}),
        ("towards-base", {"decay_towards", "weight_decay"}),
    ],
)
def test_a_baseline_differs_from_plain_dapt_in_one_thing(name: str, changed: set[str]) -> None:
    plain = load_pretrain_config(preset("recipes/pretrain-baseline.yaml")).model_dump()
    config = load_pretrain_config(preset(f"recipes/pretrain-baseline-{name}.yaml"))
    assert {key for key, value in config.model_dump().items() if value != plain[key]} == changed
    # Equal domain tokens, as nearly as whole steps of 2048 tokens allow.
    domain = config.tokens * (1 - config.replay_share)
    assert abs(domain - plain["tokens"]) < 2048 / 2
