"""A study's file is read as written, or refused with the key and what to do."""

from __future__ import annotations

import pytest
import yaml
from formula_scorer import study_files

from dapt_merge.errors import InputError
from dapt_merge.presets import preset
from dapt_merge.study import load_study_config
from dapt_merge.study.space import build_space, complete_point


@pytest.fixture
def files(tmp_path):
    return study_files(tmp_path)


def test_a_file_and_its_mapping_give_the_same_study(files, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(files))
    assert load_study_config(path) == load_study_config(files)


def test_paths_are_found_beside_the_file_and_made_absolute(files, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**files, "base": "base", "checkpoints": ["run/checkpoint-10"]}))
    config = load_study_config(path)
    assert config.base == str(tmp_path / "base")
    assert config.checkpoints == [str(tmp_path / "run" / "checkpoint-10")]


def test_overrides_reach_nested_keys(files):
    config = load_study_config(files, ["budget.trials=9", "sampler.name=nsgaii", "space.weight={low: 0, high: 2}"])
    assert (config.budget.trials, config.sampler.name) == (9, "nsgaii")
    assert config.space["weight"] == {"low": 0, "high": 2}


def test_the_direction_follows_from_the_metric(files):
    config = load_study_config(files)
    assert [objective.direction for objective in config.objectives.values()] == ["minimize", "maximize"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("bugdet={trials: 3}", "unknown key 'bugdet'. Did you mean 'budget'"),
        ("budget.trails=3", "unknown key 'trails'. Did you mean 'trials'"),
        ("objectives.domain.metrics=acc", "unknown key 'metrics'. Did you mean 'metric'"),
        ("sampler.name=tpee", "Did you mean 'tpe'"),
        ("budget.trials=1", "greater than or equal to 2"),
        ("budget={}", "no budget"),
        ("base=nowhere", "'nowhere' does not exist"),
        ("objectives={}", "two or more objectives"),
        ("report={objectives: {domain: x}}", "report has suites for domain"),
        ("budget", "not of the form key=value"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_name(files, override, said):
    with pytest.raises(InputError) as refused:
        load_study_config(files, [override])
    assert said in str(refused.value)


@pytest.mark.parametrize("content", ["- a list", "a: [", "42"])
def test_a_file_that_is_no_study_is_refused(tmp_path, content):
    path = tmp_path / "study.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=r"not (valid YAML|a study)"):
        load_study_config(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_study_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["demo", "linear-sweep", "ties-dare", "group-weights"])
def test_a_preset_is_a_valid_study_of_your_own_models(name, files, tmp_path):
    suites = [f"objectives.{side}.suite={tmp_path}/{side}.yaml" for side in ("domain", "general")]
    config = load_study_config(
        preset(f"search/{name}.yaml"), [f"base={files['base']}", f"checkpoints={files['checkpoints']}", *suites]
    )
    space = build_space(config.space, config.base, {"checkpoint-20": "/run/checkpoint-20"})
    for point in config.enqueue:
        complete_point(space, point, "enqueue")


@pytest.mark.parametrize("key", ["tokenizer_source", "space.tokenizer_source", "tokenizer", "space.tokenizer"])
def test_a_vocabulary_is_no_matter_of_a_study_and_the_reason_is_told(files, key):
    with pytest.raises(InputError) as caught:
        load_study_config(files, [f"{key}=base"])
    assert key in caught.value.where
    assert "every recipe on one live model with the base's tokenizer" in caught.value.remedy
    assert "tokenizer_source: BASE" in caught.value.remedy


def test_a_chat_template_is_no_matter_of_a_study(files):
    with pytest.raises(InputError, match="chat_template") as caught:
        load_study_config(files, ["chat_template=chatml"])
    assert "exported trial" in caught.value.remedy


def test_a_base_of_the_hub_without_an_organisation_counts_once_it_was_downloaded(files, tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "hub" / "models--gpt2" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "hub" / "models--gpt2" / "refs").mkdir()
    (tmp_path / "hub" / "models--gpt2" / "refs" / "main").write_text("1" * 40)
    with pytest.raises(InputError, match="'gpt2' does not exist"):
        load_study_config(files, ["base=gpt2"])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_study_config(files, ["base=gpt2"]).base == "gpt2"
