"""Disk, live model and Python API give the same bits; end points are exact; the output is an ordinary checkpoint."""

import json

import pytest
import torch
from merging_models import load_weights, random_weights, save_model

from dapt_merge import ResidentMerger, make_recipe, merge, open_checkpoint, plan_merge
from dapt_merge.errors import InputError
from dapt_merge.merging import merge_to_disk
from dapt_merge.merging.live import model_from_config
from dapt_merge.methods.registry import get_method, method_names

CASES = {
    "linear": {"weight": [0.3, 0.5]},
    "slerp": {"t": 0.4, "dot_threshold": 0.999999},
    "task_arithmetic": {"weight": [0.3, 0.5], "lambda_": 0.9},
    "ties": {"weight": [0.3, 0.5], "density": 0.4},
    "dare_linear": {"weight": [0.3, 0.5], "density": 0.5, "seed": 7},
    "dare_ties": {"weight": [0.3, 0.5], "density": 0.5, "seed": 7},
    "della": {"weight": [0.3, 0.5], "density": 0.5, "rescale": "l1", "seed": 7},
    "della_linear": {"weight": [0.3, 0.5], "density": 0.5, "epsilon": [0.1, 0.4], "seed": 7},
    "breadcrumbs": {"weight": [0.3, 0.5], "density": 0.5, "gamma": [0.1, 0.2]},
    "breadcrumbs_ties": {"weight": [0.3, 0.5], "density": 0.5, "rescale": "l1"},
    "model_stock": {"filter_wise": True},
    "sce": {"select_topk": 0.3},
    "nearswap": {"t": 5e-4},
    "ram": {"epsilon": 1e-3},
    "ramplus_tl": {"epsilon": 1e-3},
    "arcee_fusion": {},
}
TRIMMED_OVER_THE_MODEL = ("ties", {"weight": 0.5, "density": 0.3, "trim_scope": "model"})


def recipe_for(models, method, out_dtype=None, **parameters):
    dapt = [models["one"], models["two"]][: get_method(method).max_models]
    return make_recipe(str(models["base"]), [str(path) for path in dapt], method, out_dtype=out_dtype, **parameters)


def test_every_built_in_method_is_covered():
    assert set(CASES) >= {"linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"}
    assert set(CASES) <= set(method_names())


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize(("method", "parameters"), [*CASES.items(), TRIMMED_OVER_THE_MODEL])
def test_stream_resident_and_api_give_the_same_bits(models, tmp_path, method, parameters, out_dtype):
    recipe = recipe_for(models, method, out_dtype, **parameters)
    merge_to_disk(plan_merge(recipe), tmp_path / "out", threads=2, shard_bytes=20_000)
    on_disk = load_weights(tmp_path / "out")

    base = open_checkpoint(models["base"])
    model = model_from_config(base, getattr(torch, out_dtype))
    checkpoints = {str(path): open_checkpoint(path) for path in models.values()}
    merger = ResidentMerger(model, checkpoints)
    merger.apply(make_recipe(str(models["base"]), [str(models["two"])], "linear", weight=0.1))
    merger.apply(recipe, threads=1, measure_rounding=False)
    live = model.state_dict()
    assert live["lm_head.weight"].data_ptr() == live["model.embed_tokens.weight"].data_ptr()

    lazy = merge(recipe=recipe)
    assert set(on_disk) == set(lazy) == set(base.tensors)
    differs_from_base = False
    for name, tensor in on_disk.items():
        assert tensor.dtype == getattr(torch, out_dtype)
        assert torch.equal(tensor, live[name]), name
        assert torch.equal(tensor, lazy[name]), name
        differs_from_base |= not torch.equal(tensor.float(), base.read(name))
    assert differs_from_base


def test_what_is_stored_in_float64_loses_no_digit_unless_the_recipe_says_so(tmp_path):
    base = {name: tensor.double() for name, tensor in random_weights(1).items()}
    dapt = {name: tensor + 1e-12 for name, tensor in base.items()}
    folders = [save_model(tmp_path / name, weights) for name, weights in (("base", base), ("dapt", dapt))]
    half = merge(*folders, "task_arithmetic", weight=0.5)
    for name, tensor in base.items():
        assert half[name].dtype == torch.float64
        assert torch.equal(half[name], tensor + 0.5 * (dapt[name] - tensor))
    recipe = {"merge_method": "task_arithmetic", "base_model": str(folders[0]), "dtype": "float32"}
    recipe |= {"out_dtype": "float64", "models": [{"model": str(folders[1]), "parameters": {"weight": 0.5}}]}
    in_float32 = merge(recipe=recipe)["model.norm.weight"]
    assert in_float32.dtype == torch.float64
    assert torch.equal(in_float32, in_float32.float().double())


def test_the_saved_merge_loads_in_transformers_and_computes_what_the_live_model_does(models, tmp_path):
    from transformers import AutoModelForCausalLM

    lazy = merge(models["base"], [models["one"], models["two"]], "ties", weight=0.6, density=0.5, out_dtype="bfloat16")
    lazy.save(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    built = lazy.to_model()
    assert loaded.dtype == built.dtype == torch.bfloat16
    assert not built.training
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, built(tokens).logits)


def test_building_a_model_leaves_the_random_state_alone(models):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    merge(models["base"], models["one"], "linear", weight=0.5).to_model()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_weight_0_is_the_base_and_weight_1_the_dapt_checkpoint_bit_for_bit(models, tmp_path, method):
    for weight, end in ((0.0, "base"), (1.0, "one")):
        merge(models["base"], models["one"], method, weight=weight).save(tmp_path / end)
        assert open_checkpoint(tmp_path / end).fingerprint() == open_checkpoint(models[end]).fingerprint()


def test_each_tensor_keeps_the_dtype_it_has_in_the_base(models, tmp_path):
    weights = load_weights(models["base"])
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.bfloat16)
    base = save_model(tmp_path / "base", weights)
    lazy = merge(base, models["one"], "linear", weight=0.5)
    assert lazy["model.norm.weight"].dtype == torch.bfloat16
    assert lazy["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32


def test_models_and_state_dicts_merge_like_their_files(models):
    base, one = load_weights(models["base"]), load_weights(models["one"])
    from_files = merge(models["base"], models["one"], "dare_linear", weight=0.5, density=0.5, seed=3)
    from_tensors = merge(base, one, "dare_linear", weight=0.5, density=0.5, seed=3)
    mixed = merge(from_files.plan.checkpoints[str(models["base"])], one, "dare_linear", weight=0.5, density=0.5, seed=3)
    for name in from_files:
        assert torch.equal(from_files[name], from_tensors[name])
        assert torch.equal(from_files[name], mixed[name])
    live = merge(models["base"], models["one"], "linear", weight=1).to_model()
    assert torch.equal(merge(live, base, "linear", weight=1.0)["model.norm.weight"], base["model.norm.weight"])


def test_a_merge_of_state_dicts_saves_weights_without_a_config(tmp_path):
    merge({"w": torch.zeros(4)}, {"w": torch.ones(4)}, "linear", weight=0.25).save(tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").read("w").tolist() == [0.25] * 4
    with pytest.raises(InputError, match=r"no config\.json"):
        merge({"w": torch.zeros(4)}, {"w": torch.ones(4)}, "linear", weight=0.25).to_model()


def test_a_tensor_handed_out_is_the_callers_own(models):
    lazy = merge(models["base"], models["one"], "linear", weight=1.0)
    before = open_checkpoint(models["one"]).fingerprint()
    lazy["model.norm.weight"].zero_()
    assert lazy["model.norm.weight"].abs().sum() > 0
    assert open_checkpoint(models["one"]).fingerprint() == before


def test_an_unknown_tensor_is_a_key_error_like_in_any_mapping(models):
    lazy = merge(models["base"], models["one"], "linear", weight=0.5)
    assert "model.norm.weight" in lazy
    assert "model.norms.weight" not in lazy
    with pytest.raises(KeyError, match="Did you mean"):
        lazy["model.norms.weight"]


def test_a_live_model_that_is_an_input_is_refused(models):
    model = merge(models["base"], models["one"], "linear", weight=0.5).to_model()
    with pytest.raises(InputError, match="itself an input"):
        ResidentMerger(model, {"live": open_checkpoint(model), "one": open_checkpoint(models["one"])})


def test_a_live_model_of_another_shape_is_refused(models):
    base = open_checkpoint(models["base"])
    smaller = model_from_config(base.with_config({**base.config, "num_hidden_layers": 1}), torch.float32)
    with pytest.raises(InputError, match="not in the model"):
        ResidentMerger(smaller, {"base": base})
    narrower = model_from_config(base.with_config({**base.config, "vocab_size": 95}), torch.float32)
    with pytest.raises(InputError, match="embed_tokens"):
        ResidentMerger(narrower, {"base": base})


def test_a_live_model_without_memory_is_refused(models):
    base = open_checkpoint(models["base"])
    with pytest.raises(InputError, match="meta device"):
        ResidentMerger(model_from_config(base, torch.float32).to("meta"), {"base": base})


def test_a_recipe_with_a_checkpoint_that_is_not_loaded_is_refused(models):
    checkpoints = {"base": open_checkpoint(models["base"]), "checkpoint-10": open_checkpoint(models["one"])}
    merger = ResidentMerger(model_from_config(checkpoints["base"], torch.float32), checkpoints)
    with pytest.raises(InputError, match="Did you mean 'checkpoint-10'"):
        merger.apply(make_recipe("base", ["checkpoint-1"], "linear", weight=0.5))


@pytest.mark.parametrize("arguments", [{"base": "b", "recipe": {}}, {"recipe": {}, "weight": 1}, {"base": "b"}, {}])
def test_a_merge_that_is_half_told_is_refused(arguments):
    with pytest.raises(InputError):
        merge(**arguments)


def test_a_recipe_file_merges_and_seed_and_dtype_can_be_given_beside_it(models, tmp_path):
    recipe = recipe_for(models, "dare_linear", weight=0.5, density=0.5, seed=1)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    name = "model.layers.0.mlp.up_proj.weight"
    from_file = merge(recipe=tmp_path / "recipe.yaml")[name]
    assert torch.equal(from_file, merge(recipe=recipe)[name])
    assert not torch.equal(from_file, merge(recipe=recipe, seed=2)[name])
    assert merge(recipe=recipe, out_dtype="bf16")[name].dtype == torch.bfloat16
    with pytest.raises(InputError, match="unknown dtype"):
        merge(recipe=recipe, out_dtype="int8")


def test_the_output_carries_recipe_report_config_and_tokenizer(models, tmp_path):
    merge(models["base"], models["one"], "linear", weight=0.5, out_dtype="bfloat16").save(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "recipe.yaml",
        "merge_report.json",
        "README.md",
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = merge(recipe=tmp_path / "out" / "recipe.yaml")
    assert again.save(tmp_path / "again").output == open_checkpoint(tmp_path / "out").fingerprint()


def test_the_bytes_do_not_depend_on_threads_or_shards(models, tmp_path):
    lazy = merge(models["base"], [models["one"], models["two"]], "dare_ties", weight=0.7, density=0.5)
    one = lazy.save(tmp_path / "one", threads=1)
    many = lazy.save(tmp_path / "many", threads=7)
    cut = lazy.save(tmp_path / "cut", threads=3, shard_bytes=9_000)
    read = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "many")]
    assert read[0] == read[1]
    assert one.output == many.output == cut.output == open_checkpoint(tmp_path / "cut").fingerprint()
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 3


def test_random_weights_of_the_fixture_are_near_each_other_but_not_equal():
    base = random_weights(0)
    near = random_weights(1, near=base)
    assert all(not torch.equal(base[name], near[name]) for name in base)
