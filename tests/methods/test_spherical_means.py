"""multislerp and karcher: directions and lengths averaged apart."""

import math

import numpy as np
import pytest
import torch
from float64_reference import assert_close, draw_tensors, karcher_mean, merge, same_bits, wide
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mergekit.merge_methods.api import merge_tensors

from dapt_merge.errors import InputError
from dapt_merge.methods.apply import combine
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.registry import get_method

SEEDS = st.integers(0, 10_000)
SHAPES = [(2,), (7,), (5, 1), (4, 9), (3, 2, 5)]
WEIGHTS = st.lists(st.floats(0.05, 2), min_size=2, max_size=4)
# Karcher's iteration ends at a step of 1e-5; what is then left of the way is of that size.
TOLERANCE = 3e-5


def tangent_step(vectors: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """The method as it is told: the tangent space at the mean direction, the mean there, the exponential map."""
    flat = np.array([vector.reshape(-1) for vector in vectors])
    lengths = np.linalg.norm(flat, axis=1)
    units = flat / lengths[:, None]
    mean = weights @ units
    mean /= np.linalg.norm(mean)
    tangent = weights @ (units - np.outer(units @ mean, mean))
    step = np.linalg.norm(tangent) + 1e-8
    merged = math.cos(step) * mean + math.sin(step) / step * tangent
    return (weights @ lengths * merged).reshape(vectors[0].shape)


@given(SEEDS, st.sampled_from(SHAPES), WEIGHTS, st.booleans(), st.booleans())
def test_multislerp_is_the_step_in_the_tangent_space(seed, shape, weights, normalize, with_base):
    base, *models = draw_tensors(seed, shape, len(weights) + 1, spread=0.5)
    origin = wide(base) if with_base else 0
    shares = np.array(weights) / (sum(weights) if normalize else 1)
    vectors = [wide(model) - origin for model in models]
    units = [vector / np.linalg.norm(vector) for vector in vectors]
    strength = np.linalg.norm(sum(share * unit for share, unit in zip(shares, units, strict=True)))
    expected = origin + tangent_step(vectors, shares)
    merged = merge("multislerp", base if with_base else None, models, weight=weights, normalize_weights=normalize)
    # directions that nearly cancel leave a short mean, which is stretched with its errors
    scale = np.abs(wide(base)).max() + max(np.abs(vector).max() for vector in vectors) * sum(shares)
    assert np.abs(wide(merged) - expected).max() <= 1e-6 * scale * max(1, 1 / strength) ** 2


@settings(max_examples=40)
@given(st.integers(0, 999), st.sampled_from([*SHAPES, (64, 48)]), WEIGHTS, st.booleans(), st.booleans())
def test_multislerp_against_mergekit(seed, shape, weights, normalize, with_base):
    base, *models = draw_tensors(seed, shape, len(weights) + 1, spread=0.2 if not with_base else 1.0)
    tensors = [base, *models] if with_base else models
    reference = merge_tensors(
        tensors,
        "multislerp",
        parameters={"weight": dict(enumerate(weights, start=int(with_base))), "normalize_weights": normalize},
        ids=list(range(len(tensors))),
        base_index=0 if with_base else None,
    )
    vectors = [wide(model) - (wide(base) if with_base else 0) for model in models]
    mean = sum(w * v / np.linalg.norm(v) for w, v in zip(weights, vectors, strict=True)) / sum(weights)
    scale = torch.full(shape, float(max(tensor.abs().max() for tensor in (*tensors, reference))))
    merged = merge("multislerp", base if with_base else None, models, weight=weights, normalize_weights=normalize)
    # Theirs adds and divides in float32 throughout, and is itself 1e-6 from float64 where ours is 1e-7.
    assert_close(merged, reference, [scale], relative=3e-6 * max(1.0, 1 / np.linalg.norm(mean) ** 2))


@settings(max_examples=40)
@given(st.integers(0, 999), st.sampled_from([*SHAPES, (64, 48)]), st.integers(2, 4))
def test_karcher_against_mergekit(seed, shape, count):
    """Ours is held to float64 within its tolerance; mergekit to ours, by its own distance from float64."""
    models = draw_tensors(seed, shape, count, spread=0.3)
    largest = float(max(model.abs().max() for model in models))
    exact = karcher_mean([wide(model) for model in models])
    assume(all((wide(model) * exact).sum() > 0 for model in models))  # else it need not be the only mean
    ours, theirs = merge("karcher", None, models), merge_tensors(models, "karcher")
    assert_close(ours, exact, [torch.full(shape, largest)], relative=TOLERANCE)
    own_error = np.abs(wide(theirs) - exact).max()
    assert own_error <= 1e-3 * largest
    assert np.abs(wide(ours) - wide(theirs)).max() <= own_error + TOLERANCE * largest


@given(SEEDS, st.sampled_from(SHAPES), st.integers(2, 4))
def test_karcher_minimises_the_summed_squared_angles(seed, shape, count):
    models = draw_tensors(seed, shape, count, spread=0.3)
    scale = torch.full(shape, float(max(model.abs().max() for model in models)))
    merged = merge("karcher", None, models, max_iter=200, tol=1e-9)
    assert_close(merged, karcher_mean([wide(model) for model in models]), [scale], relative=2e-6)


def test_karcher_counts_a_base_like_any_model_when_it_is_listed():
    one, two = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    half = 3 * math.sqrt(0.5)
    assert merge("karcher", None, [one, two]).tolist() == pytest.approx([half, half], rel=1e-6)
    assert torch.equal(merge("karcher", one * 7, [one, two]), merge("karcher", None, [one, two]))


def test_the_mean_of_three_axes_is_the_diagonal_of_mean_length():
    models = [torch.eye(3)[axis] * length for axis, length in enumerate([1.0, 2.0, 3.0])]
    diagonal = [2 / math.sqrt(3)] * 3
    assert merge("multislerp", None, models, weight=1).tolist() == pytest.approx(diagonal, rel=1e-6)
    assert merge("karcher", None, models).tolist() == pytest.approx(diagonal, rel=1e-6)


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
@given(seed=SEEDS, order=st.permutations([0, 1, 2]))
def test_the_order_of_the_models_does_not_matter(name, seed, order):
    models = draw_tensors(seed, (4, 6), 3)
    weights = [0.2, 0.9, 0.5]
    values = {"weight": weights} if name == "multislerp" else {}
    moved = {"weight": [weights[place] for place in order]} if name == "multislerp" else {}
    forth = merge(name, None, models, **values)
    assert_close(merge(name, None, [models[place] for place in order], **moved), forth, models, relative=1e-5)


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
@given(seed=SEEDS, count=st.integers(2, 4))
def test_the_result_is_as_long_as_the_models_are_on_average(name, seed, count):
    models = draw_tensors(seed, (5, 8), count)
    merged = merge(name, None, models, **({"weight": 1} if name == "multislerp" else {}))
    assert float(merged.norm()) == pytest.approx(np.mean([float(model.norm()) for model in models]), rel=1e-5)


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_equal_models_and_a_single_one_are_given_back(name):
    (model,) = draw_tensors(5, (50,), 1, torch.bfloat16)
    values = {"weight": 0.3} if name == "multislerp" else {}
    assert same_bits(merge(name, None, [model], **values), model)
    assert_close(merge(name, None, [model] * 3, **values), model, [model])
    explain = get_method(name).dead_knobs
    assert explain is not None
    assert len(explain(values, 1)) == 1
    assert explain(values, 2) == []


def test_a_weight_of_0_takes_no_part_and_leaves_a_single_model_bit_for_bit():
    base, *models = draw_tensors(1, (30,), 4, torch.float16)
    assert same_bits(merge("multislerp", base, models, weight=[0, 0.4, 0]), models[1])
    two = merge("multislerp", base, models[:2], weight=[0.3, 0.4])
    assert_close(merge("multislerp", base, models, weight=[0.3, 0.4, 0]), two, [base, *models])


@pytest.mark.parametrize("count", [2, 4])
def test_directions_that_cancel_are_merged_linearly_and_say_so(count):
    one, two = draw_tensors(1, (6,), 2)
    models = [one, -one, two, -two][:count]
    context = TensorContext("w")
    merged = combine(get_method("multislerp"), None, models, {"weight": 0.5}, context)
    assert_close(merged, np.zeros(6), models, relative=1e-5)
    assert "cancel" in str(context.notes["fallback"])


def test_a_tensor_that_no_model_trained_is_the_base():
    base = draw_tensors(1, (6,), 1)[0]
    assert torch.equal(merge("multislerp", base, [base, base, base], weight=[0.2, 0.3, 0.5]), base)
    assert torch.equal(merge("multislerp", base, [base, base], weight=1, eps=0), base)


def test_karcher_of_opposite_models_says_what_it_left_out():
    one = draw_tensors(1, (6,), 1)[0]
    context = TensorContext("w")
    merged = combine(get_method("karcher"), None, [one, -one], {}, context)
    assert_close(merged, one, [one])
    assert "opposite" in str(context.notes["fallback"])


def test_tensors_without_length_get_their_plain_mean():
    tiny = torch.full((4,), 1e-7)
    assert_close(merge("karcher", None, [tiny, 3 * tiny]), 2 * wide(tiny), [tiny])
    some = merge("karcher", None, [torch.zeros(2), torch.tensor([0.0, 4.0])])
    assert some.tolist() == pytest.approx([0, 2], rel=1e-6)


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (5, 1), (1, 100_003)], ids=str)
def test_every_shape_and_piece_size_gives_the_same_finite_tensor(name, shape):
    models = draw_tensors(2, shape, 3, torch.bfloat16)
    values: dict = {"weight": 0.5} if name == "multislerp" else {}
    results = [
        combine(get_method(name), None, models, values, TensorContext("w"), piece_elements=size)
        for size in (None, 1024)
    ]
    assert results[0].shape == shape
    assert same_bits(*results)


def test_wrong_values_are_refused():
    models = draw_tensors(0, (3,), 2)
    with pytest.raises(InputError, match="add to 0"):
        merge("multislerp", None, models, weight=[1, -1])
    with pytest.raises(InputError, match=r"'max_iter' is 2.5, expected a whole number"):
        merge("karcher", None, models, max_iter=2.5)
    with pytest.raises(InputError, match="above 0"):
        merge("karcher", None, models, tol=0)


@pytest.mark.parametrize("spread", [1e-4, 1e-2])
def test_in_a_large_tensor_ours_is_nearer_to_float64_than_mergekit(spread):
    """A million squares added in float32 lose what the angle between close models is made of."""
    models = [tensor * 0.05 for tensor in draw_tensors(7, (1536, 576), 3, spread=spread / 0.05)]
    flat = np.array([wide(model).reshape(-1) for model in models])
    lengths = np.linalg.norm(flat, axis=1)
    mean = (flat / lengths[:, None]).mean(0)
    expected = (lengths.mean() * mean / np.linalg.norm(mean)).reshape(1536, 576)
    largest = np.abs(expected).max()
    ours = np.abs(wide(merge("multislerp", None, models, weight=1)) - expected).max() / largest
    reference = merge_tensors(models, "multislerp", parameters={"weight": [1.0, 1.0, 1.0]})
    assert ours <= 5e-7
    assert ours <= np.abs(wide(reference) - expected).max() / largest
