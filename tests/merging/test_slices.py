"""Layer stacks: which layer comes from where, what the configuration says, and mergekit's same tensors."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import yaml
from merging_models import CONFIG, load_weights, random_weights, save_model

from dapt_merge.errors import InputError
from dapt_merge.merging import merge_to_disk, plan_merge
from dapt_merge.recipe import load_recipe, recipe_fingerprint, recipe_warnings

GIVEN = {"a": "xxh3:01", "b": "xxh3:02"}


def passthrough(*ranges, **keys):
    slices = [{"sources": [{"model": str(model), "layer_range": list(span)}]} for model, span in ranges]
    return {"merge_method": "passthrough", "slices": slices, **keys}


def merged(content, out):
    merge_to_disk(plan_merge(load_recipe(content)), out)
    return load_weights(out), json.loads((out / "config.json").read_text())


def layer(weights, number):
    start = f"model.layers.{number}."
    return {name.removeprefix(start): tensor for name, tensor in weights.items() if name.startswith(start)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class TestLayout:
    def test_layers_are_copied_bit_for_bit_and_numbered_anew(self, models, tmp_path):
        content = passthrough((models["one"], (0, 2)), (models["two"], (1, 2)), (models["one"], (0, 1)))
        weights, config = merged(content, tmp_path / "out")
        one, two = load_weights(models["one"]), load_weights(models["two"])
        expected = [layer(one, 0), layer(one, 1), layer(two, 1), layer(one, 0)]
        assert all(same(layer(weights, number), wanted) for number, wanted in enumerate(expected))
        assert config["num_hidden_layers"] == 4
        assert not layer(weights, 4)

    def test_the_embedding_is_the_first_slices_and_the_final_norm_the_last_ones(self, models, tmp_path):
        weights, _ = merged(passthrough((models["one"], (0, 1)), (models["two"], (1, 2))), tmp_path / "out")
        first, last = load_weights(models["one"]), load_weights(models["two"])
        assert torch.equal(weights["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
        assert torch.equal(weights["model.norm.weight"], last["model.norm.weight"])

    def test_the_result_is_a_model_that_transformers_runs(self, models, tmp_path):
        from transformers import AutoModelForCausalLM

        merged(passthrough((models["one"], (0, 2)), (models["two"], (0, 2))), tmp_path / "out")
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert torch.isfinite(model(torch.arange(5)[None]).logits).all()

    def test_lists_with_one_entry_a_layer_are_rebuilt(self, tmp_path):
        config = {**CONFIG, "layer_types": ["full_attention", "sliding_attention"], "eos_token_id": [1, 2]}
        folder = save_model(tmp_path / "m", random_weights(0), config)
        _, found = merged(passthrough((folder, (1, 2)), (folder, (0, 2))), tmp_path / "out")
        assert found["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
        assert found["eos_token_id"] == [1, 2]

    def test_scale_zero_on_the_outputs_makes_a_copied_layer_the_identity(self, models, tmp_path):
        zero = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]
        content = passthrough((models["one"], (0, 2)), (models["one"], (1, 2)))
        content["slices"][1]["sources"][0]["parameters"] = {"scale": zero}
        merged(content, tmp_path / "deep")
        from transformers import AutoModelForCausalLM

        tokens = torch.arange(7)[None]
        shallow, deep = (AutoModelForCausalLM.from_pretrained(f) for f in (models["one"], tmp_path / "deep"))
        assert torch.equal(deep(tokens).logits, shallow(tokens).logits)

    def test_a_slice_merges_other_layers_of_the_same_checkpoint(self, models, tmp_path):
        source = {"model": str(models["one"]), "parameters": {"weight": 0.5}}
        sources = [{**source, "layer_range": [0, 1]}, {**source, "layer_range": [1, 2]}]
        weights, _ = merged({"merge_method": "linear", "slices": [{"sources": sources}]}, tmp_path / "out")
        one = load_weights(models["one"])
        name = "model.layers.{}.mlp.up_proj.weight"
        torch.testing.assert_close(weights[name.format(0)], (one[name.format(0)] + one[name.format(1)]) / 2)

    def test_whole_models_written_as_one_slice_are_the_same_merge(self, models, tmp_path):
        base, dapt = str(models["base"]), str(models["one"])
        whole = {"merge_method": "slerp", "base_model": base, "models": [{"model": dapt}], "parameters": {"t": [0, 1]}}
        sliced = {k: v for k, v in whole.items() if k != "models"}
        sliced["slices"] = [{"sources": [{"model": m, "layer_range": [0, 2]} for m in (base, dapt)]}]
        assert same(merged(whole, tmp_path / "w")[0], merged(sliced, tmp_path / "s")[0])


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "what", "where"),
        [
            ({"layer_range": [1, 3]}, "the layers 1 to 2 were asked for", "slices.0.sources.0.layer_range"),
            ({"layer_range": [2, 2]}, "0 <= first < end", "slices.0.sources.0.layer_range"),
            ({"layer_range": [-1, 2]}, "0 <= first < end", "slices.0.sources.0.layer_range"),
            ({"layer_range": [0]}, "at least 2", "slices.0.sources.0.layer_range"),
            ({"layer_range": [0, 1.5]}, "a whole number", "slices.0.sources.0.layer_range.1"),
            ({"layer_ranges": [0, 1]}, "Did you mean 'layer_range'?", "slices.0.sources.0.layer_ranges"),
            ({"parameters": {"scal": 1}}, "Did you mean 'scale'?", "slices.0.sources.0.parameters.scal"),
            ({"parameters": {"scale": "x"}}, "a finite number", "slices.0.sources.0.parameters.scale"),
        ],
    )
    def test_a_bad_source_is_told_with_its_place(self, models, change, what, where):
        content = passthrough((models["one"], (0, 1)))
        content["slices"][0]["sources"][0] |= change
        with pytest.raises(InputError) as caught:
            plan_merge(load_recipe(content))
        assert what in caught.value.what
        assert where in caught.value.where
        assert caught.value.remedy

    @pytest.mark.parametrize(
        ("content", "what", "where"),
        [
            (passthrough(("a", (0, 1)), models=[{"model": "a"}]), "both 'models' and 'slices'", "slices"),
            ({"merge_method": "passthrough", "slices": [{}]}, "'sources' is missing", "slices.0.sources"),
            ({"merge_method": "passthrough", "slices": [{"sources": []}]}, "at least 1", "slices.0.sources"),
            (passthrough(("a", (0, 1)), merge_method="slerp"), "needs a base in every slice", "slices.0.sources"),
        ],
    )
    def test_a_bad_structure_is_told_with_its_place(self, content, what, where):
        with pytest.raises(InputError) as caught:
            load_recipe(content)
        assert what in caught.value.what
        assert where in caught.value.where
        assert caught.value.remedy

    def test_sources_of_different_length_are_told(self):
        content = passthrough(("a", (0, 2)), merge_method="linear", parameters={"weight": 1})
        content["slices"][0]["sources"].append({"model": "b", "layer_range": [0, 1]})
        with pytest.raises(InputError, match="gives 1 layers and the first one of the slice 2") as caught:
            load_recipe(content)
        assert "slices.0.sources.1" in caught.value.where

    def test_two_sources_are_one_too_many_for_passthrough(self):
        content = passthrough(("a", (0, 2)))
        content["slices"][0]["sources"].append({"model": "b", "layer_range": [0, 2]})
        with pytest.raises(InputError, match="merges 1 model"):
            load_recipe(content)

    def test_layers_that_differ_in_their_tensors_are_told(self, models, tmp_path):
        weights = random_weights(0)
        weights["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(32)
        odd = save_model(tmp_path / "odd", weights)
        content = {"merge_method": "linear", "parameters": {"weight": 1}, "slices": [{"sources": []}]}
        content["slices"][0]["sources"] = [{"model": str(m), "layer_range": [0, 2]} for m in (models["one"], odd)]
        with pytest.raises(InputError, match=r"lacks the one for 'model.layers.1.self_attn.q_proj.bias'"):
            plan_merge(load_recipe(content))

    def test_a_slices_base_that_cannot_act_is_told(self):
        content = {"merge_method": "ties", "base_model": "a", "parameters": {"weight": 1}, "slices": [{"sources": []}]}
        content["slices"][0]["sources"] = [{"model": m, "layer_range": [0, 2]} for m in "ac"]
        content["slices"][0]["base_model"] = "b"
        with pytest.raises(InputError, match="has no effect"):
            load_recipe(content)


class TestRecipe:
    def test_a_recipe_with_slices_reads_back_as_itself_and_mergekit_reads_it(self):
        from mergekit.config import MergeConfiguration

        recipe = load_recipe(passthrough(("a", (0, 1)), ("b", (0, 2)), dtype="float32"))
        assert load_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
        assert MergeConfiguration.model_validate(yaml.safe_load(recipe.to_yaml())).slices[1].sources[0].layer_range == (
            0,
            2,
        )

    def test_its_references_are_named_once_in_the_order_of_the_slices(self):
        assert load_recipe(passthrough(("b", (0, 1)), ("a", (0, 2)), ("./b", (0, 1)))).references() == ("b", "a")

    def test_the_fingerprint_follows_the_ranges_their_order_and_the_settings(self):
        content = passthrough(("a", (0, 2)), ("b", (1, 3)))
        moved, swapped, scaled = copy.deepcopy(content), copy.deepcopy(content), copy.deepcopy(content)
        moved["slices"][1]["sources"][0]["layer_range"] = [2, 4]
        swapped["slices"].reverse()
        scaled["slices"][1]["parameters"] = {"scale": 0.5}
        found = {recipe_fingerprint(load_recipe(c), GIVEN) for c in (content, moved, swapped, scaled)}
        assert len(found) == 4
        plain = copy.deepcopy(content)
        plain["slices"][0]["parameters"] = {"scale": 1.0}
        assert recipe_fingerprint(load_recipe(plain), GIVEN) == recipe_fingerprint(load_recipe(content), GIVEN)

    def test_overrides_reach_the_slices(self):
        content = passthrough(("a", (0, 2)), ("b", (0, 2)))
        assert load_recipe(content, ["slices.1.sources.0.model=c"]).references() == ("a", "c")
        content["slices"][1]["parameters"] = {"scale": 0.5}
        assert load_recipe(content, ["scale=0.7"]).slices[1].parameters == {"scale": 0.7}

    def test_a_shared_setting_that_every_slice_overrules_is_reported(self):
        content = passthrough(("a", (0, 2)), ("b", (0, 2)), parameters={"scale": 0.9})
        assert recipe_warnings(load_recipe(content)) == []
        for part in content["slices"]:
            part["parameters"] = {"scale": 0.5}
        assert recipe_warnings(load_recipe(content)) == [
            "parameters.scale has no effect: every slice has its own 'scale'."
        ]


MERGEKIT_CASES = {
    "passthrough": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "base", "layer_range": [0, 3]}]},
            {"sources": [{"model": "one", "layer_range": [1, 4], "parameters": {"scale": [1.0, 0.5]}}]},
            {
                "sources": [{"model": "two", "layer_range": [2, 4]}],
                "parameters": {"scale": [{"filter": "layers.3.", "value": 0.25}, {"value": 2.0}]},
            },
        ],
        "dtype": "float32",
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "base",
        "slices": [
            {"sources": [{"model": "base", "layer_range": [0, 3]}, {"model": "one", "layer_range": [1, 4]}]},
            {
                "sources": [{"model": "two", "layer_range": [3, 4]}, {"model": "base", "layer_range": [0, 1]}],
                "parameters": {"t": [{"filter": "mlp", "value": [0.2, 0.9]}, {"value": 0.6}]},
            },
        ],
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 0.3]}, {"value": [0.3, 0.7]}]},
        "dtype": "float32",
    },
    "linear": {
        "merge_method": "linear",
        "slices": [
            {
                "sources": [
                    {"model": "one", "layer_range": [0, 2], "parameters": {"weight": [0.2, 0.8]}},
                    {"model": "two", "layer_range": [2, 4]},
                ],
                "parameters": {"weight": 0.5},
            },
            {"sources": [{"model": "base", "layer_range": [2, 4]}, {"model": "two", "layer_range": [0, 2]}]},
        ],
        "parameters": {"weight": [{"filter": "layers.3.", "value": 0.1}, {"value": 0.4}]},
        "dtype": "float32",
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "slices": [
            {
                "sources": [
                    {"model": "base", "layer_range": [0, 2]},
                    {"model": "one", "layer_range": [0, 2], "parameters": {"weight": [0.3, 0.9]}},
                    {"model": "two", "layer_range": [1, 3]},
                ]
            },
            {
                "base_model": "two",
                "sources": [
                    {"model": "two", "layer_range": [2, 4]},
                    {"model": "one", "layer_range": [2, 4]},
                    {"model": "base", "layer_range": [1, 3], "parameters": {"density": 1.0}},
                ],
                "parameters": {"lambda": 0.8},
            },
        ],
        "parameters": {"weight": 0.5, "density": [{"filter": "mlp", "value": [0.25, 0.75]}, {"value": 0.5}]},
        "dtype": "float32",
    },
}


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("four")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():  # fresh norms are all ones, which no weight could tell apart
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", MERGEKIT_CASES)
def test_mergekit_makes_the_same_stack_of_the_same_file(case, four_layers, tmp_path, monkeypatch):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    monkeypatch.chdir(four_layers)
    content = MERGEKIT_CASES[case]
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(copy.deepcopy(content)), str(tmp_path / "mergekit"), options)
    expected = load_weights(tmp_path / "mergekit")
    found, config = merged({**content, "gradient_outer": "mergekit"}, tmp_path / "ours")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    stated = json.loads((tmp_path / "mergekit" / "config.json").read_text())
    assert config["num_hidden_layers"] == stated["num_hidden_layers"]
