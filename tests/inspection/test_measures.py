"""What one tensor's task vector is measured to be: counts, norms, cosines, and what bfloat16 leaves of an update."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_merge.errors import InputError
from dapt_merge.inspection.measures import (
    WEIGHTS,
    measure_difference,
    measure_sign_agreement,
    no_difference,
)
from dapt_merge.methods.contract import TensorContext

CONTEXT = TensorContext("w", base_label="base", model_labels=("dapt",))


def drawn(seed, size, scale, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    base = (0.02 * torch.randn(size, generator=generator)).to(dtype)
    return base, (base.float() + scale * torch.randn(size, generator=generator)).to(dtype)


@pytest.mark.parametrize(("scale", "lost", "error"), [(1e-4, 0.48, 0.70), (1e-3, 0.07, 0.11)])
def test_a_small_update_is_mostly_lost_to_bfloat16_as_published(scale, lost, error):
    """Weights of rms 0.02 and a δ of that rms, both stored in bfloat16, merged at weight 0.3."""
    base, model = drawn(0, 1 << 19, scale, torch.bfloat16)
    found = measure_difference(base, model, CONTEXT).rounding[WEIGHTS.index(0.3)]
    assert found.lost_share == pytest.approx(lost, abs=0.01)
    assert found.relative_error == pytest.approx(error, abs=0.005)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 1e-6, 1e-4, 1e-2, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([1, 37, (1 << 18) + 5]),
)
def test_every_measure_is_that_of_its_definition_in_float64(seed, scale, dtype, size):
    base, model = drawn(seed, size, scale, dtype)
    found = measure_difference(base, model, CONTEXT, [0.3])
    start, end = base.double(), model.double()
    delta = (model.float() - base.float()).double()
    assert found.elements == size
    assert found.changed == int((start != end).sum())
    assert found.relative_norm == pytest.approx(float(delta.norm() / start.norm()))
    assert found.cosine == pytest.approx(float(start @ end / start.norm() / end.norm()), abs=1e-12)
    exact = base.float() + model.float().sub(base.float()) * 0.3
    updated = exact != base.float()
    applied = exact.bfloat16().double() - base.bfloat16().double()
    (rounding,) = found.rounding
    assert rounding.updated == int(updated.sum())
    assert rounding.lost == int((updated & (applied == 0)).sum())
    if delta.any():
        expected = float((applied - 0.3 * delta).norm() / (0.3 * delta).norm())
        assert rounding.relative_error == pytest.approx(expected, rel=1e-4, abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), cut=st.integers(1, 99))
def test_measures_of_parts_add_up_to_those_of_the_whole(seed, cut):
    base, model = drawn(seed, 100, 1e-3)
    whole = measure_difference(base, model, CONTEXT)
    parts = [measure_difference(base[run], model[run], CONTEXT) for run in (slice(cut), slice(cut, None))]
    total = sum(parts, no_difference())
    assert (total.elements, total.changed) == (whole.elements, whole.changed)
    assert total.relative_norm == pytest.approx(whole.relative_norm)
    assert total.cosine == pytest.approx(whole.cosine)
    assert [r.lost for r in total.rounding] == [r.lost for r in whole.rounding]


def test_two_equal_tensors_differ_in_nothing():
    base = torch.ones(4, dtype=torch.bfloat16)
    found = measure_difference(base, base.clone(), CONTEXT)
    assert (found.changed, found.relative_norm, found.cosine) == (0, 0.0, 1.0)
    assert all(r.lost_share is None and r.relative_error is None for r in found.rounding)


def test_ratios_to_nothing_are_none_and_not_a_number():
    found = measure_difference(torch.zeros(3), torch.ones(3), CONTEXT)
    assert found.relative_norm is found.cosine is None
    assert no_difference().changed_share is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_input_is_refused_naming_tensor_and_checkpoint(value):
    with pytest.raises(InputError) as error:
        measure_difference(torch.zeros(2), torch.tensor([0.0, value]), CONTEXT)
    assert "dapt" in str(error.value)
    assert "tensor w" in str(error.value)


def test_signs_agree_where_all_who_move_an_element_move_it_one_way():
    base = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    models = [base + torch.tensor(step) for step in ([1.0, 1, 1, 0, 0], [2.0, -1, 1, 5, 0], [1.0, 1, 0, 0, 0])]
    found = measure_sign_agreement(base, models, CONTEXT)
    assert (found.shared, found.agreeing) == (3, 2)
    assert found.share == pytest.approx(2 / 3)


def test_unrelated_task_vectors_agree_on_half_of_the_signs_and_a_scaled_one_on_all():
    base, first = drawn(0, 20_000, 1e-3)
    _, second = drawn(1, 20_000, 1e-3)
    unrelated = measure_sign_agreement(base, [first, base + second], CONTEXT)
    scaled = measure_sign_agreement(base, [first, base + 2 * (first - base)], CONTEXT)
    assert unrelated.share == pytest.approx(0.5, abs=0.02)
    assert scaled.share == 1.0
