"""A recipe's fingerprint changes with all that changes the merged bytes, and with nothing else."""

from __future__ import annotations

import copy

import pytest
import yaml

from dapt_merge.errors import InputError
from dapt_merge.recipe import load_recipe, recipe_fingerprint

INPUTS = {"b": "xxh3:01", "d": "xxh3:02", "e": "xxh3:03"}
TIES = """
merge_method: ties
base_model: b
models:
  - model: d
    parameters: {weight: 0.5, density: [0.2, 1]}
  - model: e
    parameters: {weight: 1}
parameters:
  lambda:
    - filter: mlp
      value: 0.9
    - value: 1
dtype: bfloat16
"""


def fingerprint(text: str, inputs: dict[str, str] = INPUTS) -> str:
    return recipe_fingerprint(load_recipe(yaml.safe_load(text)), inputs)


def test_it_is_the_same_in_every_process_and_version():
    assert fingerprint(TIES).startswith("xxh3:")
    assert len(fingerprint(TIES)) == len("xxh3:") + 32
    assert fingerprint(TIES) == fingerprint(TIES)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("weight: 1}", "weight: 1.0}"),
        ("weight: 0.5", "weight: 5e-1"),
        ("[0.2, 1]", "[0.2, 1.0]"),
        ("weight: 1}", "weight: [1, 1, 1]}"),
        ("{weight: 0.5, density: [0.2, 1]}", "{density: [0.2, 1], weight: 0.5}"),
        ("  - model: d\n", "  - model: b\n  - model: ./d/\n"),
        ("weight: 1}", "weight: 1, density: 1}"),
        ("parameters:\n  lambda", "parameters:\n  int8_mask: true\n  lambda"),
        ("    - value: 1\n", "    - filter: '*'\n      value: 1\n"),
        ("    - value: 1\n", "    - value: 1\n    - filter: self_attn\n      value: 3\n"),
        ("dtype: bfloat16", "out_dtype: torch.bfloat16"),
        ("dtype: bfloat16", "dtype: bfloat16\nseed: 5"),
        ("dtype: bfloat16", "dtype: bfloat16\ngradient_outer: last"),
    ],
)
def test_spellings_of_one_merge_have_one_fingerprint(old, new):
    assert old in TIES
    assert fingerprint(TIES.replace(old, new, 1)) == fingerprint(TIES)


def test_paths_do_not_matter_but_contents_do():
    moved = TIES.replace("base_model: b", "base_model: /elsewhere/base").replace("model: d", "model: /elsewhere/dapt")
    inputs = {"/elsewhere/base": "xxh3:01", "/elsewhere/dapt": "xxh3:02", "e": "xxh3:03"}
    assert fingerprint(moved, inputs) == fingerprint(TIES)
    for name in INPUTS:
        assert fingerprint(TIES, {**INPUTS, name: "xxh3:99"}) != fingerprint(TIES)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("weight: 0.5", "weight: 0.5000001"),
        ("[0.2, 1]", "[1, 0.2]"),
        ("[0.2, 1]", "[0.2, 0.6, 1]"),  # the same line, but rounded at other places
        ("filter: mlp", "filter: up_proj"),
        ("value: 0.9", "value: 0.8"),
        ("dtype: bfloat16", "dtype: float32"),
        ("dtype: bfloat16\n", ""),
        ("dtype: bfloat16", "dtype: float64\nout_dtype: bfloat16"),  # the same output dtype, computed otherwise
        ("dtype: bfloat16", "dtype: bfloat16\ngradient_outer: mergekit"),
        ("merge_method: ties", "merge_method: dare_ties"),
        ("  - model: e\n    parameters: {weight: 1}\n", ""),
        ("parameters:\n  lambda", "parameters:\n  normalize: false\n  lambda"),
    ],
)
def test_whatever_changes_the_result_changes_the_fingerprint(old, new):
    assert old in TIES
    assert fingerprint(TIES.replace(old, new, 1)) != fingerprint(TIES)


def test_the_order_of_models_counts_because_sums_are_rounded_in_order():
    content = yaml.safe_load(TIES)
    swapped = copy.deepcopy(content)
    swapped["models"].reverse()
    assert recipe_fingerprint(load_recipe(swapped), INPUTS) != recipe_fingerprint(load_recipe(content), INPUTS)


def test_the_seed_counts_for_random_methods_only():
    random = TIES.replace("ties", "dare_ties")
    assert fingerprint(random + "seed: 5\n") != fingerprint(random)
    assert fingerprint(TIES + "seed: 5\n") == fingerprint(TIES)


def test_linear_with_the_base_listed_differs_from_the_line_from_the_base():
    listed = "{merge_method: linear, base_model: b, models: [{model: b}, {model: d}], parameters: {weight: 0.5}}"
    line = "{merge_method: linear, base_model: b, models: [{model: d}], parameters: {weight: 0.5}}"
    assert fingerprint(listed) != fingerprint(line)


def test_slerp_does_not_depend_on_where_the_base_is_listed():
    texts = [
        f"{{merge_method: slerp, base_model: b, models: {models}, parameters: {{t: 0.3}}}}"
        for models in ("[{model: d}]", "[{model: b}, {model: d}]", "[{model: d}, {model: b}]")
    ]
    assert len({fingerprint(text) for text in texts}) == 1


def test_a_missing_input_is_told():
    with pytest.raises(InputError, match="'e'"):
        fingerprint(TIES, {"b": "1", "d": "2"})
