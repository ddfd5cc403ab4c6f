"""Which value each tensor gets: ours against mergekit's own resolution, and the differences that are deliberate."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_merge.checkpoints.groups import tensor_group
from dapt_merge.errors import InputError
from dapt_merge.recipe import load_recipe, resolve

LAYERS = 5
IN_LAYERS = [
    f"model.layers.{layer}.{part}.weight"
    for layer in range(LAYERS)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "input_layernorm")
]
BEFORE = ["model.embed_tokens.weight"]
BEHIND = ["model.norm.weight", "lm_head.weight"]


def ours(content: dict, name: str, num_layers: int | None = LAYERS) -> dict[str, object]:
    return resolve(load_recipe(content), name, tensor_group(name).layer, num_layers).values


def mergekits(content: dict, name: str, num_layers: int = LAYERS) -> dict[str, object]:
    """Ask mergekit for the values of one tensor, with the depth that its planner gives it."""
    from mergekit.config import ConfigReader, InputSliceDefinition, MergeConfiguration, OutputSliceDefinition
    from mergekit.merge_methods import registry
    from mergekit.parameter_resolver import resolve_parameters

    config = MergeConfiguration.model_validate(content)
    sources = [InputSliceDefinition(model=m.model, layer_range=(0, 1), parameters=m.parameters) for m in config.models]
    if config.base_model and all(source.model != config.base_model for source in sources):
        sources.append(InputSliceDefinition(model=config.base_model, layer_range=(0, 1)))
    layer = tensor_group(name).layer
    depth = 0 if layer is None else layer / (num_layers - 1) if num_layers > 1 else 1
    reader = ConfigReader(config=config, t=depth, slice_out=OutputSliceDefinition(sources=sources))
    method = registry.get(config.merge_method)
    values, per_model = resolve_parameters(
        method.spec,
        tensor_name=name,
        inputs={source.model: name for source in sources},
        sources=reader.parameter_sources,
        base_model=reader.base_model,
        t=depth,
    )
    for key in {key for own in per_model.values() for key in own}:
        values[key] = tuple(own[key] for own in per_model.values() if key in own)
    return values


def slerp(t: object, **keys: object) -> dict:
    return {"merge_method": "slerp", "base_model": "b", "models": [{"model": "d"}], "parameters": {"t": t}, **keys}


NUMBERS = st.floats(0, 1, allow_nan=False).map(lambda x: round(x, 3))
GRADIENTS = st.lists(NUMBERS, min_size=1, max_size=7)
FILTERS = st.sampled_from(["self_attn", "mlp", "q_proj", "layernorm", "embed", "layers.3.", "*", "fits nothing", None])
CONDITIONS = st.builds(
    lambda f, value: {"value": value} if f is None else {"filter": f, "value": value}, FILTERS, NUMBERS | GRADIENTS
)
SETTINGS = NUMBERS | GRADIENTS | CONDITIONS | st.lists(CONDITIONS, min_size=1, max_size=4)
OPTIONAL_SETTINGS = st.none() | SETTINGS


def _block(**given: object) -> dict:
    return {name: value for name, value in given.items() if value is not None}


class TestAgainstMergekit:
    @settings(max_examples=150, deadline=None)
    @given(t=SETTINGS, name=st.sampled_from(IN_LAYERS + BEFORE))
    def test_a_global_parameter_has_mergekits_value_in_every_layer_and_before(self, t, name):
        content = slerp(t)
        try:
            expected = mergekits(content, name)["t"]
        except RuntimeError:
            with pytest.raises(InputError, match="no filter of 't' fits"):
                ours(content, name)
            return
        assert ours(content, name)["t"] == pytest.approx(expected, rel=1e-12, abs=1e-15)

    @settings(max_examples=150, deadline=None)
    @given(
        shared=OPTIONAL_SETTINGS,
        first=OPTIONAL_SETTINGS,
        second=OPTIONAL_SETTINGS,
        density=OPTIONAL_SETTINGS,
        own_density=OPTIONAL_SETTINGS,
        name=st.sampled_from(IN_LAYERS + BEFORE),
    )
    def test_a_models_own_setting_goes_before_the_global_one_before_the_default(
        self, shared, first, second, density, own_density, name
    ):
        content = {
            "merge_method": "ties",
            "base_model": "b",
            "models": [
                {"model": "b"},
                {"model": "d1", "parameters": _block(weight=first, density=own_density)},
                {"model": "d2", "parameters": _block(weight=second)},
            ],
            "parameters": _block(weight=shared, density=density),
        }
        try:
            expected = mergekits(content, name)
        except RuntimeError:
            with pytest.raises(InputError):
                ours(content, name)
            return
        found = ours(content, name)
        assert found["weight"] == pytest.approx(expected["weight"], rel=1e-12, abs=1e-15)
        assert found["density"] == pytest.approx(expected["density"], rel=1e-12, abs=1e-15)
        assert found["lambda"] == expected["lambda"]

    @pytest.mark.parametrize("name", BEFORE + BEHIND)
    def test_gradient_outer_mergekit_gives_every_outer_tensor_the_first_value(self, name):
        content = slerp([0.1, 0.5, 0.9])
        assert ours({**content, "gradient_outer": "mergekit"}, name)["t"] == mergekits(content, name)["t"] == 0.1

    def test_the_only_layer_of_a_model_gets_the_last_value(self):
        name = "model.layers.0.mlp.up_proj.weight"
        content = slerp([0.1, 0.9])
        assert ours(content, name, num_layers=1)["t"] == mergekits(content, name, num_layers=1)["t"] == 0.9

    @pytest.mark.parametrize("name", IN_LAYERS)
    def test_flags_step_where_numbers_interpolate(self, name):
        content = slerp(0.5) | {"merge_method": "ties", "parameters": {"weight": 1, "normalize": [True, False]}}
        expected = mergekits(content, name)["normalize"]
        assert str(ours(content, name)["normalize"]).lower() == str(expected).lower()

    def test_a_number_that_yaml_reads_as_a_word_is_the_number(self):
        assert ours(slerp("1e-3"), IN_LAYERS[0])["t"] == mergekits(slerp("1e-3"), IN_LAYERS[0])["t"] == 0.001

    def test_linear_with_the_base_among_the_models_weights_it_like_the_others(self):
        content = {
            "merge_method": "linear",
            "base_model": "b",
            "models": [{"model": "b", "parameters": {"weight": 0.3}}, {"model": "d", "parameters": {"weight": 0.7}}],
        }
        recipe = load_recipe(content)
        assert ours(content, IN_LAYERS[0])["weight"] == mergekits(content, IN_LAYERS[0])["weight"] == (0.3, 0.7)
        assert recipe.merge_base() is None
        assert recipe.task_models() == ("b", "d")

    def test_a_per_model_value_of_the_base_is_not_among_a_task_vector_methods_values(self):
        models = [{"model": "b", "parameters": {"weight": 0.9}}, {"model": "d", "parameters": {"weight": 0.2}}]
        content = {"merge_method": "task_arithmetic", "base_model": "b", "models": models}
        assert ours(content, IN_LAYERS[0])["weight"] == mergekits(content, IN_LAYERS[0])["weight"] == (0.2,)


class TestDeliberateDifferences:
    @pytest.mark.parametrize(("name", "expected"), [(BEFORE[0], 0.1), (BEHIND[0], 0.9), (BEHIND[1], 0.9)])
    def test_what_lies_behind_the_layers_gets_the_last_value(self, name, expected):
        assert ours(slerp([0.1, 0.5, 0.9]), name)["t"] == expected

    @pytest.mark.parametrize("name", ["transformer.ln_f.weight", "gpt_neox.final_layer_norm.bias", "embed_out.weight"])
    def test_other_families_final_norms_and_heads_are_known(self, name):
        assert ours(slerp([0.0, 1.0]), name)["t"] == 1.0

    @pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.word_embeddings_layernorm.weight"])
    def test_norms_of_the_embeddings_lie_before_the_layers(self, name):
        assert ours(slerp([0.0, 1.0]), name)["t"] == 0.0

    def test_linear_with_a_base_that_is_not_listed_leaves_it_the_rest(self):
        content = {
            "merge_method": "linear",
            "base_model": "b",
            "models": [{"model": "d", "parameters": {"weight": 0.3}}],
        }
        recipe = load_recipe(content)
        assert (recipe.merge_base(), recipe.task_models()) == ("b", ("d",))
        with pytest.raises(RuntimeError, match="Missing required parameter weight for b"):
            mergekits(content, IN_LAYERS[0])


class TestUnresolvable:
    def test_a_tensor_that_no_filter_fits_is_named(self):
        with pytest.raises(InputError, match="no filter of 't' fits") as caught:
            ours(slerp([{"filter": "mlp", "value": 0.2}]), "lm_head.weight")
        assert "lm_head.weight" in caught.value.where

    def test_a_gradient_needs_the_number_of_layers(self):
        name = "model.layers.0.mlp.up_proj.weight"
        assert ours(slerp(0.4), name, num_layers=None)["t"] == 0.4
        with pytest.raises(InputError, match="number of layers"):
            ours(slerp([0, 1]), name, num_layers=None)

    def test_layers_numbered_past_the_last_get_the_last_value(self):
        assert ours(slerp([0, 1]), "model.layers.5.mlp.up_proj.weight")["t"] == 1.0
