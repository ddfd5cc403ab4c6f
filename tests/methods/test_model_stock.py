"""Model Stock: the ratio from the angles, per tensor and per row."""

import pytest
import torch
from float64_reference import SHAPES, assert_close, draw_tensors, merge, stocked, wide
from hypothesis import given
from hypothesis import strategies as st

from dapt_merge.errors import InputError
from dapt_merge.methods.apply import combine
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.registry import get_method


def test_each_row_has_its_own_ratio_when_filter_wise():
    models = [torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.6, 0.8], [0.0, 5.0]])]
    merged = merge("model_stock", torch.zeros(2, 2), models, filter_wise=True)
    assert merged.flatten().tolist() == pytest.approx([0.6, 0.3, 0, 0])


@given(st.integers(2, 5), st.floats(0.05, 2), st.floats(0.05, 2))
def test_the_merge_is_the_point_nearest_the_centre_on_the_way_to_the_mean(count, common, own):
    """The paper's geometry: models around a centre c, at equal distances in directions orthogonal to it and another."""
    centre = torch.zeros(count + 1)
    centre[0] = common
    models = [centre + own * torch.eye(count + 1)[position + 1] for position in range(count)]
    merged = merge("model_stock", torch.zeros(count + 1), models).double()
    mean = torch.stack(models).double().mean(dim=0)
    assert float((centre.double() - merged) @ mean) == pytest.approx(0, abs=1e-5 * float(mean @ mean))
    assert float(merged @ mean) > 0


@given(st.integers(0, 9999), st.sampled_from(SHAPES), st.integers(2, 4), st.booleans(), st.booleans())
def test_it_agrees_with_the_formula(seed, shape, count, filter_wise, related):
    base, common, *models = draw_tensors(seed, shape, count + 2)
    if related:
        models = [model + 2 * (common - base) for model in models]
    expected = stocked(wide(base), [wide(model) for model in models], filter_wise)
    merged = merge("model_stock", base, models, filter_wise=filter_wise)
    assert_close(merged, expected, [base, *models], relative=1e-5)  # the cosine of small rows, from float32 δ


def test_opposite_models_give_the_base_and_the_report_says_so():
    base, model = draw_tensors(3, (20,), 2)
    context = TensorContext("w")
    merged = combine(get_method("model_stock"), base, [model, 2 * base - model], {}, context)
    assert torch.equal(merged, base)
    assert context.notes == {"t": 0.0, "fallback": "the base: the task vectors have no direction in common"}


@pytest.mark.parametrize("filter_wise", [False, True])
def test_equal_models_are_taken_whole_and_untouched_tensors_stay(filter_wise):
    base, model = draw_tensors(3, (4, 5), 2)
    torch.testing.assert_close(merge("model_stock", base, [model] * 3, filter_wise=filter_wise), model)
    assert torch.equal(merge("model_stock", base, [base, base], filter_wise=filter_wise), base)


def test_small_updates_have_the_same_angles_as_large_ones():
    """Norms far below 1e-3, as rows of a short run have, change no ratio."""
    base = torch.zeros(3, 8)
    models = [model * 2.0**-40 for model in draw_tensors(3, (3, 8), 3)]
    for filter_wise in (False, True):
        small = merge("model_stock", base, models, filter_wise=filter_wise)
        large = merge("model_stock", base, [model * 2.0**40 for model in models], filter_wise=filter_wise)
        assert torch.equal(small * 2.0**40, large)


def test_one_model_is_refused():
    base, model = draw_tensors(0, (3,), 2)
    with pytest.raises(InputError, match="1 models besides the base, expected at least 2"):
        merge("model_stock", base, [model])
