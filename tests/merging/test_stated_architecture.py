"""A model whose architecture the recipe states: the same weights, with that class in the output's config.json."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

from dapt_merge import load_recipe, merge, open_checkpoint
from dapt_merge.merging.chain import merge_chain
from dapt_merge.recipe import load_recipes

STATED = "MistralForCausalLM"


def test_the_output_carries_the_architecture_that_is_stated_for_its_base(models, tmp_path):
    base = {"model": str(models["base"]), "override_architecture": STATED}
    content = {"merge_method": "linear", "base_model": base, "parameters": {"weight": 0.5}}
    plain = {**content, "base_model": str(models["base"])}
    listed = {"models": [{"model": str(models["one"])}]}
    merge(recipe=load_recipe({**content, **listed})).save(tmp_path / "stated")
    merge(recipe=load_recipe({**plain, **listed})).save(tmp_path / "plain")
    config = json.loads((tmp_path / "stated" / "config.json").read_text())
    assert config["architectures"] == [STATED]
    without = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert {**config, "architectures": None} == {**without, "architectures": None}
    stated, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("stated", "plain"))
    assert stated.keys() == expected.keys()
    assert all(torch.equal(stated[name], expected[name]) for name in expected)


def test_it_changes_no_weight_and_no_fingerprint(models):
    plain = open_checkpoint(models["base"])
    stated = open_checkpoint(f"{models['base']}?override_architecture={STATED}")
    assert stated.fingerprint() == plain.fingerprint()
    assert stated.config == {**plain.config, "architectures": [STATED]}


def test_it_can_be_stated_of_another_recipes_output(models, tmp_path):
    file = tmp_path / "chain.yaml"
    one = f"merge_method: passthrough\nmodels: [{{model: {models['one']}}}]\n"
    soup = f"{{model: {{path: soup}}, override_architecture: {STATED}}}"
    file.write_text(f"name: soup\n{one}---\nmerge_method: passthrough\nmodels: [{{model: {soup}}}]\n")
    merge_chain(load_recipes(file), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [STATED]
