"""Every kind of merge is made again from its report alone, from any folder, and a changed tensor or file is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from merging_models import CONFIG, load_weights, random_weights, save_model
from safetensors.torch import load_file, save_file

from dapt_merge.errors import InputError
from dapt_merge.merging import merge_to_disk, plan_merge
from dapt_merge.merging.chain import merge_chain
from dapt_merge.merging.mergekit_engine import merge_with_mergekit
from dapt_merge.merging.verification import verify_merge
from dapt_merge.recipe import load_recipe, load_recipes

UP = "model.layers.1.mlp.up_proj.weight"


def halfway(*models, method="task_arithmetic", weight=0.5, **keys):
    entries = [{"model": model, "parameters": {"weight": weight}} for model in models]
    return {"merge_method": method, "base_model": "base", "models": entries, **keys}


def native(content):
    merge_to_disk(plan_merge(load_recipe(content)), "out")


def chain():
    soup = {"name": "soup", "merge_method": "linear", "models": [{"model": "one"}, {"model": "two"}]}
    documents = [halfway("soup", "one"), soup | {"parameters": {"weight": 1}, "out_dtype": "bfloat16"}]
    with open("chain.yaml", "w") as file:
        yaml.safe_dump_all(documents, file)
    merge_chain(load_recipes("chain.yaml"), "out")


def average_of_a_run():
    for step, name in ((10, "one"), (20, "two")):
        shutil.copytree(name, f"run/checkpoint-{step}")
    entry = {"model": "run", "average": {"decay": 0.5}, "parameters": {"weight": 0.5}}
    native(halfway() | {"models": [entry]})


def average_of_a_list():
    entry = {"average": {"checkpoints": ["one", "two"]}, "parameters": {"weight": 0.5}}
    native(halfway() | {"models": [entry]})


def statistics():
    for name in ("one", "two"):
        numbers = {tensor: value.square() for tensor, value in load_weights(Path(name)).items()}
        about = {"format": "dapt-merge statistics 1", "kind": "fisher", "model": "xxh3:0"}
        save_file(numbers, f"{name}.fisher.safetensors", about)
    entries = [{"model": n, "parameters": {"fisher": f"{n}.fisher.safetensors"}} for n in ("one", "two")]
    native({"merge_method": "fisher", "models": entries})


def adapter():
    shape = load_weights(Path("base"))[UP].shape
    tensors = {"lora_A": torch.randn(2, shape[1]), "lora_B": torch.randn(shape[0], 2)}
    prefix = f"base_model.model.{UP.removesuffix('.weight')}"
    Path("adapter").mkdir()
    save_file({f"{prefix}.{n}.weight": t for n, t in tensors.items()}, "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    with open("adapter/adapter_config.json", "w") as file:
        json.dump(config | {"base_model_name_or_path": "somewhere/else"}, file)
    native(halfway("base+adapter", "adapter"))


def aligned_vocabularies():
    weights = random_weights(5)
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:90].clone()
    tokens = {"new": 0, **{f"token{n}": n for n in range(1, 90)}}
    save_model(Path("other"), weights, CONFIG | {"vocab_size": 90}, tokens)
    native(halfway("other", tokenizer_source="union"))


def stacked_layers():
    ranges = (("base", [0, 2]), ("one", [1, 2]))
    slices = [{"sources": [{"model": model, "layer_range": layers}]} for model, layers in ranges]
    native({"merge_method": "passthrough", "slices": slices})


def instruct_target():
    native(halfway("one", target="two", rounding="stochastic", out_dtype="bfloat16"))


def by_mergekit():
    content = {"merge_method": "slerp", "base_model": "base", "models": [{"model": "one"}], "parameters": {"t": 0.3}}
    merge_with_mergekit(load_recipe(content | {"dtype": "float32"}), "out")


KINDS = [
    chain,
    average_of_a_run,
    average_of_a_list,
    statistics,
    adapter,
    aligned_vocabularies,
    stacked_layers,
    instruct_target,
    by_mergekit,
]


@pytest.fixture
def folder(models, tmp_path, monkeypatch):
    """A folder to work in, with copies of the checkpoints that relative paths name."""
    for name in ("base", "one", "two"):
        shutil.copytree(models[name], tmp_path / "work" / name)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_an_untouched_output_is_the_same_and_a_changed_tensor_or_file_is_named(make, folder, monkeypatch):
    make()
    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.chdir(folder.parent)
    found = verify_merge("work/out")
    assert found.same, (found.differing, found.files)
    assert found.tensors == len(load_weights(folder / "out"))
    assert sorted(path.name for path in folder.iterdir()) == before, "nothing is left behind"

    (weights,) = (folder / "out").glob("*.safetensors")
    tensors = load_file(weights)
    tensors[UP][1, 2] += 0.5
    save_file(tensors, weights)
    config = folder / "out" / "config.json"
    config.write_text(config.read_text().replace("10000", "500000"))
    found = verify_merge("work/out")
    assert list(found.differing) == [UP]
    assert found.differing[UP].startswith("1 of ")
    assert list(found.files) == ["config.json"]
    assert found.changed_afterwards


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_what_goes_out_with_the_model_says_nothing_of_where_it_was_made(make, folder):
    make()
    for path in (folder / "out").iterdir():
        if path.suffix in (".md", ".json", ".yaml", ".yml"):
            assert str(folder.parent) not in path.read_text(), path.name


def test_the_way_to_the_inputs_is_told_from_the_output(folder, monkeypatch):
    plan = plan_merge(load_recipe(halfway("one")))
    for out, way in (("out", ".."), ("a/b/out", "../../.."), ("../beside/out", "../../work")):
        assert merge_to_disk(plan, out).working_folder == way
    monkeypatch.chdir("/")
    assert verify_merge(folder.parent / "beside" / "out").same


def test_a_recipe_of_a_chain_whose_input_changed_is_told(folder):
    chain()
    weights = load_weights(folder / "two")
    weights[UP] += 1
    save_file(weights, folder / "two" / "model.safetensors")
    with pytest.raises(InputError, match="'two' is not the checkpoint that was merged"):
        verify_merge("out")


def test_other_statistics_are_told(folder):
    statistics()
    numbers = load_file("one.fisher.safetensors")
    about = {"format": "dapt-merge statistics 1", "kind": "fisher", "model": "xxh3:0"}
    save_file({name: value + 1 for name, value in numbers.items()}, "one.fisher.safetensors", about)
    with pytest.raises(InputError, match="the statistics are not those of the merge"):
        verify_merge("out")


def test_a_statistics_file_that_moved_can_be_given(folder):
    statistics()
    (folder / "one.fisher.safetensors").rename(folder / "kept.safetensors")
    with pytest.raises(InputError, match=r"'one.fisher.safetensors' is gone"):
        verify_merge("out")
    assert verify_merge("out", located={"one.fisher.safetensors": "kept.safetensors"}).same
