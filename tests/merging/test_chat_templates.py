"""`chat_template:` in a merge: settled before any work, written beside the weights, part of what the merge is."""

from __future__ import annotations

import pytest
from merging_models import random_weights, save_model

from dapt_merge.errors import InputError
from dapt_merge.merging import merge_to_disk, plan_merge
from dapt_merge.merging.verification import verify_merge
from dapt_merge.recipe import load_recipe, recipe_fingerprint

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def recipe(base, dapt, **keys):
    entry = {"model": str(dapt), "parameters": {"weight": 0.5}}
    return load_recipe({"merge_method": "task_arithmetic", "base_model": str(base), "models": [entry], **keys})


@pytest.fixture
def chat(models, tmp_path):
    """A DAPT model that has a template, where its base has none."""
    folder = save_model(tmp_path / "chat", random_weights(7))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def written(plan, out):
    merge_to_disk(plan, out)
    path = out / "chat_template.jinja"
    return path.read_text() if path.is_file() else None


def test_it_is_the_models_the_built_in_or_the_template_itself(models, chat, tmp_path):
    for number, (setting, start) in enumerate({"auto": TEMPLATE, "chatml": "{% for", "{{ 1 }}": "{{ 1 }}"}.items()):
        plan = plan_merge(recipe(models["base"], chat, chat_template=setting))
        assert written(plan, tmp_path / f"{number}").startswith(start)
    assert written(plan_merge(recipe(models["base"], chat)), tmp_path / "without") is None


def test_it_is_verified_with_the_rest(models, chat, tmp_path):
    written(plan_merge(recipe(models["base"], chat, chat_template="auto")), tmp_path / "out")
    assert verify_merge(tmp_path / "out").same
    (tmp_path / "out" / "chat_template.jinja").write_text("another")
    assert not verify_merge(tmp_path / "out").same


def test_where_it_can_do_nothing_the_plan_says_why(models, tmp_path):
    plan = plan_merge(recipe(models["base"], models["one"], chat_template="auto"))
    assert plan.warnings == ("chat_template has no effect: none of the models has one",)
    bare = save_model(tmp_path / "bare", random_weights(8), tokens=None)
    plan = plan_merge(recipe(bare, models["one"], chat_template="chatml"))
    assert any("has no tokenizer to carry it" in warning for warning in plan.warnings)


def test_a_name_that_is_none_is_refused_before_the_merge(models):
    with pytest.raises(InputError, match="Did you mean 'chatml'"):
        plan_merge(recipe(models["base"], models["one"], chat_template="chatlm"))


def test_it_is_part_of_the_fingerprint(models):
    inputs = {str(models[name]): name for name in ("base", "one")}
    plain, spoken = (recipe(models["base"], models["one"], **keys) for keys in ({}, {"chat_template": "chatml"}))
    assert recipe_fingerprint(plain, inputs) != recipe_fingerprint(spoken, inputs)
