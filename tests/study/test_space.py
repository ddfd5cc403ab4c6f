"""A space reaches what its settings say, with no knob that cannot change the merge."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapt_merge.errors import InputError
from dapt_merge.recipe import resolve
from dapt_merge.study.space import (
    build_space,
    complete_point,
    describe,
    endpoint,
    endpoint_recipe,
    find_checkpoints,
    grid,
    propose,
    space_warnings,
    to_recipe,
)

CHECKPOINTS = {"checkpoint-10": "/run/checkpoint-10", "checkpoint-20": "/run/checkpoint-20"}
UNIT = {"low": 0.0, "high": 1.0}


def space(**raw):
    return build_space(raw, "/base", CHECKPOINTS)


def first(space, **chosen):
    """The point of first values, but for those chosen."""
    return propose(
        space,
        lambda knob: chosen.get(knob.name, (knob.setting.values() or (knob.setting.low,))[0]),  # type: ignore[union-attr]
    )


def test_a_parameter_is_proposed_only_for_the_methods_that_declare_it():
    built = space(method=["linear", "ties"], weight=UNIT, density=UNIT)
    assert set(first(built, method="linear")) == {"method", "checkpoint", "weight"}
    assert set(first(built, method="ties")) == {"method", "checkpoint", "weight", "density"}


def test_a_range_per_method_is_a_knob_of_its_own():
    built = space(
        method=["ties", "dare_ties"], weight=UNIT, density={"ties": 0.5, "dare_ties": {"low": 0.01, "high": 1}}
    )
    assert "ties.density" in first(built, method="ties")
    assert "dare_ties.density" not in first(built, method="ties")
    assert "dare_ties.density" in first(built, method="dare_ties")


def test_the_weight_of_slerp_is_its_t():
    recipe = to_recipe(space(method="slerp", weight=UNIT), first(space(method="slerp", weight=UNIT), weight=0.25))
    assert resolve(recipe, "x", None, 2).values["t"] == 0.25


def test_group_weights_reach_the_tensors_of_their_group():
    built = space(method="linear", weight={"attention": UNIT, "mlp": UNIT, "norm": UNIT, "rest": 0.9})
    point = first(built, **{"weight.attention": 0.1, "weight.mlp": 0.2, "weight.norm": 0.3})
    recipe = to_recipe(built, point)
    weights = {
        "model.layers.0.self_attn.q_proj.weight": 0.1,
        "model.layers.1.mlp.up_proj.weight": 0.2,
        "model.layers.0.post_attention_layernorm.weight": 0.3,
        "model.embed_tokens.weight": 0.9,
    }
    assert {name: resolve(recipe, name, 0, 2).values["weight"] for name in weights} == {
        name: (weight,) for name, weight in weights.items()
    }


@given(st.sampled_from(["linear", "slerp", "ties", "dare_linear", "dare_ties"]), st.sampled_from([0.0, 1.0]))
def test_every_spelling_of_an_end_is_one_recipe(method, weight):
    built = space(
        method=[method], checkpoint="all", weight=UNIT, **({} if method in ("linear", "slerp") else {"density": UNIT})
    )
    point = first(built, checkpoint="checkpoint-20", weight=weight, density=1.0)
    assert to_recipe(built, point) == endpoint_recipe(built, "base" if weight == 0 else "dapt")


def test_an_earlier_checkpoint_at_weight_one_is_itself_and_not_the_dapt_end():
    built = space(method="ties", checkpoint="all", weight=UNIT, density=1.0)
    recipe = to_recipe(built, first(built, checkpoint="checkpoint-10", weight=1.0))
    assert recipe == endpoint_recipe(built, "dapt", "checkpoint-10") != endpoint_recipe(built, "dapt")


def test_the_ends_are_at_weight_zero_and_one_of_the_last_checkpoint():
    built = space(method=["ties", "linear"], checkpoint="all", weight={"low": 0.2, "high": 0.8}, density=0.5)
    assert endpoint(built, "base") == {"method": "linear", "checkpoint": "checkpoint-20", "weight": 0.0}
    assert endpoint(built, "dapt") == {"method": "linear", "checkpoint": "checkpoint-20", "weight": 1.0}


def test_a_grid_is_the_product_of_the_values_that_each_method_has():
    built = space(method=["linear", "ties"], weight={"low": 0, "high": 1, "step": 0.1}, density=[0.2, 0.5])
    points = grid(built)
    assert len(points) == 11 + 22
    assert {point["weight"] for point in points} == {round(0.1 * i, 12) for i in range(11)}


def test_random_masks_take_the_studys_seed():
    built = build_space({"method": "dare_ties", "weight": 0.5, "density": 0.5}, "/base", CHECKPOINTS, mask_seed=7)
    assert to_recipe(built, first(built)).seed == 7


def test_an_enqueued_point_may_leave_out_what_has_one_value_and_means_the_last_checkpoint():
    built = space(method=["linear", "ties"], checkpoint="all", weight=UNIT, density=0.5)
    assert complete_point(built, {"method": "ties", "weight": 1}, "enqueue.0") == {
        "method": "ties",
        "checkpoint": "checkpoint-20",
        "weight": 1.0,
        "density": 0.5,
    }


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ({"method": "linear"}, "'weight' has to be a value of the space, found nothing"),
        ({"method": "linear", "weight": 2}, "found 2"),
        ({"method": "linear", "weight": 0.5, "density": 0.5}, "'density' is no parameter of linear"),
        ({"method": "linear", "wieght": 0.5}, "Did you mean 'weight'"),
        ({"method": "tis", "weight": 0.5}, "found 'tis'"),
    ],
)
def test_an_enqueued_point_outside_the_space_is_refused(point, said):
    with pytest.raises(InputError, match=said):
        complete_point(space(method=["linear", "ties"], weight=UNIT, density=UNIT), point, "enqueue.0")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"method": ["linaer"], "weight": UNIT}, "Did you mean 'linear'"),
        ({"weight": UNIT}, "names no method"),
        ({"method": "linear"}, "has no weight"),
        ({"method": "linear", "weight": UNIT, "density": UNIT}, "could change no merge"),
        ({"method": "linear", "wieght": UNIT}, "Did you mean 'weight'"),
        ({"method": "slerp", "weight": {"low": 0, "high": 1.5}}, "'t' is 1.5"),
        ({"method": "ties", "weight": UNIT, "density": {"low": 0.5, "hihg": 1}}, "'hihg'"),
        ({"method": "ties", "weight": {"low": 1, "high": 0}, "density": 1}, "low 1 is above high 0"),
        ({"method": "ties", "weight": UNIT, "density": {"low": 0, "high": 1, "log": True}}, "log range"),
        ({"method": "linear", "weight": {"attention": UNIT}}, "outside the named groups"),
        ({"method": "linear", "weight": {"atention": UNIT, "rest": 0}}, "Did you mean 'attention'"),
        ({"method": "linear", "weight": []}, "not a list of values"),
        ({"method": "linear", "weight": "half"}, "'half'"),
        ({"method": "linear", "weight": UNIT, "checkpoint": "checkpoint-30"}, "no checkpoint 'checkpoint-30'"),
    ],
)
def test_a_space_that_cannot_be_meant_is_refused_with_the_key(raw, said):
    with pytest.raises(InputError, match=said) as refused:
        space(**raw)
    assert "space" in str(refused.value) or "method" in str(refused.value)


def test_what_makes_a_space_larger_than_its_models_is_said():
    assert space_warnings(space(method=["linear", "ties"], weight=UNIT, density=UNIT)) == []
    assert "same model" in space_warnings(space(method=["linear", "task_arithmetic"], weight=UNIT))[0]
    assert "product" in " ".join(space_warnings(space(method="task_arithmetic", weight=UNIT, **{"lambda": UNIT})))
    cancelling = space_warnings(space(method="ties", weight=UNIT, density=0.5, normalize=True))
    assert "weight" in " ".join(cancelling)


def test_a_runs_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (900, 1000, 80):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text("{}")
    (tmp_path / "checkpoint-2000").mkdir()  # torn: no config
    assert list(find_checkpoints(str(tmp_path))) == ["checkpoint-80", "checkpoint-900", "checkpoint-1000"]


def test_models_of_one_name_in_several_folders_stay_apart(tmp_path):
    assert len(find_checkpoints(["a/final", "b/final", "c/other"])) == 3


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(InputError, match="no checkpoint is here"):
        find_checkpoints(str(tmp_path))


def test_a_point_in_words():
    assert describe({"method": "ties", "checkpoint": "c-2", "weight": 0.25, "ties.density": 0.1234}) == (
        "ties weight 0.25 density 0.123 · c-2"
    )
