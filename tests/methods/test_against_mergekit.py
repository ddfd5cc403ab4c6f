"""Parity with mergekit in float32; in bfloat16 at least as close to float64 as mergekit is."""

import numpy as np
import pytest
import torch
from float64_reference import assert_close, draw_tensors, elected, merge, spherical, trimmed, wide
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mergekit.merge_methods.api import merge_tensors

SHAPES = [(1,), (7,), (5, 1), (4, 9), (3, 2, 5), (64, 48)]
POSITIVE = st.floats(0.05, 2)


def theirs(name, base, models, dtype=None, **values):
    """mergekit's result; per-input values follow the order base, models."""
    for key in ("weight", "density"):
        if isinstance(values.get(key), list | tuple):
            values[key] = dict(enumerate(values[key], start=1))
    if "lambda_" in values:
        values["lambda"] = values.pop("lambda_")
    tensors = [base, *models]
    return merge_tensors(tensors, name, parameters=values, ids=list(range(len(tensors))), base_index=0, dtype=dtype)


@settings(max_examples=40)
@given(st.integers(0, 999), st.sampled_from(SHAPES), st.lists(POSITIVE, min_size=2, max_size=4), st.booleans())
def test_linear(seed, shape, weights, normalize):
    models = draw_tensors(seed, shape, len(weights))
    reference = merge_tensors(models, "linear", parameters={"weight": weights, "normalize": normalize})
    assert_close(merge("linear", None, models, weight=weights, normalize=normalize), reference, [*models, reference])


@settings(max_examples=40)
@given(st.integers(0, 999), st.sampled_from(SHAPES), st.floats(0.01, 0.99), st.sampled_from([1e-3, 0.3, 1.5]))
def test_slerp_on_the_arc_and_past_the_threshold(seed, shape, t, spread):
    base, model = draw_tensors(seed, shape, 2, spread=spread)
    cosine = abs(float((base.double() * model.double()).sum() / base.double().norm() / model.double().norm()))
    assume(abs(cosine - 0.9995) > 1e-6)  # there the two may fall on different sides
    assume(cosine < 0.9995 or cosine > 0.9996)
    scale = torch.full(shape, float(base.abs().max() + model.abs().max()))
    assert_close(merge("slerp", base, [model], t=t), theirs("slerp", base, [model], t=t), [base, model, scale])


@settings(max_examples=40)
@given(
    st.integers(0, 999),
    st.sampled_from(SHAPES),
    st.lists(POSITIVE, min_size=1, max_size=3),
    st.floats(0.1, 1.5),
    st.booleans(),
)
def test_task_arithmetic(seed, shape, weights, lambda_, normalize):
    base, *models = draw_tensors(seed, shape, len(weights) + 1)
    values = {"weight": weights, "lambda_": lambda_, "normalize": normalize}
    reference = theirs("task_arithmetic", base, models, **values)
    assert_close(merge("task_arithmetic", base, models, **values), reference, [base, *models, reference])


@settings(max_examples=60)
@given(
    st.integers(0, 999),
    st.sampled_from(SHAPES),
    st.lists(st.tuples(POSITIVE, st.floats(0.01, 1)), min_size=1, max_size=3),
    st.floats(0.1, 1.5),
    st.booleans(),
)
def test_ties(seed, shape, votes, lambda_, normalize):
    weights, densities = (list(column) for column in zip(*votes, strict=True))
    base, *models = draw_tensors(seed, shape, len(votes) + 1)
    magnitudes = [(model - base).abs().reshape(-1) for model in models]
    assume(all(values.unique().numel() == values.numel() for values in magnitudes))  # ties are theirs to order
    deltas = [trimmed(wide(model - base), density) for model, density in zip(models, densities, strict=True)]
    ballot = np.abs(sum(weight * delta for weight, delta in zip(weights, deltas, strict=True)))
    assume(((ballot > 1e-5) | (ballot == 0)).all())  # votes that cancel up to rounding may elect either sign
    values = {"weight": weights, "density": densities, "lambda_": lambda_, "normalize": normalize}
    reference = theirs("ties", base, models, **values)
    assert_close(merge("ties", base, models, **values), reference, [base, *models, reference])


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_without_dropping(method):
    base, *models = draw_tensors(4, (40, 30), 3)
    values = {"weight": [0.4, 0.7], "lambda_": 0.8, "normalize": True}
    assert_close(merge(method, base, models, **values), theirs(method, base, models, **values), [base, *models])


@pytest.mark.parametrize("name", ["linear", "slerp", "task_arithmetic", "ties"])
@pytest.mark.parametrize("spread", [1e-2, 1.0])
def test_in_bfloat16_ours_is_at_least_as_close_to_float64(name, spread):
    base, *models = draw_tensors(7, (120, 100), 2 if name == "slerp" else 3, torch.bfloat16, spread)
    weights = [0.3, 0.45]
    wide_base, deltas = wide(base), [wide(model) - wide(base) for model in models]
    if name == "slerp":
        values: dict = {"t": 0.3}
        expected = spherical(wide_base, wide(models[0]), 0.3)
        if spread < 0.1:
            expected = wide_base + 0.3 * deltas[0]
    elif name == "ties":
        values = {"weight": weights, "density": 1.0, "normalize": True}
        expected = wide_base + elected(deltas, weights, "weighted", True)
    else:
        values = {"weight": weights}
        expected = wide_base + sum(w * d for w, d in zip(weights, deltas, strict=True))
    ours = merge(name, base, models, **values).bfloat16()
    if name == "linear":
        reference = merge_tensors(
            [base, *models], "linear", parameters={"weight": [0.25, *weights]}, dtype=torch.bfloat16
        )
    else:
        reference = theirs(name, base, models, dtype=torch.bfloat16, **values)
    error, their_error = (np.linalg.norm(wide(result) - expected) for result in (ours, reference.bfloat16()))
    assert error <= their_error * (1 + 1e-9)
