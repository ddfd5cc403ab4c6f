"""SCE: select by variance, calculate weights, erase minority signs."""

import numpy as np
import pytest
import torch
from float64_reference import SHAPES, assert_close, draw_tensors, merge, same_bits, sce_update, wide
from hypothesis import assume, given
from hypothesis import strategies as st

from dapt_merge.methods.sce import variance


def test_weights_and_signs_by_hand():
    """Squares 16 + 1 and 4 + 9: weights 17/30, 13/30. First element: both positive; second: −1 + 3 > 0, only 3."""
    models = [torch.tensor([4.0, -1.0]), torch.tensor([2.0, 3.0])]
    merged = merge("sce", torch.zeros(2), models)
    assert merged.tolist() == pytest.approx([(17 * 4 + 13 * 2) / 30, 3.0])


def test_selection_by_hand():
    """Variances 4, 1, 1/4 and 0: three positions differ, ⌊0.7·3⌋ = 2 are selected, the rest is the base's."""
    models = [torch.tensor([4.0, 0.0, 2.0, 1.0]), torch.tensor([0.0, -2.0, 1.0, 1.0])]
    assert merge("sce", torch.zeros(4), models, select_topk=0.7).tolist() == [4, -2, 0, 0]
    assert merge("sce", torch.zeros(4), models, select_topk=0.01).tolist() == [4, 0, 0, 0]
    assert merge("sce", torch.zeros(4), models).tolist()[3] == pytest.approx(1)


@given(st.integers(0, 9999), st.sampled_from(SHAPES), st.integers(2, 4), st.floats(0.01, 1))
def test_it_agrees_with_the_formula(seed, shape, count, select_topk):
    base, *models = draw_tensors(seed, shape, count + 1)
    deltas = [wide(model - base) for model in models]
    variances = np.sort(np.var(deltas, axis=0).reshape(-1))
    assume((np.diff(variances) > 1e-5 * variances[1:]).all())  # float32 may order closer ones otherwise
    assume((np.abs(sum(deltas)) > 1e-5).all())
    merged = merge("sce", base, models, select_topk=select_topk)
    assert_close(merged, wide(base) + sce_update(deltas, select_topk), [base, *models], relative=3e-6)


@given(st.integers(0, 9999), st.integers(2, 5))
def test_the_variance_of_equal_changes_is_exactly_zero(seed, count):
    (delta,) = draw_tensors(seed, (50,), 1)
    assert not variance([delta] * count).any()
    _, *deltas = draw_tensors(seed, (50,), count + 1)
    np.testing.assert_allclose(
        variance(deltas).numpy(), np.var([wide(delta) for delta in deltas], axis=0), rtol=1e-4, atol=1e-9
    )


def test_one_task_vector_has_no_variance():
    base, model = draw_tensors(0, (5,), 2)
    assert same_bits(merge("sce", base, [model]), model)
    assert same_bits(merge("sce", base, [model], select_topk=0.9), base)


def test_equal_models_are_taken_whole_or_not_at_all():
    base, model = draw_tensors(0, (5,), 2)
    torch.testing.assert_close(merge("sce", base, [model, model]), model)
    assert torch.equal(merge("sce", base, [model, model], select_topk=0.9), base)
    assert torch.equal(merge("sce", base, [base, base]), base)


def test_small_updates_are_weighted_like_large_ones_unless_a_floor_is_given():
    base, *models = draw_tensors(0, (40,), 3)
    base = torch.zeros_like(base)
    small = [model * 2.0**-20 for model in models]
    assert torch.equal(merge("sce", base, small) * 2.0**20, merge("sce", base, models))
    alike = merge("sce", base, small, equal_below=1e-6)
    expected = [np.array(wide(model)) for model in small]
    agreeing = np.sign(expected) == np.where(sum(expected) >= 0, 1, -1)
    mean = (agreeing * expected).sum(axis=0) / np.maximum(agreeing.sum(axis=0), 1)
    assert_close(alike, mean, small)
