"""SLERP by weights: the arc between tensors, rows, columns or task vectors."""

import math

import numpy as np
import pytest
import torch
from float64_reference import assert_close, draw_tensors, merge, same_bits, wide
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods.api import merge_tensors

from dapt_merge.errors import InputError
from dapt_merge.methods.apply import combine
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.registry import get_method

SEEDS = st.integers(0, 10_000)
SHAPES = [(7,), (5, 1), (1, 6), (4, 9), (3, 2, 5)]
LAYOUTS = [{}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}]
WEIGHTS = st.tuples(st.floats(0.05, 2), st.floats(0.05, 2)).map(list)


def arc(first: np.ndarray, second: np.ndarray, t: float) -> np.ndarray:
    """One pair of vectors; on a line where there is no arc."""
    lengths = np.linalg.norm(first), np.linalg.norm(second)
    if min(lengths) == 0:
        return (1 - t) * first + t * second
    cosine = np.clip(first @ second / lengths[0] / lengths[1], -1, 1)
    if 1 - cosine**2 <= 1e-16:
        return (1 - t) * first + t * second
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


def expected(first, second, t, nuslerp_flatten=True, nuslerp_row_wise=False):
    if nuslerp_flatten:
        return arc(first.reshape(-1), second.reshape(-1), t).reshape(first.shape)
    axis = 0 if nuslerp_row_wise else -1
    one, two = (np.moveaxis(value, axis, -1) for value in (first, second))
    pairs = zip(one.reshape(-1, one.shape[-1]), two.reshape(-1, one.shape[-1]), strict=True)
    return np.moveaxis(np.array([arc(*pair, t) for pair in pairs]).reshape(one.shape), -1, axis)


@given(SEEDS, st.sampled_from(SHAPES), WEIGHTS, st.sampled_from(LAYOUTS), st.booleans())
def test_every_layout_moves_along_its_arcs(seed, shape, weights, layout, with_base):
    base, *models = draw_tensors(seed, shape, 3, spread=1.0)
    origin = wide(base) if with_base else 0
    deltas = [wide(model) - origin for model in models]
    reference = origin + expected(*deltas, weights[1] / sum(weights), **layout)
    merged = merge("nuslerp", base if with_base else None, models, weight=weights, **layout)
    # nearly opposite vectors have large factors that cancel, so the error is relative to the longest input
    longest = max(np.abs(delta).max() for delta in deltas)
    assert np.abs(wide(merged) - reference).max() <= 1e-5 * max(longest, np.abs(reference).max())


@settings(max_examples=40)
@given(st.integers(0, 999), st.sampled_from([*SHAPES, (64, 48)]), WEIGHTS, st.sampled_from(LAYOUTS), st.booleans())
def test_against_mergekit(seed, shape, weights, layout, with_base):
    base, *models = draw_tensors(seed, shape, 3, spread=1.0)
    tensors = [base, *models] if with_base else models
    start = int(with_base)
    reference = merge_tensors(
        tensors,
        "nuslerp",
        parameters={"weight": dict(enumerate(weights, start=start)), **layout},
        ids=list(range(len(tensors))),
        base_index=0 if with_base else None,
    )
    angles = expected_sines(base if with_base else torch.zeros(shape), models, layout)
    scale = torch.full(shape, float(max(tensor.abs().max() for tensor in (*tensors, reference))))
    merged = merge("nuslerp", base if with_base else None, models, weight=weights, **layout)
    # Their float32 cosine is worth 1e-7; what that makes of an angle near 0 or π is no matter of the formula.
    assert_close(merged, reference, [scale], relative=1e-6 / min(1.0, angles**2))


def expected_sines(base, models, layout):
    first, second = (wide(model) - wide(base) for model in models)
    if layout.get("nuslerp_flatten", True):
        first, second, axis = first.reshape(-1), second.reshape(-1), 0
    else:
        axis = 0 if layout.get("nuslerp_row_wise") else -1
    cosine = (first * second).sum(axis) / np.linalg.norm(first, axis=axis) / np.linalg.norm(second, axis=axis)
    sines = np.sqrt(np.clip(1 - cosine**2, 0, 1))
    sines = np.where(sines < 1e-8, 1.0, sines)  # one-element vectors have no arc in either
    return float(np.min(sines))


def test_a_third_of_the_way_between_two_axes_is_thirty_degrees():
    merged = merge("nuslerp", None, [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])], weight=[2, 1])
    assert merged.tolist() == pytest.approx([2 * math.sin(math.pi / 3), 4 * math.sin(math.pi / 6)], rel=1e-6)


def test_rows_and_columns_turn_on_their_own():
    first, second = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    half = math.sqrt(0.5)
    rows = merge("nuslerp", None, [first, second], weight=1, nuslerp_flatten=False)
    assert_close(rows, np.array([[half, half], [2.0, 0.0]]), [first, second])
    columns = merge("nuslerp", None, [first, second], weight=1, nuslerp_flatten=False, nuslerp_row_wise=True)
    # column 1: (1, 2) and (0, 2), column 2: (0, 0) and (1, 0), which has no arc
    assert_close(columns[:, 1], np.array([0.5, 0.0]), [first[:, 1] + 1])
    assert_close(columns[:, 0], arc(np.array([1.0, 2.0]), np.array([0.0, 2.0]), 0.5), [first[:, 0], second[:, 0]])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("with_base", [True, False])
def test_a_weight_of_0_gives_the_other_model_bit_for_bit(layout, with_base):
    base, *models = draw_tensors(3, (4, 6), 3, torch.bfloat16)
    start = base if with_base else None
    assert same_bits(merge("nuslerp", start, models, weight=[0.3, 0], **layout), models[0])
    assert same_bits(merge("nuslerp", start, models, weight=[0, 2], **layout), models[1])


@given(SEEDS, WEIGHTS, st.sampled_from(LAYOUTS))
def test_the_order_of_the_models_does_not_matter(seed, weights, layout):
    base, *models = draw_tensors(seed, (4, 6), 3)
    forth = merge("nuslerp", base, models, weight=weights, **layout)
    back = merge("nuslerp", base, models[::-1], weight=weights[::-1], **layout)
    assert_close(forth, back, [base, *models], relative=1e-5)


@given(SEEDS, st.floats(0.05, 0.95))
def test_models_of_one_length_keep_it(seed, share):
    models = [tensor / tensor.norm() for tensor in draw_tensors(seed, (40,), 2, spread=1.0)]
    merged = merge("nuslerp", None, models, weight=[1 - share, share])
    assert float(merged.norm()) == pytest.approx(1, rel=1e-5)


def test_only_the_ratio_of_the_weights_matters_and_a_sum_of_0_is_the_middle():
    base, *models = draw_tensors(1, (30,), 3)
    assert torch.equal(*(merge("nuslerp", base, models, weight=weights) for weights in ([1, 3], [0.5, 1.5])))
    context = TensorContext("w")
    merged = combine(get_method("nuslerp"), base, models, {"weight": [1.0, -1.0]}, context)
    assert torch.equal(merged, merge("nuslerp", base, models, weight=1))
    assert "add to 0" in str(context.notes["weight"])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", ["zero", "parallel", "opposite"])
def test_vectors_without_an_arc_are_merged_linearly_and_counted(layout, case):
    first = torch.linspace(1, 2, 6).reshape(2, 3)
    second = {"zero": first * 0, "parallel": first * 4, "opposite": -first}[case]
    context = TensorContext("w")
    merged = combine(get_method("nuslerp"), None, [first, second], {"weight": [0.75, 0.25], **layout}, context)
    assert_close(merged, 0.75 * wide(first) + 0.25 * wide(second), [first, second])
    assert str(context.notes["fallback"]).startswith("linear")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (1, 1), (5, 1), (1, 100_003), (100_003, 1)], ids=str)
def test_every_shape_and_piece_size_gives_the_same_finite_tensor(shape, layout):
    base, *models = draw_tensors(2, shape, 3, torch.bfloat16)
    results = [
        combine(get_method("nuslerp"), base, models, {"weight": 0.5, **layout}, TensorContext("w"), piece_elements=size)
        for size in (None, 1024)
    ]
    assert results[0].shape == shape
    assert same_bits(*results)


def test_it_takes_exactly_two_models_and_flattening_leaves_nothing_to_row_wise():
    base, *models = draw_tensors(1, (3,), 4)
    with pytest.raises(InputError, match="expected exactly 2"):
        merge("nuslerp", base, models, weight=1)
    explain = get_method("nuslerp").dead_knobs
    assert explain is not None
    assert explain({"weight": 1, "nuslerp_row_wise": True}, 2)[0].startswith("nuslerp_row_wise")
    assert explain({"weight": 1, "nuslerp_row_wise": True, "nuslerp_flatten": False}, 2) == []
