"""Settings by group: every tensor gets its group's value, and no group is misspelt unnoticed."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dapt_merge.checkpoints.groups import GROUPS, tensor_group
from dapt_merge.errors import InputError
from dapt_merge.recipe import load_recipe, recipe_fingerprint, recipe_warnings, resolve

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.1.something_else",
]
INPUTS = {"b": "xxh3:01", "d": "xxh3:02"}


def recipe(own, **parameters):
    models = [{"model": "d", "parameters": {"weight": own}}]
    parameters = {"normalize": False, **parameters}
    return load_recipe({"merge_method": "ties", "base_model": "b", "models": models, "parameters": parameters})


def weight_of(made, name):
    return resolve(made, name, tensor_group(name).layer, 2).values["weight"][0]


def fingerprint(made):
    return recipe_fingerprint(made, INPUTS)


@given(st.dictionaries(st.sampled_from(GROUPS), st.floats(0, 1), min_size=1), st.floats(0, 1))
def test_every_tensor_gets_its_groups_value_and_the_others_the_rest(groups, rest):
    made = recipe({**groups, "rest": rest})
    assert all(weight_of(made, name) == groups.get(tensor_group(name).kind, rest) for name in NAMES)


def test_a_norm_is_no_attention_though_its_name_says_attention():
    made = recipe({"attention": 0.1, "norm": 0.2, "rest": 0.3})
    assert weight_of(made, "model.layers.1.post_attention_layernorm.weight") == 0.2


def test_the_list_form_takes_groups_beside_filters_in_order():
    listed = [
        {"filter": "layers.0.", "group": "attention", "value": 0.1},
        {"group": "attention", "value": [0.2, 0.4]},
        {"filter": "lm_head", "value": 0.6},
        {"value": 0.5},
    ]
    assert [weight_of(recipe(listed), name) for name in NAMES] == [0.5, 0.1, 0.5, 0.5, 0.5, 0.6, 0.5]


def test_the_mapping_and_the_list_are_one_merge_in_any_order_of_the_mapping():
    mapping = recipe({"mlp": 0.7, "rest": 0.5, "attention": 0.3})
    listed = recipe([{"group": "attention", "value": 0.3}, {"group": "mlp", "value": 0.7}, {"value": 0.5}])
    assert fingerprint(mapping) == fingerprint(recipe({"attention": 0.3, "mlp": 0.7, "rest": 0.5}))
    assert fingerprint(mapping) == fingerprint(listed)
    assert fingerprint(mapping) != fingerprint(recipe({"attention": 0.7, "mlp": 0.3, "rest": 0.5}))


def test_without_a_rest_the_next_setting_in_precedence_holds():
    made = recipe({"attention": 0.3}, weight=0.9)
    assert [weight_of(made, name) for name in NAMES[:2]] == [0.9, 0.3]
    assert recipe_warnings(made) == []
    with pytest.raises(InputError, match="no filter of 'weight' fits"):
        weight_of(recipe({"attention": 0.3}), NAMES[0])


def test_a_mapping_with_a_rest_overrules_the_shared_value():
    found = recipe_warnings(recipe({"attention": 0.3, "rest": 0.5}, weight=0.9))
    assert found == ["parameters.weight has no effect: every model has its own 'weight'."]


def test_a_knob_that_is_dead_in_one_group_names_it():
    (found,) = recipe_warnings(recipe(0.5, normalize={"mlp": True, "rest": False}))
    assert "mlp tensors" in found
    assert "the other tensors" not in found


@pytest.mark.parametrize(
    ("weight", "what", "where"),
    [
        ({"atention": 0.3, "rest": 0.5}, "Did you mean 'attention'?", "weight.atention"),
        ({"attention": 0.3, "other": 0.5}, "neither a group", "weight.other"),
        ({"attention": 0.3, "value": 0.5}, "unknown key 'attention'", "weight.attention"),
        ({"attention": "much"}, "expected a finite number", "weight.attention"),
        ({"attention": {"value": 1}}, "expected a finite number", "weight.attention"),
        ([{"group": "atention", "value": 0.3}], "Did you mean 'attention'?", "weight.0.group"),
        ([{"group": ["mlp"], "value": 0.3}], "there is no group", "weight.0.group"),
        ({"group": "mlp"}, "no 'value'", "weight"),
        ({}, "no 'value'", "weight"),
    ],
)
def test_each_misuse_is_told_with_its_place(weight, what, where):
    with pytest.raises(InputError) as caught:
        recipe(weight)
    assert what in caught.value.what
    assert caught.value.where.endswith(where)
    assert caught.value.remedy


def test_it_reads_back_from_its_own_yaml():
    made = recipe({"attention": [0.1, 0.3], "rest": 0.5})
    assert load_recipe(yaml.safe_load(made.to_yaml())) == made


def test_overrides_take_a_mapping_by_group():
    changed = {"merge_method": "slerp", "base_model": "b", "models": [{"model": "d"}], "parameters": {"t": 0.5}}
    made = load_recipe(changed, ["t={attention: 0.2, rest: 0.6}"])
    assert resolve(made, NAMES[1], 0, 2).values["t"] == 0.2
