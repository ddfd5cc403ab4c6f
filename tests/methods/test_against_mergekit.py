"""Parity with mergekit in float32, tensor by tensor; whole models are in tests/merging, accuracy in test_accuracy."""

import math

import numpy as np
import pytest
import torch
from float64_reference import (
    assert_close,
    banded,
    draw_tensors,
    importance,
    merge,
    outlier_threshold,
    trimmed,
    wide,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import registered_methods
from mergekit.merge_methods.api import merge_tensors

SHAPES = [(1,), (7,), (5, 1), (4, 9), (3, 2, 5), (64, 48)]
POSITIVE = st.floats(0.05, 2)


def theirs(name, base, models, dtype=None, **values):
    """mergekit's result; per-input values follow the order base, models."""
    for key in ("weight", "density", "gamma", "epsilon"):
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


@settings(max_examples=40)
@given(
    st.integers(0, 999),
    st.sampled_from(SHAPES),
    st.lists(st.tuples(POSITIVE, st.floats(0.01, 1), st.floats(0, 0.5)), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
)
def test_breadcrumbs(seed, shape, shares, elects, normalize):
    weights, densities, gammas = (list(column) for column in zip(*shares, strict=True))
    base, *models = draw_tensors(seed, shape, len(shares) + 1)
    numel = base.numel()
    # elsewhere the two differ on purpose: one element is always kept, and outliers always go
    assume(all(1 <= int(d * numel) <= numel - int(g * numel) and d + g < 1 for _, d, g in shares))
    assume(all((model - base).abs().unique().numel() == numel for model in models))
    deltas = [banded(wide(m - base), d, g) for (_, d, g), m in zip(shares, models, strict=True)]
    ballot = np.abs(sum(weight * delta for weight, delta in zip(weights, deltas, strict=True)))
    assume(((ballot > 1e-5) | (ballot == 0)).all())
    values = {"weight": weights, "density": densities, "gamma": gammas, "normalize": normalize}
    name = "breadcrumbs_ties" if elects else "breadcrumbs"
    reference = theirs(name, base, models, **values)
    scale = torch.full(shape, sum(weights))
    assert_close(merge(name, base, models, **values), reference, [base, *models, reference, scale])


@settings(max_examples=40)
@given(st.integers(0, 999), st.sampled_from(SHAPES), st.integers(2, 4), st.booleans())
def test_model_stock_where_the_models_have_a_direction_in_common(seed, shape, count, filter_wise):
    base, common, *models = draw_tensors(seed, shape, count + 2)
    models = [model + 2 * (common - base) for model in models]
    deltas = [(model - base).reshape(-1, shape[-1] if filter_wise else base.numel()) for model in models]
    pairs = [(i, j) for i in range(count) for j in range(i)]
    norms = [delta.norm(dim=1) for delta in deltas]
    assume(all((norm > 1e-2).all() for norm in norms))  # theirs bounds the product of two norms from below
    cosines = sum((deltas[i] * deltas[j]).sum(dim=1) / norms[i] / norms[j] for i, j in pairs) / len(pairs)
    assume((cosines > 0.05).all())  # ours stays at the base below 0
    reference = theirs("model_stock", base, models, filter_wise=filter_wise)
    assert_close(merge("model_stock", base, models, filter_wise=filter_wise), reference, [base, *models, reference])


@settings(max_examples=40)
@given(st.integers(0, 999), st.sampled_from(SHAPES), st.integers(1, 4), st.floats(0.01, 1))
def test_sce(seed, shape, count, select_topk):
    base, *models = draw_tensors(seed, shape, count + 1)
    deltas = [wide(model - base) for model in models]
    variances = np.sort(np.var(deltas, axis=0).reshape(-1))
    assume(count == 1 or select_topk == 1 or (np.diff(variances) > 1e-5 * variances[1:]).all())
    assume(count == 1 or int(select_topk * variances.size) >= 1)  # ours selects one at least
    in_float32 = int(np.float32(select_topk) * np.float32(variances.size))  # theirs counts so
    assume(in_float32 == int(select_topk * variances.size))
    assume((np.abs(sum(deltas)) > 1e-5).all())
    reference = theirs("sce", base, models, select_topk=select_topk)
    assert_close(merge("sce", base, models, select_topk=select_topk), reference, [base, *models])


def test_sce_weighs_small_updates_alike_when_asked_to():
    base, *models = draw_tensors(8, (40, 30), 3, spread=1e-4)
    reference = theirs("sce", base, models)
    assert_close(merge("sce", base, models, equal_below=1e-6), reference, [base, *models])
    assert (merge("sce", base, models) - reference).abs().max() > 1e-7


@settings(max_examples=40)
@given(st.integers(0, 999), st.sampled_from(SHAPES), st.floats(2e-6, 1))
def test_nearswap(seed, shape, t):
    base, model = draw_tensors(seed, shape, 2)
    assert_close(merge("nearswap", base, [model], t=t), theirs("nearswap", base, [model], t=t), [base, model])


@settings(max_examples=40)
@given(st.integers(0, 999), st.sampled_from(SHAPES), st.integers(1, 4), st.floats(1e-3, 0.8), st.floats(0, 1))
def test_ram(seed, shape, count, epsilon, r):
    base, *models = draw_tensors(seed, shape, count + 1)
    reference = theirs("ram", base, models, epsilon=epsilon)
    assert_close(merge("ram", base, models, epsilon=epsilon), reference, [base, *models])
    values = {"epsilon": epsilon, "r": r, "alpha": 0.7}
    reference = theirs("ramplus_tl", base, models, **values)
    assert_close(merge("ramplus_tl", base, models, **values), reference, [base, *models, reference])


@settings(max_examples=40)
@given(st.integers(0, 999), st.sampled_from(SHAPES))
def test_arcee_fusion(seed, shape):
    base, model = draw_tensors(seed, shape, 2, spread=1.0)
    importances = importance(wide(base), wide(model))
    threshold = outlier_threshold(importances)
    assume(threshold == 0 or (np.abs(importances / threshold - 1) > 1e-3).all())  # theirs has float32 divergences
    assert_close(merge("arcee_fusion", base, [model]), theirs("arcee_fusion", base, [model]), [base, model])


@settings(max_examples=10)
@given(st.integers(0, 999), st.sampled_from(SHAPES), st.floats(-2, 2))
def test_passthrough(seed, shape, scale):
    (model,) = draw_tensors(seed, shape, 1)
    reference = merge_tensors([model], "passthrough", parameters={"scale": scale})
    assert torch.equal(merge("passthrough", None, [model], scale=scale), reference)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_dare_and_della_without_dropping(method):
    base, *models = draw_tensors(4, (40, 30), 3)
    values = {"weight": [0.4, 0.7], "lambda_": 0.8, "normalize": True}
    assert_close(merge(method, base, models, **values), theirs(method, base, models, **values), [base, *models])


# method → our parameters (mergekit's alike), and how many models
EVERY_METHOD = {
    "linear": ({"weight": [0.3, 0.5]}, 2),
    "slerp": ({"t": 0.3}, 1),
    "nuslerp": ({"weight": [0.3, 0.5]}, 2),
    "multislerp": ({"weight": [0.3, 0.5]}, 2),
    "karcher": ({}, 2),
    "task_arithmetic": ({"weight": [0.3, 0.5]}, 2),
    "ties": ({"weight": [0.3, 0.5], "density": [0.5, 0.7]}, 2),
    "dare_linear": ({"weight": [0.3, 0.5], "density": [1.0, 1.0]}, 2),
    "dare_ties": ({"weight": [0.3, 0.5], "density": [1.0, 1.0], "normalize": True}, 2),
    "della_linear": ({"weight": [0.3, 0.5], "density": [1.0, 1.0]}, 2),
    "della": ({"weight": [0.3, 0.5], "density": [1.0, 1.0]}, 2),
    "breadcrumbs": ({"weight": [0.3, 0.5], "density": [0.6, 0.6]}, 2),
    "breadcrumbs_ties": ({"weight": [0.3, 0.5], "density": [0.6, 0.6], "normalize": True}, 2),
    "model_stock": ({}, 2),
    "sce": ({}, 2),
    "nearswap": ({"t": 0.1}, 1),
    "ram": ({"epsilon": 0.05}, 2),
    "ramplus_tl": ({"epsilon": 0.05}, 2),
    "arcee_fusion": ({}, 1),
    "passthrough": ({"scale": 0.7}, 1),
}
WITHOUT_BASE = ("linear", "nuslerp", "multislerp", "karcher", "passthrough")


def test_every_method_of_mergekit_is_in_the_list():
    assert {method.spec.name for method in registered_methods()} == set(EVERY_METHOD)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0), (5000, 1), (1, 5000), (2, 1, 7)], ids=str)
@pytest.mark.parametrize("name", EVERY_METHOD)
def test_odd_shapes(name, shape):
    """Single numbers, nothing at all, single columns and rows; where mergekit fails is in benchmarks/parity."""
    values, count = EVERY_METHOD[name]
    numel = math.prod(shape)
    if name == "arcee_fusion" and not numel:
        return
    if name.startswith("breadcrumbs") and numel == 1:
        return  # ours keeps one element
    base, common, *models = draw_tensors(3, shape, count + 2)
    models = [model + 2 * (common - base) for model in models]  # a direction in common, for model_stock
    if name in WITHOUT_BASE:
        given = {key: list(value) if isinstance(value, list) else value for key, value in values.items()}
        if name in ("nuslerp", "multislerp"):
            given["weight"] = dict(enumerate(given["weight"]))
        reference = merge_tensors(models, name, parameters=given, ids=list(range(count)))
        merged = merge(name, None, models, **values)
    else:
        reference, merged = theirs(name, base, models, **values), merge(name, base, models, **values)
    # sums over 5000 elements in float32, theirs, lose up to √5000 roundings
    assert_close(merged, reference, [base, *models, torch.full(shape, 0.1)], relative=5e-6)
