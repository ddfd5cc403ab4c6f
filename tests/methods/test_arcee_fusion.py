"""Arcee Fusion: outliers of importance come over, everything else is the base's."""

import numpy as np
import pytest
import torch
from float64_reference import draw_tensors, importance, merge, outlier_threshold, same_bits, wide
from hypothesis import given
from hypothesis import strategies as st

from dapt_merge.methods.arcee_fusion import row_divergences
from dapt_merge.methods.selection import magnitudes_of_rank

SHAPES = [(7,), (4, 9), (3, 2, 5), (12, 30)]


def test_by_hand():
    """One row, so all importances share their divergence: |δ| = 1…8, quartiles at index 1, 3 and 5: 4 + 1.5·4 = 10.

    With |δ| = 1, …, 7, 20 the threshold is the same, and only the 20 is an outlier.
    """
    base = torch.zeros(8)
    model = torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -20])
    assert merge("arcee_fusion", base, [model]).tolist() == [0, 0, 0, 0, 0, 0, 0, -20]


@given(st.integers(0, 9999), st.sampled_from(SHAPES))
def test_it_agrees_with_the_formula_and_takes_values_bit_for_bit(seed, shape):
    base, model = draw_tensors(seed, shape, 2, spread=1.0)
    merged = merge("arcee_fusion", base, [model])
    importances = importance(wide(base), wide(model))
    threshold = outlier_threshold(importances)
    clear = np.abs(importances - threshold) > 1e-5 * threshold
    expected = np.where(importances >= threshold, model.numpy(), base.numpy())
    assert (merged.numpy() == expected)[clear].all()
    assert ((merged == base) | (merged == model)).all()


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
def test_the_divergence_of_small_changes_is_not_lost_in_rounding(spread):
    base, model = draw_tensors(3, (5, 400), 2, spread=spread)
    delta = np.abs(wide(model) - wide(base))
    expected = (importance(wide(base), wide(model)) / delta)[:, 0]
    np.testing.assert_allclose(row_divergences(base, model).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (5, 1)])
def test_rows_of_one_element_have_no_divergence_and_come_over_whole(shape):
    base, model = draw_tensors(0, shape, 2)
    assert same_bits(merge("arcee_fusion", base, [model]), model)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40), st.data())
def test_magnitudes_of_rank_are_those_of_a_sort(values, data):
    ranks = data.draw(st.lists(st.integers(1, len(values)), min_size=1, max_size=3))
    found = magnitudes_of_rank(lambda: iter([part.clone() for part in torch.tensor(values).split(16)]), ranks)
    descending = sorted((abs(value) for value in values), reverse=True)
    assert found == [descending[rank - 1] for rank in ranks]
