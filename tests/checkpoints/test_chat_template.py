"""Chat templates: found wherever transformers put them, chosen as mergekit does, and written as the only one."""

from __future__ import annotations

import json

import pytest

from dapt_merge.checkpoints import Checkpoint
from dapt_merge.checkpoints.chat_template import chosen_template, stored_template, write_template
from dapt_merge.errors import InputError

ONE, OTHER = "{{ one }}", "{{ other }}"


def model(folder, template=None, **config):
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 8, **config}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return Checkpoint(folder.name, dict.__getitem__, [], folder=folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", ONE),
        ("tokenizer_config.json", json.dumps({"chat_template": ONE})),
        ("chat_template.json", json.dumps({"chat_template": ONE})),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": ONE}]}),
        ),
    ],
)
def test_a_template_is_found_in_each_of_its_places(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    assert stored_template(tmp_path) == ONE


def test_auto_is_what_most_models_have_and_the_first_models_in_a_draw(tmp_path):
    models = [model(tmp_path / "a", ONE), model(tmp_path / "b", OTHER), model(tmp_path / "c")]
    assert chosen_template("auto", models) == ONE
    assert chosen_template("auto", models[::-1]) == OTHER
    assert chosen_template("auto", [*models, model(tmp_path / "d", OTHER + "\n")]) == OTHER
    assert chosen_template("auto", models[2:]) is None


def test_a_name_is_mergekits_built_in_and_a_template_is_itself():
    from importlib import resources

    expected = resources.files("mergekit._data.chat_templates").joinpath("chatml.jinja").read_text()
    assert chosen_template("chatml", []) == expected
    assert chosen_template(ONE, []) == ONE


@pytest.mark.parametrize(("setting", "hint"), [("chatlm", "Did you mean 'chatml'?"), ("no such", "no built-in")])
def test_what_is_neither_is_refused_with_the_nearest_name(setting, hint):
    with pytest.raises(InputError) as caught:
        chosen_template(setting, [])
    assert hint in caught.value.what
    assert caught.value.where == "chat_template"
    assert "chatml" in caught.value.remedy


def test_what_is_written_is_the_only_template_that_transformers_finds(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    plain.chat_template = {"default": OTHER, "rag": OTHER}
    plain.save_pretrained(tmp_path)
    write_template(tmp_path, ONE)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == ONE
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
