"""NearSwap: no element moves further than t."""

import numpy as np
import pytest
import torch
from float64_reference import SHAPES, assert_close, draw_tensors, merge, same_bits, wide
from hypothesis import given
from hypothesis import strategies as st


def test_by_hand():
    """t = 1/4 of the way in absolute terms: 0.125 comes over whole, 1 and −2 move by 0.25."""
    merged = merge("nearswap", torch.ones(3), [torch.tensor([1.125, 2.0, -1.0])], t=0.25)
    assert merged.tolist() == [1.125, 1.25, 0.75]


@given(st.integers(0, 9999), st.sampled_from(SHAPES), st.floats(1e-8, 2))
def test_it_agrees_with_the_formula(seed, shape, t):
    base, model = draw_tensors(seed, shape, 2)
    wide_base, wide_model = wide(base), wide(model)
    share = np.minimum(1, t / np.maximum(np.abs(wide_model - wide_base), 1e-300))
    expected = share * wide_model + (1 - share) * wide_base
    assert_close(merge("nearswap", base, [model], t=t), expected, [base, model])


@given(st.integers(0, 9999), st.floats(0, 1))
def test_near_elements_are_the_models_bit_for_bit(seed, t):
    base, model = draw_tensors(seed, (50,), 2, torch.bfloat16)
    merged = merge("nearswap", base, [model], t=t)
    near = (model.float() - base.float()).abs().double() <= t
    assert torch.equal(merged[near], model.float()[near])
    assert ((merged - base.float()).abs().double() <= t * (1 + 1e-6) + 1e-6).all()


def test_t_0_is_the_base_and_a_large_t_the_model():
    base, model = draw_tensors(1, (30,), 2)
    assert same_bits(merge("nearswap", base, [model], t=0), base)
    assert same_bits(merge("nearswap", base, [model], t=100), model)


def test_weight_is_not_another_name_of_its_t():
    """SLERP's t is a share of the way, like a weight; this one is a distance, and a weight of 1 would mean nothing."""
    from dapt_merge import make_recipe
    from dapt_merge.errors import InputError

    with pytest.raises(InputError, match="weight"):
        make_recipe("base", ["dapt"], "nearswap", weight=0.5)
    assert make_recipe("base", ["dapt"], "slerp", weight=0.5).parameters == {"t": 0.5}
