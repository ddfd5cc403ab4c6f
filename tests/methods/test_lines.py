"""LiNeS: the merged task vector scaled by depth, on any method that has a lambda."""

import pytest
import torch
from float64_reference import SHAPES, assert_close, draw_tensors, same_bits, wide
from hypothesis import given
from hypothesis import strategies as st

from dapt_merge.errors import InputError
from dapt_merge.merging import merge
from dapt_merge.methods.apply import combine
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.registry import get_method, method_names

COMBINED = [name for name in method_names() if name.startswith("lines")]
SCALES = st.floats(-1, 2)


def at_layer(name, base, models, layer, num_layers, **values):
    return combine(get_method(name), base, models, values, TensorContext("w", layer=layer, num_layers=num_layers))


@given(st.integers(0, 999), st.sampled_from(SHAPES), SCALES, SCALES, st.integers(2, 9), st.data())
def test_the_task_vectors_of_layer_l_are_scaled_by_alpha_plus_beta_times_depth(seed, shape, alpha, beta, layers, data):
    layer = data.draw(st.integers(0, layers - 1))
    base, *models = draw_tensors(seed, shape, 3)
    merged = at_layer("lines", base, models, layer, layers, weight=[0.4, 0.7], alpha=alpha, beta=beta)
    scale = alpha + beta * layer / (layers - 1)
    delta = sum(weight * (wide(model) - wide(base)) for weight, model in zip((0.4, 0.7), models, strict=True))
    assert_close(merged, wide(base) + scale * delta, [base, *models], relative=4e-6)


def test_a_worked_example():
    """Five layers from 0.2 to 1.0: the third gets 0.2 + 0.8·2/4 = 0.6."""
    base, model = torch.zeros(2), torch.tensor([1.0, -2.0])
    merged = at_layer("lines", base, [model], 2, 5, weight=1, alpha=0.2, beta=0.8)
    assert merged.tolist() == pytest.approx([0.6, -1.2])


@pytest.mark.parametrize("name", COMBINED)
def test_every_delta_method_is_the_same_as_with_that_lambda(name):
    inner = get_method("task_arithmetic" if name == "lines" else name.removeprefix("lines_"))
    base, *models = draw_tensors(2, (6, 8), 3)
    values: dict = {parameter.name: 0.5 for parameter in inner.parameters if parameter.default is None}
    context = TensorContext("w", layer=1, num_layers=3)
    scaled = combine(get_method(name), base, models, {**values, "alpha": 0.2, "beta": 0.6, "lambda": 1.5}, context)
    assert torch.equal(scaled, combine(inner, base, models, {**values, "lambda": 1.5 * 0.5}, TensorContext("w")))


@pytest.mark.parametrize("name", ["lines", "lines_ties", "lines_dare_linear"])
def test_scale_0_is_the_base_and_scale_1_the_model_bit_for_bit(name):
    base, model = draw_tensors(1, (30,), 2, torch.bfloat16)
    values = {"weight": 1, "alpha": 0, "beta": 1}
    assert same_bits(at_layer(name, base, [model], 0, 4, **values), base)
    assert same_bits(at_layer(name, base, [model], 3, 4, **values), model)
    assert not same_bits(at_layer(name, base, [model], 2, 4, **values).bfloat16(), model)


def test_a_model_of_one_layer_is_its_own_last():
    base, model = draw_tensors(1, (30,), 2)
    assert same_bits(at_layer("lines", base, [model], 0, 1, weight=1, alpha=0.25, beta=0.75), model)


def small_model(seed):
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    return {name: torch.randn(4, generator=generator) for name in names}


def test_in_a_merge_embeddings_count_as_the_first_layer_and_the_head_and_final_norm_as_the_last():
    base, dapt = small_model(1), small_model(2)
    merged = merge(base, dapt, "lines", weight=1, alpha=0.2, beta=0.8)
    scales = {
        "model.embed_tokens.weight": 0.2,
        "model.layers.0.mlp.up_proj.weight": 0.2,
        "model.layers.1.mlp.up_proj.weight": 0.6,
        "model.layers.2.mlp.up_proj.weight": 1.0,
        "model.norm.weight": 1.0,
        "lm_head.weight": 1.0,
    }
    for name, scale in scales.items():
        expected = wide(base[name]) + scale * (wide(dapt[name]) - wide(base[name]))
        assert_close(merged[name], expected, [base[name], dapt[name]])
    assert same_bits(merged["lm_head.weight"], dapt["lm_head.weight"])


def test_slices_are_counted_through():
    base, dapt = small_model(1), small_model(2)
    layers = [{"model": "d", "layer_range": [0, 2]}], [{"model": "d", "layer_range": [1, 3]}]
    recipe = {
        "merge_method": "lines",
        "base_model": "b",
        "slices": [
            {"sources": [*sources, {"model": "b", "layer_range": sources[0]["layer_range"]}]} for sources in layers
        ],
        "parameters": {"weight": 1, "alpha": 0, "beta": 1},
    }
    from dapt_merge.checkpoints.opening import open_checkpoint
    from dapt_merge.merging import plan_merge
    from dapt_merge.recipe import load_recipe

    plan = plan_merge(load_recipe(recipe), {"b": open_checkpoint(base, "b"), "d": open_checkpoint(dapt, "d")})
    places = {job.name: (job.layer, job.num_layers) for job in plan.jobs}
    assert [places[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(4)] == [(i, 4) for i in range(4)]
    assert places["lm_head.weight"] == (3, 4)


def test_a_model_without_layers_is_refused():
    with pytest.raises(InputError, match="number of layers of this model is unknown"):
        merge({"w": torch.zeros(2)}, {"w": torch.ones(2)}, "lines", weight=1, alpha=0, beta=1)["w"]


def test_knobs_without_effect_are_explained():
    explain = get_method("lines_ties").dead_knobs
    assert explain is not None
    assert explain({"weight": 0.5, "alpha": 0.0, "beta": 0.0}, 1)[0].startswith("alpha")
    cancelled = {"weight": 0.5, "normalize": True, "alpha": 0.5, "beta": 0.5}
    assert explain(cancelled, 1)[0].startswith("weight")
    assert explain({"weight": 0.5, "alpha": 0.5, "beta": 0.5}, 1) == []


def test_alpha_and_beta_must_be_given():
    base, model = draw_tensors(1, (3,), 2)
    with pytest.raises(InputError, match="needs a value for 'beta'"):
        at_layer("lines", base, [model], 0, 2, weight=1, alpha=0.5)
