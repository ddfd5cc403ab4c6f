"""Warnings: what has no effect, and what mergekit would do otherwise. A sound recipe has none."""

from __future__ import annotations

import pytest
import yaml

from dapt_merge.recipe import load_recipe, recipe_warnings

ONE = "base_model: b\nmodels: [{model: d, parameters: {weight: 0.3}}]\n"
OURS = "parameters: {normalize: false}\n"
TWO = "base_model: b\nmodels: [{model: d}, {model: e}]\n"


def warnings(text: str) -> list[str]:
    return recipe_warnings(load_recipe(yaml.safe_load(text)))


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: ties\n" + ONE + OURS,
        "merge_method: ties\n" + ONE.replace("0.3", "1"),
        "merge_method: ties\nparameters: {weight: 0.5, density: 0.3}\n" + TWO,
        "merge_method: linear\n" + ONE,
        "merge_method: linear\nmodels: [{model: b}, {model: d}]\nparameters: {weight: 1}\n",
        "merge_method: linear\nbase_model: b\nmodels: [{model: b}, {model: d}]\nparameters: {weight: 0.5}\n",
        "merge_method: slerp\nbase_model: b\nmodels: [{model: d}]\nparameters: {t: 0.5}\ndtype: bfloat16\n",
        "merge_method: slerp\nbase_model: b\nmodels: [{model: d}]\n"
        "parameters: {t: [{filter: self_attn, value: [0, 1]}, {value: 0.5}]}\n",
    ],
)
def test_a_sound_recipe_has_no_warning(text):
    assert warnings(text) == []


def test_the_cancelling_normalize_of_one_task_vector_is_named():
    found = warnings("merge_method: ties\nparameters: {normalize: true}\n" + ONE)
    assert len(found) == 1
    assert "weight" in found[0]


def test_a_knob_that_is_dead_for_some_tensors_names_them():
    normalize = "{normalize: [{filter: mlp, value: true}, {value: false}]}"
    found = warnings(f"merge_method: ties\nparameters: {normalize}\n{ONE}")
    assert len(found) == 1
    assert "tensors named like 'mlp'" in found[0]
    assert "the other tensors" not in found[0]


def test_int8_mask_is_taken_and_reported():
    found = warnings("merge_method: ties\nparameters: {weight: 0.5, int8_mask: true}\n" + TWO)
    assert len(found) == 1
    assert "int8_mask" in found[0]


def test_the_bases_own_parameters_are_reported_where_they_cannot_act():
    text = "merge_method: ties\nbase_model: b\nmodels: [{model: b, parameters: {weight: 0.5}}, {model: d}]\n"
    found = warnings(text + "parameters: {weight: 0.5, normalize: false}\n")
    assert len(found) == 1
    assert "models.0.parameters has no effect" in found[0]


def test_a_global_setting_that_every_model_overrules_is_reported():
    found = warnings("merge_method: ties\nparameters: {weight: 0.9, normalize: false}\n" + ONE)
    assert found == ["parameters.weight has no effect: every model has its own 'weight'."]
    own = "models: [{model: d, parameters: {weight: [{filter: mlp, value: 0.1}]}}]\n"
    assert warnings("merge_method: ties\nbase_model: b\nparameters: {weight: 0.9, normalize: false}\n" + own) == []


def test_linear_with_a_global_weight_and_an_unlisted_base_is_told_apart_from_mergekits():
    found = warnings("merge_method: linear\nbase_model: b\nmodels: [{model: d}]\nparameters: {weight: 0.3}\n")
    assert len(found) == 1
    assert "WiSE-FT" in found[0]


def test_linear_whose_base_takes_the_rest_says_before_the_merge_that_normalize_does_nothing():
    text = "merge_method: linear\nbase_model: b\nmodels: [{model: d, parameters: {weight: 0.3}}]\n"
    found = warnings(text + "parameters: {normalize: false}\n")
    assert len(found) == 1
    assert found[0].startswith("'normalize' has no effect")
    assert warnings(text) == []
    listed = "merge_method: linear\nbase_model: b\nmodels: [{model: b}, {model: d}]\n"
    assert warnings(listed + "parameters: {weight: 0.5, normalize: false}\n") == []


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_what_random_dropping_is_made_up_by_is_told_until_the_recipe_chooses(method):
    text = f"merge_method: {method}\n{TWO}parameters: {{weight: 0.5, density: 0.4, normalize: true, epsilon: 0.1"
    text = text if method.startswith("della") else text.replace(", epsilon: 0.1", "")
    found = warnings(text + "}\n")
    assert len(found) == 1
    assert "rescale: expectation" in found[0]
    assert "rescale: l1" in found[0]
    for choice in ("expectation", "l1", "true", "false"):
        assert warnings(text + f", rescale: {choice}}}\n") == []


def test_nothing_dropped_needs_nothing_told_of_its_rescaling():
    found = warnings("merge_method: dare_linear\nparameters: {weight: 0.5}\n" + TWO)
    assert not any("rescale: l1" in warning for warning in found)


def test_mergekits_defaults_are_those_that_the_warnings_name():
    from mergekit.merge_methods import registry

    def default(method, name):
        return next(p.default for p in registry.get(method).spec.parameters if p.name == name)

    for method in ("dare_linear", "dare_ties", "della", "della_linear"):
        assert default(method, "rescale") is True
    for method, normalize in {"dare_ties": False, "breadcrumbs_ties": False, "ties": True, "della": True}.items():
        assert default(method, "normalize") is normalize


@pytest.mark.parametrize("method", ["dare_ties", "breadcrumbs_ties"])
def test_a_division_that_mergekit_does_not_do_is_told_until_the_recipe_chooses(method):
    text = f"merge_method: {method}\n{TWO}parameters: {{weight: 0.5, density: 0.5, rescale: l1"
    assert ["normalize" in warning for warning in warnings(text + "}\n")] == [True]
    assert warnings(text + ", normalize: true}\n") == []


@pytest.mark.parametrize("method", ["ties", "della"])
def test_a_weight_that_cancels_in_mergekit_and_not_here_is_told_until_the_recipe_chooses(method):
    """Of one task vector; of several, both engines divide."""
    text = f"merge_method: {method}\nparameters: {{density: 0.5, rescale: true"
    found = warnings(f"{text}}}\n{ONE}")
    assert len(found) == 1
    assert "mergekit divides by the weight" in found[0]
    assert warnings(f"{text}, normalize: false}}\n{ONE}") == []
    assert warnings(f"{text}}}\n{ONE.replace('0.3', '1.0')}") == []
    assert not any("mergekit divides" in warning for warning in warnings(f"{text}, weight: 0.5}}\n{TWO}"))


@pytest.mark.parametrize(("method", "name"), [("nearswap", "density"), ("linear", "lambda"), ("slerp", "normalize")])
def test_a_parameter_of_another_method_of_mergekits_is_taken_and_reported(method, name):
    own = {"nearswap": "t: 0.1", "linear": "weight: 1", "slerp": "t: 0.5"}[method]
    base = "" if method == "linear" else "base_model: b\n"
    text = f"merge_method: {method}\n{base}models: [{{model: d}}]\nparameters: {{{own}, {name}: 0.5}}\n"
    assert warnings(text) == [f"'{name}' has no effect here: {method} has no such parameter; mergekit passes over it."]


def test_mergekits_methods_and_parameters_are_those_that_are_taken():
    from mergekit.merge_methods import registry

    from dapt_merge.recipe import parts

    assert set(parts._MERGEKITS_METHODS) == set(registry._METHODS)
    named = {parameter.name for method in registry._METHODS.values() for parameter in method.spec.parameters}
    assert {*parts._MERGEKITS_PARAMETERS, "int8_mask"} == named


def test_a_slices_base_that_no_method_asks_for_is_taken_and_reported():
    source = "{sources: [{model: a, layer_range: [0, 1]}], base_model: b}"
    found = warnings(f"merge_method: passthrough\nslices: [{source}]\n")
    assert found == ["the slice's base_model 'b' has no effect: passthrough uses no base in slices."]


@pytest.mark.parametrize("setting", ["density: 0.5", "rescale: true", "int8_mask: true"])
def test_what_mergekit_takes_for_task_arithmetic_and_does_not_use_is_taken_and_reported(setting):
    found = warnings(f"merge_method: task_arithmetic\n{ONE}parameters: {{{setting}}}\n")
    assert len(found) == 1
    assert f"'{setting.partition(':')[0]}' has no effect" in found[0]


def test_a_slices_residual_weight_is_taken_and_reported():
    source = "{sources: [{model: a, layer_range: [0, 1]}], residual_weight: 0.5}"
    found = warnings(f"merge_method: passthrough\nslices: [{source}]\n")
    assert found == ["'residual_weight' has no effect: mergekit reads it and uses it nowhere."]


def test_mergekits_linear_gives_an_unlisted_base_the_global_weight():
    """The behaviour that the warning above describes."""
    from mergekit.config import ConfigReader, InputSliceDefinition, MergeConfiguration, OutputSliceDefinition
    from mergekit.merge_methods import registry
    from mergekit.parameter_resolver import resolve_parameters

    content = {"merge_method": "linear", "base_model": "b", "models": [{"model": "d"}], "parameters": {"weight": 0.3}}
    config = MergeConfiguration.model_validate(content)
    sources = [InputSliceDefinition(model=name, layer_range=(0, 1)) for name in ("d", "b")]
    _, per_model = resolve_parameters(
        registry.get("linear").spec,
        tensor_name="w",
        inputs={source.model: "w" for source in sources},
        sources=ConfigReader(config=config, t=0, slice_out=OutputSliceDefinition(sources=sources)).parameter_sources,
        base_model=config.base_model,
    )
    assert {str(model): own["weight"] for model, own in per_model.items()} == {"d": 0.3, "b": 0.3}


def test_a_gradient_that_reaches_the_head_is_told_until_the_recipe_chooses():
    text = "merge_method: slerp\nbase_model: b\nmodels: [{model: d}]\nparameters: {t: [0, 1]}\n"
    assert "gradient_outer" in warnings(text)[0]
    assert len(warnings(text)) == 1
    assert warnings(text + "gradient_outer: last\n") == []
    assert warnings(text + "gradient_outer: mergekit\n") == []


def test_a_working_dtype_beside_another_output_dtype_is_reported():
    text = "merge_method: slerp\nbase_model: b\nmodels: [{model: d}]\nparameters: {t: 0.5}\ndtype: bfloat16\n"
    assert "rounded to dtype 'bfloat16'" in warnings(text + "out_dtype: float16\n")[0]
    assert warnings(text + "out_dtype: bfloat16\n") == []
