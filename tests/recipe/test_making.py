"""What `dm.merge(base, dapt, method=…)` and the command line's flags mean."""

from __future__ import annotations

import pytest

from dapt_merge.errors import InputError
from dapt_merge.recipe import load_recipe, make_recipe, recipe_fingerprint, recipe_warnings, resolve

INPUTS = {"b": "xxh3:b", "d": "xxh3:d", "e": "xxh3:e"}


def values(recipe):
    return resolve(recipe, "model.layers.0.mlp.up_proj.weight", 0, 2).values


def test_weight_is_t_for_slerp():
    assert values(make_recipe("b", ["d"], "slerp", weight=0.3))["t"] == 0.3
    assert values(make_recipe("b", ["d"], "slerp", weight=[0.3]))["t"] == 0.3
    assert values(make_recipe("b", ["d"], "slerp", t=0.3))["t"] == 0.3
    with pytest.raises(InputError, match="both weight"):
        make_recipe("b", ["d"], "slerp", weight=0.3, t=0.4)


def test_one_weight_holds_for_all_and_a_list_gives_one_each():
    assert values(make_recipe("b", ["d", "e"], "ties", weight=0.6))["weight"] == (0.6, 0.6)
    found = values(make_recipe("b", ["d", "e"], "ties", weight=[0.6, 0.2], density=0.3, lambda_=0.9))
    assert (found["weight"], found["density"], found["lambda"]) == ((0.6, 0.2), (0.3, 0.3), 0.9)
    with pytest.raises(InputError, match="weight has 3 values for 2"):
        make_recipe("b", ["d", "e"], "ties", weight=[1, 2, 3])


def test_a_list_of_filters_is_one_setting_for_all():
    filters = [{"filter": "mlp", "value": 0.2}, {"value": 0.7}]
    recipe = make_recipe("b", ["d", "e"], "ties", weight=filters)
    assert values(recipe)["weight"] == (0.2, 0.2)
    assert resolve(recipe, "lm_head.weight", None, 2).values["weight"] == (0.7, 0.7)


def test_linear_is_the_line_from_the_base_without_a_warning():
    recipe = make_recipe("b", ["d"], "linear", weight=0.3)
    assert (recipe.merge_base(), values(recipe)["weight"]) == ("b", (0.3,))
    assert recipe_warnings(recipe) == []


def test_the_recipes_own_keys_can_be_given_by_name():
    recipe = make_recipe("b", ["d"], "slerp", weight=[0.3], seed=7, out_dtype="float32", dtype=None)
    assert (recipe.seed, recipe.output_dtype) == (7, "float32")


def test_arguments_and_the_same_file_are_one_merge():
    made = make_recipe("b", ["d"], "ties", weight=0.6, density=0.3)
    read = load_recipe(
        {
            "merge_method": "ties",
            "base_model": "b",
            "models": [{"model": "b"}, {"model": "d"}],
            "parameters": {"density": 0.3, "weight": 0.6},
        }
    )
    assert recipe_fingerprint(made, INPUTS) == recipe_fingerprint(read, INPUTS)


@pytest.mark.parametrize(
    ("arguments", "what", "where"),
    [
        ({"method": "tise"}, "Did you mean 'ties'?", ""),
        ({"method": "ties", "wieght": 1}, "Did you mean 'weight'?", "wieght"),
        ({"method": "ties"}, "needs a value for 'weight'", "weight"),
        ({"method": "slerp", "weight": 2}, "expected a number in [0, 1]", "arguments: parameters.t"),
        ({"method": "slerp", "t": 0.5, "seed": "x"}, "a whole number is expected", "seed"),
    ],
)
def test_each_bad_argument_is_told(arguments, what, where):
    with pytest.raises(InputError) as caught:
        make_recipe("b", ["d"], **arguments)
    assert what in caught.value.what
    assert where in (caught.value.where or "")


def test_no_model_at_all_is_told():
    with pytest.raises(InputError, match="models"):
        make_recipe("b", [], "ties", weight=1)
