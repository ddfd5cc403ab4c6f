"""One file, run by mergekit and by us: the same tensors, and the head and final norm too when the recipe asks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SLERP = {
    "merge_method": "slerp",
    "base_model": "base",
    "models": [{"model": "base"}, {"model": "dapt"}],
    "parameters": {
        "t": [{"filter": "self_attn", "value": [0, 0.5, 0.3]}, {"filter": "mlp", "value": 0.4}, {"value": [0.2, 0.8]}]
    },
    "dtype": "float32",
}
LINEAR = {
    "merge_method": "linear",
    "models": [{"model": "base", "parameters": {"weight": [1, 0.2]}}, {"model": "dapt", "parameters": {"weight": 0.6}}],
    "dtype": "float32",
}
TIES = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "dapt", "parameters": {"weight": [0.3, 0.9]}}, {"model": "dapt2"}],
    "parameters": {"weight": 0.5, "density": [{"filter": "mlp", "value": [0.25, 0.75]}, {"value": 0.5}], "lambda": 0.9},
    "dtype": "float32",
}

# method → parameters, and how many of the two DAPT models it takes
SELECTING = {
    "breadcrumbs": ({"weight": 0.4, "density": [{"filter": "mlp", "value": 0.3}, {"value": 0.6}], "gamma": 0.05}, 2),
    "breadcrumbs_ties": ({"weight": 0.4, "density": 0.5, "normalize": True}, 2),
    "model_stock": ({"filter_wise": [{"filter": "mlp", "value": True}, {"value": False}]}, 2),
    "sce": ({"select_topk": 0.4}, 2),
    "nearswap": ({"t": 0.02}, 1),
    "ram": ({"epsilon": 0.05}, 2),
    "ramplus_tl": ({"epsilon": 0.05, "alpha": 2.0}, 2),
    "arcee_fusion": ({}, 1),
    "della": ({"weight": 0.4, "density": 1.0, "normalize": True}, 2),
    "della_linear": ({"weight": 0.4, "density": 1.0}, 2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    for seed, name in enumerate(("base", "dapt", "dapt2")):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():  # fresh norms are all ones, which no weight could tell apart
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
    return folder


def by_mergekit(content, out):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    # mergekit keeps opened models by name for the life of the process: the same relative name in another test's folder
    # would be that test's model.
    here = {**content, "models": [{**model, "model": str(Path.cwd() / model["model"])} for model in content["models"]]}
    if "base_model" in content:
        here["base_model"] = str(Path.cwd() / content["base_model"])
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(here), str(out), options)
    return tensors(out)


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("content", [SLERP, LINEAR, TIES], ids=lambda content: content["merge_method"])
def test_the_same_file_gives_the_same_model(content, folder, tmp_path, monkeypatch):
    from dapt_merge.merging import merge_to_disk, plan_merge
    from dapt_merge.recipe import load_recipe

    monkeypatch.chdir(folder)
    expected = by_mergekit(content, tmp_path / "mergekit")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    merge_to_disk(plan_merge(load_recipe(file, ["gradient_outer=mergekit"])), tmp_path / "ours")
    found = tensors(tmp_path / "ours")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7, msg=name)

    merge_to_disk(plan_merge(load_recipe(file)), tmp_path / "last")
    by_default = tensors(tmp_path / "last")
    differing = {name for name in found if not torch.equal(found[name], by_default[name])}
    assert differing == {"lm_head.weight", "model.norm.weight"}


@pytest.mark.parametrize("method", SELECTING)
def test_methods_that_select_give_the_same_tensors(method, folder, tmp_path, monkeypatch):
    from dapt_merge import load_recipe, merge

    parameters, count = SELECTING[method]
    content = {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": name} for name in ("dapt", "dapt2")[:count]],
        "parameters": parameters,
        "dtype": "float32",
    }
    if method in ("nearswap", "arcee_fusion"):
        content["models"].insert(0, {"model": "base"})
    monkeypatch.chdir(folder)
    expected = by_mergekit(content, tmp_path / "mergekit")
    found = merge(recipe=load_recipe(content))
    assert set(found) == set(expected)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7, msg=name)
