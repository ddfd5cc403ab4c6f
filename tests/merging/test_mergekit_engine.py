"""mergekit as the engine: its own numbers from our recipe, atomically, and nothing passed over in silence."""

from __future__ import annotations

import pytest
import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from merging_models import load_weights
from transformers import LlamaConfig, LlamaForCausalLM

from dapt_merge.errors import DaptMergeError, InputError
from dapt_merge.merging import merge_to_disk, plan_merge
from dapt_merge.merging.mergekit_engine import merge_with_mergekit, mergekit_content
from dapt_merge.recipe import load_recipe


def recipe(folders=None, **keys):
    base, one = ("b", "d") if folders is None else (str(folders["base"]), str(folders["one"]))
    content = {"merge_method": "slerp", "base_model": base, "models": [{"model": one}], "parameters": {"t": [0.2, 0.8]}}
    return load_recipe({**content, "dtype": "float32", "gradient_outer": "mergekit", **keys})


def test_both_engines_make_the_same_tensors_of_one_recipe(models, tmp_path):
    merge_with_mergekit(recipe(models), tmp_path / "mergekit")
    merge_to_disk(plan_merge(recipe(models)), tmp_path / "native")
    found, expected = load_weights(tmp_path / "native"), load_weights(tmp_path / "mergekit")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)
    assert load_recipe(tmp_path / "mergekit" / "recipe.yaml") == recipe(models)
    assert (tmp_path / "mergekit" / "tokenizer.json").is_file() or (tmp_path / "mergekit" / "config.json").is_file()


def test_other_models_of_the_same_names_are_opened_anew(tmp_path, monkeypatch):
    for tied in (True, False):  # the tied one first: its names and shapes must not serve the other
        place = tmp_path / str(tied)
        for name in ("b", "d"):
            config = LlamaConfig(
                vocab_size=32 if tied else 48, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                num_attention_heads=2, tie_word_embeddings=tied,
            )  # fmt: skip
            LlamaForCausalLM(config).save_pretrained(place / name)
        monkeypatch.chdir(place)
        merge_with_mergekit(recipe(), "out")
        for name in ("b", "d"):  # as whoever uses mergekit without us leaves it
            reference = ModelReference.parse(name)
            LoaderCache().loaders[reference] = reference.lazy_loader()
        assert load_weights(place / "out")["model.embed_tokens.weight"].shape == (32 if tied else 48, 16)
        assert ("lm_head.weight" in load_weights(place / "out")) is not tied


def test_a_parameter_of_another_method_is_reported_by_either_engine(models, tmp_path):
    merged = recipe(models, parameters={"t": 0.5, "density": 0.3, "int8_mask": True})
    by_mergekit = merge_with_mergekit(merged, tmp_path / "mergekit").warnings
    assert [warning.partition(" has no effect")[0] for warning in by_mergekit] == ["'density'", "'int8_mask'"]
    assert set(by_mergekit) <= set(merge_to_disk(plan_merge(merged), tmp_path / "native").warnings)


def test_a_failure_of_mergekit_leaves_no_output(models, tmp_path, monkeypatch):
    def fail(*arguments, **keywords):
        raise RuntimeError("no such luck\nsecond line")

    monkeypatch.setattr("mergekit.merge.run_merge", fail)
    with pytest.raises(DaptMergeError, match="mergekit failed: RuntimeError: no such luck") as caught:
        merge_with_mergekit(recipe(models), tmp_path / "out")
    assert "second line" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_and_an_input_are_not_overwritten(models, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists"):
        merge_with_mergekit(recipe(models), tmp_path / "out")
    with pytest.raises(InputError, match="its own input"):
        merge_with_mergekit(recipe(models), models["one"], overwrite=True)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"target": "t"}, "no target"),
        ({"freeze": ["mlp"], "rounding": "stochastic"}, "no freeze, no rounding"),
        ({"gradient_outer": "last"}, "gradient_outer: last"),
        ({"parameters": {"t": {"mlp": 0.2, "rest": 0.5}}}, "setting by group"),
        ({"models": [{"model": "run", "average": {}}]}, "no average"),
        ({"parameters": {"t": 0.5, "dot_threshold": 0.9}}, "no parameter 'dot_threshold'"),
        ({"merge_method": "linear", "models": [{"model": "d", "parameters": {"weight": 0.5}}], "parameters": {}},
         "WiSE-FT"),
        ({"merge_method": "iso_c", "parameters": {}}, "has no merge method 'iso_c'"),
    ],
)  # fmt: skip
def test_what_mergekit_would_ignore_or_lack_is_refused(keys, what):
    with pytest.raises(InputError) as caught:
        mergekit_content(recipe(**keys))
    assert what in caught.value.what
    assert caught.value.remedy


def test_int8_mask_and_slices_are_mergekits_own():
    part = {"sources": [{"model": "d", "layer_range": [0, 1]}]}
    stack = load_recipe({"merge_method": "passthrough", "slices": [part], "seed": 3})
    assert mergekit_content(stack) == {"merge_method": "passthrough", "slices": [part]}
