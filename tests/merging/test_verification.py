"""A merge recomputed from its own report: the same bits, or which tensors differ, or why that cannot be told."""

import json
import shutil

import pytest
import torch
from merging_models import load_weights, save_model
from safetensors.torch import save_file

from dapt_merge import merge
from dapt_merge.errors import InputError
from dapt_merge.merging.verification import verify_merge


@pytest.fixture
def inputs(models, tmp_path, monkeypatch):
    """Copies of the checkpoints, named by relative paths from the current folder."""
    for name in ("base", "one", "two"):
        shutil.copytree(models[name], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(folder, change):
    weights = load_weights(folder)
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {"weight": 0.3}),
        ("slerp", {"t": 0.5, "out_dtype": "bfloat16"}),
        ("ties", {"weight": 0.6, "density": 0.4, "trim_scope": "model"}),
        ("dare_linear", {"weight": 0.5, "density": 0.5, "seed": 3, "out_dtype": "bfloat16"}),
    ],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_an_untouched_output_is_the_same_bit_for_bit(inputs, method, options, threads):
    merge("base", "one", method, **options).save("out", shard_bytes=10_000)
    found = verify_merge("out", threads=threads)
    assert found.same
    assert not found.changed_afterwards
    assert found.tensors == len(load_weights(inputs / "out"))


def test_a_single_changed_bit_is_found_and_its_tensor_named(inputs):
    merge("base", "one", "linear", weight=0.3).save("out")
    name = "model.layers.1.mlp.up_proj.weight"

    def flip(weights):
        weights[name].view(torch.int32)[2, 3] ^= 1

    edit(inputs / "out", flip)
    found = verify_merge("out")
    assert list(found.differing) == [name]
    assert found.differing[name].startswith("1 of ")
    assert found.changed_afterwards


def test_missing_additional_and_converted_tensors_are_named(inputs):
    merge("base", "one", "linear", weight=0.3).save("out")

    def change(weights):
        del weights["model.norm.weight"]
        weights["extra"] = torch.ones(1)
        weights["model.layers.0.input_layernorm.weight"] = weights["model.layers.0.input_layernorm.weight"].half()

    edit(inputs / "out", change)
    differing = verify_merge("out").differing
    assert differing["model.norm.weight"] == "missing"
    assert differing["extra"] == "not part of the merge"
    assert "float16" in differing["model.layers.0.input_layernorm.weight"]
    assert len(differing) == 3


def test_it_works_from_any_folder_and_for_an_output_that_was_moved(inputs, tmp_path, monkeypatch):
    merge("base", "one", "linear", weight=0.3).save("out")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (inputs / "out").rename(elsewhere / "moved")
    monkeypatch.chdir(elsewhere)
    assert verify_merge("moved").same


def test_an_input_that_moved_can_be_given(inputs):
    merge("base", "one", "linear", weight=0.3).save("out")
    (inputs / "one").rename(inputs / "archive")
    with pytest.raises(InputError, match="'one' is gone") as error:
        verify_merge("out")
    assert "one=PATH" in str(error.value)
    assert verify_merge("out", located={"one": "archive"}).same
    with pytest.raises(InputError, match="no input 'three'"):
        verify_merge("out", located={"three": "archive"})


def test_an_input_whose_content_changed_cannot_verify_anything(inputs):
    merge("base", "one", "linear", weight=0.3).save("out")
    edit(inputs / "one", lambda weights: weights["model.norm.weight"].add_(1))
    with pytest.raises(InputError, match="'one' is not the checkpoint that was merged"):
        verify_merge("out")


def test_inputs_that_were_in_memory_are_gone(inputs):
    base = load_weights(inputs / "two")
    merge(base, {name: tensor + 1 for name, tensor in base.items()}, "linear", weight=0.5).save("out")
    with pytest.raises(InputError, match=r"is gone|is not the checkpoint"):
        verify_merge("out")


@pytest.mark.parametrize("text", [None, "", "[]", '{"recipe": "x"}', '{"recipe": 1, "inputs": {}, "output": "x"}'])
def test_a_folder_without_a_whole_report_is_refused(inputs, text):
    folder = save_model(inputs / "plain", load_weights(inputs / "base"))
    if text is not None:
        (folder / "merge_report.json").write_text(text)
    with pytest.raises(InputError, match="report"):
        verify_merge(folder)


def test_other_versions_are_told(inputs):
    merge("base", "one", "linear", weight=0.3).save("out")
    path = inputs / "out" / "merge_report.json"
    report = json.loads(path.read_text())
    report["versions"]["torch"] = "0.1"
    path.write_text(json.dumps(report))
    assert verify_merge("out").other_versions["torch"][0] == "0.1"
