"""Several recipes in one file: the order follows their use, one output is kept, and nothing of the rest."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from merging_models import load_weights

from dapt_merge.errors import InputError
from dapt_merge.merging.chain import merge_chain
from dapt_merge.recipe import load_recipes

UP = "model.layers.0.mlp.up_proj.weight"


def soup(*models, name="soup", **keys):
    return {
        "name": name,
        "merge_method": "linear",
        "models": [{"model": str(model)} for model in models],
        "parameters": {"weight": 1},
        **keys,
    }


def halfway(base, model, **keys):
    entry = {"model": str(model), "parameters": {"weight": 0.5}}
    return {"merge_method": "task_arithmetic", "base_model": str(base), "models": [entry], **keys}


def written(tmp_path, *documents):
    path = tmp_path / "recipes.yaml"
    path.write_text("---\n".join(yaml.safe_dump(document) for document in documents))
    return path


@pytest.mark.parametrize("first", ["used", "user"])
def test_a_recipe_uses_anothers_output_by_its_name_in_any_order_of_the_file(models, tmp_path, first):
    documents = [soup(models["one"], models["two"]), halfway(models["base"], "soup")]
    path = written(tmp_path, *(documents if first == "used" else documents[::-1]))
    report = merge_chain(load_recipes(path), tmp_path / "out")
    base, one, two, found = (load_weights(f) for f in (models["base"], models["one"], models["two"], tmp_path / "out"))
    torch.testing.assert_close(found[UP], base[UP] + 0.5 * ((one[UP] + two[UP]) / 2 - base[UP]), rtol=1e-6, atol=1e-8)
    assert "soup" in report.inputs
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipes.yaml"]


def test_the_output_keeps_all_recipes_and_they_make_it_again(models, tmp_path):
    path = written(tmp_path, soup(models["one"], models["two"]), halfway(models["base"], "soup"))
    first = merge_chain(load_recipes(path), tmp_path / "out")
    again = merge_chain(load_recipes(tmp_path / "out" / "recipe.yaml"), tmp_path / "again")
    assert again.output == first.output


def test_without_an_unnamed_recipe_the_one_that_no_other_uses_is_kept(models, tmp_path):
    path = written(tmp_path, halfway(models["base"], "soup", name="final"), soup(models["one"], models["two"]))
    assert [step.name for step in load_recipes(path)] == ["soup", "final"]


def test_a_name_goes_before_a_folder_of_that_name(models, tmp_path, monkeypatch):
    (tmp_path / "soup").mkdir()
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, soup(models["one"], models["two"]), halfway(models["base"], "soup"))
    assert load_recipes(path)[-1].recipe.references() == (str(models["base"]), "soup")
    merge_chain(load_recipes(path), tmp_path / "out")


def test_overrides_change_the_result_and_a_name_in_front_another(tmp_path):
    path = written(tmp_path, soup("a", "b"), halfway("base", "soup"))
    chain = load_recipes(path, ["weight=0.7", "soup.parameters.weight=2", "soup.models.0.model=c"])
    assert chain[1].recipe.models[0].parameters == {"weight": 0.7}
    assert chain[0].recipe.parameters == {"weight": 2}
    assert chain[0].recipe.references() == ("c", "b")


def test_other_recipes_outputs_can_be_averaged(models, tmp_path):
    mean = {"average": {"checkpoints": ["soup", str(models["two"])]}, "parameters": {"weight": 1.0}}
    last = {"merge_method": "task_arithmetic", "base_model": str(models["base"]), "models": [mean]}
    merge_chain(load_recipes(written(tmp_path, soup(models["base"], models["one"]), last)), tmp_path / "out")
    base, one, two, found = (load_weights(f) for f in (models["base"], models["one"], models["two"], tmp_path / "out"))
    torch.testing.assert_close(found[UP], ((base[UP] + one[UP]) / 2 + two[UP]) / 2, rtol=1e-6, atol=1e-8)


def test_both_engines_carry_a_chain_out_and_it_is_verified(models, tmp_path):
    from dapt_merge.merging.verification import verify_merge

    path = written(tmp_path, soup(models["one"], models["two"]), halfway(models["base"], "soup"))
    native = merge_chain(load_recipes(path), tmp_path / "native")
    theirs = merge_chain(load_recipes(path), tmp_path / "theirs", engine="mergekit")
    assert theirs.engine == "mergekit"
    assert list(native.inputs) == list(theirs.inputs) == [str(models["base"]), "soup"]
    found, expected = load_weights(tmp_path / "native"), load_weights(tmp_path / "theirs")
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-7) for name in found)
    assert verify_merge(tmp_path / "theirs").same
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "recipes.yaml", "theirs"]


def test_names_may_have_dots_and_slashes_as_model_names_do(tmp_path):
    path = written(tmp_path, soup("a", "b", name="us/soup-v0.1"), halfway("base", "us/soup-v0.1"))
    chain = load_recipes(path, ["us/soup-v0.1.parameters.weight=2"])
    assert chain[0].recipe.parameters == {"weight": 2}


def test_an_adapter_can_stand_on_another_recipes_output(models, tmp_path):
    from safetensors.torch import save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    place = "base_model.model.model.layers.0.mlp.up_proj"
    save_file(
        {f"{place}.lora_A.weight": torch.ones(1, 32), f"{place}.lora_B.weight": torch.ones(48, 1)},
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    path = written(tmp_path, soup(models["one"], models["two"]), halfway(models["base"], f"soup+{adapter}"))
    merge_chain(load_recipes(path), tmp_path / "out")
    base, one, two, found = (load_weights(f) for f in (models["base"], models["one"], models["two"], tmp_path / "out"))
    adapted = (one[UP] + two[UP]) / 2 + 1
    torch.testing.assert_close(found[UP], base[UP] + 0.5 * (adapted - base[UP]), rtol=1e-6, atol=1e-7)


def test_a_failure_on_the_way_leaves_nothing(models, tmp_path):
    path = written(tmp_path, soup(models["one"], models["two"]), halfway(tmp_path / "nowhere", "soup"))
    with pytest.raises(InputError, match="no such file"):
        merge_chain(load_recipes(path), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["recipes.yaml"]


@pytest.mark.parametrize(
    ("documents", "what"),
    [
        ([soup("a", "b"), soup("a", "c")], "two recipes are named 'soup'"),
        ([halfway("a", "b"), halfway("a", "c")], "two recipes have no name"),
        ([soup("a", "y", name="x"), soup("a", "x", name="y"), halfway("a", "x")], "x ▸ y ▸ x"),
        ([soup("a", "y", name="x"), soup("a", "x", name="y")], "each is used by another"),
        ([soup("a", "b", name="x"), soup("a", "c", name="y")], "x, y"),
        ([soup("a", "b"), halfway("a", "c")], "nothing uses the recipe 'soup'"),
        ([soup("a", "b", name="x+y"), halfway("a", "x+y")], "the name of recipe 1"),
        ([soup("a", "b", name=7), halfway("a", "7")], "the name of recipe 1 is 7"),
        ([soup("a", "b", merge_metod="x"), halfway("a", "soup")], "Did you mean 'merge_method'?"),
        ([["a"], halfway("a", "b")], "holds a list"),
    ],
)
def test_each_misuse_is_told_with_the_file(tmp_path, documents, what):
    with pytest.raises(InputError) as caught:
        load_recipes(written(tmp_path, *documents))
    assert what in caught.value.what
    assert "recipes.yaml" in caught.value.where
    assert caught.value.remedy


def test_one_recipe_is_expected_where_only_one_has_a_meaning(tmp_path):
    from dapt_merge.recipe import load_recipe

    with pytest.raises(InputError, match="holds 2 recipes"):
        load_recipe(written(tmp_path, soup("a", "b"), halfway("a", "soup")))
