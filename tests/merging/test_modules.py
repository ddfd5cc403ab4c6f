"""mergekit's modules: each tensor is some module's, each module has its models or slices, and none may be missing."""

from __future__ import annotations

import pytest
import torch
import yaml
from merging_models import load_weights

from dapt_merge.errors import InputError
from dapt_merge.merging import merge_to_disk, plan_merge
from dapt_merge.merging.modules import check_modules, module_of
from dapt_merge.recipe import load_recipe, recipe_fingerprint, recipe_warnings

VISION = ("text_decoder", "multi_modal_projector", "vision_tower")


@pytest.mark.parametrize(
    ("name", "modules", "owner"),
    [
        ("model.layers.0.mlp.up_proj.weight", ("default",), "default"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", ("encoder", "decoder", "shared"), "encoder"),
        ("decoder.block.0.layer.1.EncDecAttention.q.weight", ("encoder", "decoder", "shared"), "decoder"),
        ("shared.weight", ("encoder", "decoder", "shared"), "shared"),
        ("lm_head.weight", ("encoder", "decoder", "default"), "default"),
        ("lm_head.weight", ("encoder", "decoder"), None),
        ("model.encoder.layers.3.fc1.weight", ("model.encoder.layers", "model.decoder.layers", "default"),
         "model.encoder.layers"),
        ("model.language_model.layers.0.mlp.up_proj.weight", VISION, "text_decoder"),
        ("language_model.model.embed_tokens.weight", VISION, "text_decoder"),
        ("lm_head.weight", VISION, "text_decoder"),
        ("model.visual.blocks.0.norm1.weight", VISION, "vision_tower"),
        ("model.visual.merger.linear_fc1.weight", VISION, "multi_modal_projector"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", VISION, "vision_tower"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", ("text_decoder",), None),
    ],
)  # fmt: skip
def test_a_tensor_belongs_to_the_module_that_its_name_says(name, modules, owner):
    assert module_of(name, modules) == owner


@pytest.mark.parametrize(
    ("modules", "what", "where"),
    [
        (("encoder", "decoder"), "belong to none of the modules, the first is 'shared.weight'", "modules"),
        (("encoder", "decodr", "shared"), "no module 'decodr'. Did you mean 'decoder'?", "modules.decodr"),
    ],
)
def test_a_module_too_few_or_too_many_is_told(modules, what, where):
    names = ["encoder.block.0.w", "decoder.block.0.w", "shared.weight"]
    with pytest.raises(InputError) as caught:
        check_modules(modules, names, "t5")
    assert what in caught.value.what
    assert caught.value.where == where
    assert caught.value.remedy


def content(models, **keys):
    inner = {"models": [{"model": str(models["base"])}, {"model": str(models["one"])}]}
    return {
        "merge_method": "slerp",
        "base_model": str(models["base"]),
        "modules": {"default": inner},
        "parameters": {"t": [0.2, 0.8]},
        **keys,
    }


def test_the_only_module_is_the_whole_model(models, tmp_path):
    by_module = load_recipe(content(models))
    whole = content(models)
    whole |= whole.pop("modules")["default"]
    plain = load_recipe(whole)
    merge_to_disk(plan_merge(by_module), tmp_path / "module")
    merge_to_disk(plan_merge(plain), tmp_path / "plain")
    found, expected = load_weights(tmp_path / "module"), load_weights(tmp_path / "plain")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    inputs = {str(path): name for name, path in models.items()}
    assert recipe_fingerprint(by_module, inputs) == recipe_fingerprint(plain, inputs)


def test_a_modules_parameters_come_before_the_recipes(models):
    recipe = content(models)
    recipe["modules"]["default"]["parameters"] = {"t": 0.3}
    plan = plan_merge(load_recipe(recipe))
    assert {job.parameters.values["t"] for job in plan.jobs} == {0.3}
    assert recipe_warnings(load_recipe(recipe)) == ["parameters.t has no effect: every module has its own 't'."]


def test_it_is_written_and_read_back(models):
    recipe = load_recipe(content(models))
    assert load_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_a_short_override_finds_a_modules_parameter(models):
    recipe = content(models)
    recipe["modules"]["default"]["parameters"] = {"t": 0.3}
    assert load_recipe(recipe, ["t=0.7"]).modules["default"].parameters == {"t": 0.7}


@pytest.mark.parametrize(
    ("modules", "what", "where"),
    [
        ({"default": {}}, "'models' is missing", "modules.default.models"),
        ({"default": {"models": []}}, "at least 1", "modules.default.models"),
        ({"default": {"model": []}}, "Did you mean 'models'?", "modules.default.model"),
        ({"default": {"models": [{"model": "b"}, {"model": "b"}]}}, "listed twice", "modules.default.models.1.model"),
        ({"default": {"models": [{"modle": "b"}]}}, "Did you mean 'model'?", "modules.default.models.0.modle"),
        ({"default": {"models": [{"model": "d"}], "slices": [{"sources": [{"model": "b", "layer_range": [0, 1]}]}]}},
         "the module has both", "modules.default.slices"),
        ({"default": {"models": [{"model": "d"}], "parameters": {"tt": 1}}}, "no parameter 'tt'",
         "modules.default.parameters.tt"),
        ("default", "a mapping", "modules"),
    ],
)  # fmt: skip
def test_each_fault_is_told_with_its_place(modules, what, where):
    recipe = {"merge_method": "slerp", "base_model": "b", "modules": modules, "parameters": {"t": 0.5}}
    with pytest.raises(InputError) as caught:
        load_recipe(recipe)
    assert what in caught.value.what
    assert caught.value.where.endswith(where)
    assert caught.value.remedy
