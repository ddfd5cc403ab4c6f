"""What the README shows is what the tool takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def yaml_block(name: str) -> dict:
    return next(yaml.safe_load(block) for block in blocks("yaml") if block.startswith(f"# {name}"))


def test_the_pretrain_file_is_a_run():
    from dapt_merge.pretraining import load_pretrain_config

    assert load_pretrain_config(yaml_block("pretrain.yaml")).checkpoints.count == 8


def test_the_corpus_file_is_a_corpus_and_its_steps_go_into_a_run():
    from dapt_merge.corpus import load_corpus_config
    from dapt_merge.pretraining import load_pretrain_config

    content = yaml_block("corpus.yaml")
    config = load_corpus_config(content)
    assert [source.role for source in config.sources] == ["domain", "replay"]
    steps = {key: content[key] for key in ("sources", "clean", "deduplicate", "decontaminate")}
    run = load_pretrain_config({**yaml_block("pretrain.yaml"), "corpus": steps})
    assert run.corpus == config.documents


def test_what_can_be_added_to_the_pretrain_file_is_known():
    from dapt_merge.pretraining import load_pretrain_config

    config = load_pretrain_config({**yaml_block("pretrain.yaml"), **yaml_block("more of pretrain.yaml")})
    assert [entry.axis for entry in config.heldout] == [None, "general"]


def test_the_merge_file_is_a_recipe():
    from dapt_merge.recipe import load_recipe

    assert load_recipe(yaml_block("ties.yaml")).merge_method == "ties"


def test_the_fisher_file_is_a_recipe():
    from dapt_merge.recipe import load_recipe

    assert load_recipe(yaml_block("fisher.yaml")).merge_method == "fisher"


def test_the_options_that_it_shows_exist():
    from typer.main import get_command

    from dapt_merge import cli

    commands = get_command(cli.build_app()).commands
    for line in re.findall(r"^dapt-merge .+", README, flags=re.MULTILINE):
        words = line.split("#")[0].split()
        command = commands[words[1]]
        command = command.commands[words[2]] if hasattr(command, "commands") else command
        options = {option for parameter in command.params for option in parameter.opts}
        assert options.issuperset(word for word in words[2:] if word.startswith("-")), line


def test_the_vocabulary_file_is_a_recipe():
    from dapt_merge.recipe import load_recipe

    settings = load_recipe(yaml_block("vocabulary.yaml")).vocabulary
    assert (settings.source, list(settings.tokens), settings.pad_to_multiple_of) == ("union", ["<|pad|>"], 64)


def test_the_study_file_is_a_study():
    from dapt_merge.study.config import StudyConfig

    study = StudyConfig.model_validate(yaml_block("study.yaml"))
    assert set(study.report.objectives) == set(study.objectives)


def test_the_suite_file_is_a_suite():
    from dapt_merge.evaluation import Suite

    assert Suite.model_validate(yaml_block("suites/domain.yaml")).axis == "domain"


def test_the_method_of_ones_own_works_and_is_under_twenty_lines():
    import dapt_merge as dm
    from dapt_merge.methods.registry import get_method

    source = next(block for block in blocks("python") if "def capped" in block)
    assert len(source.strip().splitlines()) < 20
    exec(source, {})
    base, dapt = {"w": torch.zeros(3)}, {"w": torch.tensor([-1.0, 0.0005, 1.0])}
    merged = dm.merge(base, dapt, method="capped", cap=0.001)
    torch.testing.assert_close(merged["w"], torch.tensor([-0.001, 0.0005, 0.001]))
    assert get_method("capped").parameter("cap").default == 1e-3


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^dapt-merge (\w+)", README, flags=re.MULTILINE))))
def test_every_command_exists(line):
    from dapt_merge import cli

    assert line in cli._COMMANDS
