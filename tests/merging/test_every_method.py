"""Recipes in mergekit's dialect, for each method with knobs of its own: from the file to the merged tensors."""

import pytest
import torch
import yaml

from dapt_merge import load_recipe, merge, open_checkpoint
from dapt_merge.methods.apply import combine
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.registry import get_method

MLP, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"


def by_place(first, last, elsewhere):
    """A gradient over the MLPs of the two layers, one value for all other tensors."""
    return [{"filter": "mlp", "value": [first, last]}, {"value": elsewhere}]


# method → the recipe's parameters, and what they come to in an MLP of the last layer, and in the embedding
RECIPES = {
    "della": (
        {"weight": 0.5, "density": by_place(0.3, 0.5, 0.4), "rescale": True, "lambda": 0.9, "int8_mask": True},
        {"weight": 0.5, "density": 0.5, "rescale": "l1", "lambda": 0.9},
        {"weight": 0.5, "density": 0.4, "rescale": "l1", "lambda": 0.9},
    ),
    "della_linear": (
        {"weight": 0.5, "density": 0.6, "epsilon": by_place(0.2, 0.3, 0.4), "normalize": True},
        {"weight": 0.5, "density": 0.6, "epsilon": 0.3, "normalize": True},
        {"weight": 0.5, "density": 0.6, "epsilon": 0.4, "normalize": True},
    ),
    "breadcrumbs": (
        {"weight": 0.5, "density": 0.6, "gamma": by_place(0.0, 0.1, 0.05)},
        {"weight": 0.5, "density": 0.6, "gamma": 0.1},
        {"weight": 0.5, "density": 0.6, "gamma": 0.05},
    ),
    "breadcrumbs_ties": (
        {"weight": 0.5, "density": by_place(0.3, 0.5, 0.4), "normalize": False},
        {"weight": 0.5, "density": 0.5, "normalize": False},
        {"weight": 0.5, "density": 0.4, "normalize": False},
    ),
    "model_stock": (
        {"filter_wise": [{"filter": "mlp", "value": True}, {"value": False}]},
        {"filter_wise": True},
        {"filter_wise": False},
    ),
    "sce": ({"select_topk": by_place(0.3, 0.5, 0.4)}, {"select_topk": 0.5}, {"select_topk": 0.4}),
    "nearswap": ({"t": by_place(1e-4, 3e-4, 5e-4)}, {"t": 3e-4}, {"t": 5e-4}),
    "ram": ({"epsilon": by_place(0, 1e-3, 5e-4)}, {"epsilon": 1e-3}, {"epsilon": 5e-4}),
    "ramplus_tl": (
        {"epsilon": 1e-3, "r": by_place(0, 1, 0.5)},
        {"epsilon": 1e-3, "r": 1},
        {"epsilon": 1e-3, "r": 0.5},
    ),
    "arcee_fusion": ({}, {}, {}),
    "passthrough": ({"scale": by_place(1, 0.5, 0.9)}, {"scale": 0.5}, {"scale": 0.9}),
}


@pytest.mark.parametrize("method", RECIPES)
def test_a_recipe_file_gives_each_tensor_its_parameters(models, tmp_path, method):
    parameters, in_mlp, in_embedding = RECIPES[method]
    declared = get_method(method)
    names = ["one", "two"][: declared.max_models]
    content = {
        "merge_method": method,
        "models": [{"model": str(models[name])} for name in names],
        "base_model": str(models["base"]),
        "parameters": parameters,
        "dtype": "float32",
        "seed": 5,
    }
    if declared.base == "unused":
        del content["base_model"]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    merged = merge(recipe=load_recipe(file))

    inputs = [open_checkpoint(models[name]) for name in ["base", *names]]
    assert set(merged) == set(inputs[0].tensors)
    moved = False
    for name, values in ((MLP, in_mlp), (EMBEDDING, in_embedding)):
        base, *others = [checkpoint.read(name) for checkpoint in inputs]
        expected = combine(declared, base, others, values, TensorContext(name, seed=5))
        assert torch.equal(merged[name], expected), name
        moved |= not torch.equal(merged[name], base)
    assert moved


def test_values_that_do_not_go_together_are_refused_before_any_tensor_is_read(models):
    from dapt_merge.errors import InputError
    from dapt_merge.merging import plan_merge

    content = {
        "merge_method": "della",
        "models": [{"model": str(models["one"])}],
        "base_model": str(models["base"]),
        "parameters": {"weight": 0.5, "density": by_place(0.1, 0.5, 0.5)},
    }
    with pytest.raises(InputError, match=r"density 0\.1 with epsilon 0\.15"):
        plan_merge(load_recipe(content))
