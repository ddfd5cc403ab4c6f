"""RAM: shared changes averaged, unique ones kept, or strengthened in the plus variant."""

import numpy as np
import pytest
import torch
from float64_reference import SHAPES, assert_close, draw_tensors, merge, reinforced_update, same_bits, wide
from hypothesis import assume, given
from hypothesis import strategies as st

MODELS = [torch.tensor([4.0, 2.0, 0.0, 1e-6, 1.0]), torch.tensor([2.0, 0.0, 3.0, 0.0, -2.0])]


def test_ram_by_hand():
    """Shared: (4 + 2)/2 and (1 − 2)/2; unique: 2 and 3; a change of 1e-6 counts as none."""
    assert merge("ram", torch.zeros(5), MODELS).tolist() == [3.0, 2.0, 3.0, 0.0, -0.5]


def test_the_plus_variant_by_hand():
    """Each model has two shared changes and one unique one: ratio 2, clipped to 0.5, so unique ones grow by 0.1·0.5."""
    merged = merge("ramplus_tl", torch.zeros(5), MODELS, r=0.1, alpha=0.5)
    assert merged.tolist() == pytest.approx([3.0, 2.1, 3.15, 0.0, -0.5])


@given(
    st.integers(0, 9999),
    st.sampled_from(SHAPES),
    st.integers(1, 4),
    st.floats(1e-3, 0.8),
    st.floats(0, 2),
    st.floats(0, 3),
)
def test_both_agree_with_the_formula(seed, shape, count, epsilon, r, alpha):
    base, *models = draw_tensors(seed, shape, count + 1)
    deltas = [wide(model - base) for model in models]
    assume((np.abs(np.abs(deltas) - epsilon) > 1e-6).all())
    merged = merge("ram", base, models, epsilon=epsilon)
    assert_close(merged, wide(base) + reinforced_update(deltas, epsilon), [base, *models])
    plus = merge("ramplus_tl", base, models, epsilon=epsilon, r=r, alpha=alpha)
    expected = wide(base) + reinforced_update(deltas, epsilon, r, alpha)
    assert_close(plus, expected, [base, *models], relative=3e-6 * (1 + r * alpha))


@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
def test_one_task_vector_is_the_model(method):
    base, model = draw_tensors(1, (40,), 2)
    assert same_bits(merge(method, base, [model], epsilon=0), model)
    torch.testing.assert_close(merge(method, base, [model]), model, rtol=0, atol=1.1e-5)
