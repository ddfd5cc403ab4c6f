"""Fisher merging against its formula, and where nothing is known."""

import math

import numpy as np
import pytest
import torch
from float64_reference import SHAPES, assert_close, draw_tensors, same_bits, wide
from hypothesis import given
from hypothesis import strategies as st

from dapt_merge.errors import InputError
from dapt_merge.methods.apply import combine
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.registry import get_method

SEEDS = st.integers(0, 10_000)


def merge_with(models, information, context=None, piece_elements=None, **values):
    context = context or TensorContext("w", model_labels=("one/", "two/", "three/"))
    context.statistics = tuple(information)
    paths = tuple(f"{position}.safetensors" for position in range(len(models)))
    values = {"fisher": paths, **values}
    return combine(get_method("fisher"), None, models, values, context, piece_elements=piece_elements)


def draw_information(seed, shape, count, lowest=1e-12):
    generator = torch.Generator().manual_seed(seed + 1)
    return [lowest * torch.exp(12 * torch.rand(shape, generator=generator)) for _ in range(count)]


@given(SEEDS, st.sampled_from(SHAPES), st.lists(st.floats(0.1, 3), min_size=2, max_size=3))
def test_each_element_is_averaged_with_its_information(seed, shape, weights):
    models, information = draw_tensors(seed, shape, len(weights)), draw_information(seed, shape, len(weights))
    shares = [weight * wide(part) for weight, part in zip(weights, information, strict=True)]
    expected = sum(share * wide(model) for share, model in zip(shares, models, strict=True)) / sum(shares)
    assert_close(merge_with(models, information, weight=weights), expected, models, relative=2e-6)


def test_a_worked_example():
    """The second element matters to the first model alone, the third to none."""
    models = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([5.0, 5.0, 5.0])]
    context = TensorContext("w")
    merged = merge_with(models, [torch.tensor([3.0, 2.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])], context)
    assert merged.tolist() == [2.0, 1.0, 3.0]
    assert context.notes == {"averaged_elements": 1}


@given(SEEDS, st.integers(0, 2))
def test_what_one_model_alone_knows_about_is_that_models_bit_for_bit(seed, knowing):
    models = draw_tensors(seed, (50,), 3)
    information = [torch.full((50,), float(place == knowing)) for place in range(3)]
    assert same_bits(merge_with(models, information), models[knowing])


@given(SEEDS, st.permutations([0, 1, 2]))
def test_the_order_of_the_models_does_not_matter(seed, order):
    models, information = draw_tensors(seed, (4, 6), 3), draw_information(seed, (4, 6), 3)
    moved = merge_with([models[place] for place in order], [information[place] for place in order])
    assert_close(moved, merge_with(models, information), models, relative=2e-6)


@given(SEEDS, st.floats(1e-6, 1e6))
def test_the_scale_of_the_information_does_not_matter(seed, scale):
    models, information = draw_tensors(seed, (4, 6), 2), draw_information(seed, (4, 6), 2)
    scaled = merge_with(models, [part * scale for part in information])
    assert_close(scaled, merge_with(models, information), models)


@given(SEEDS)
def test_no_element_leaves_the_range_of_the_models(seed):
    models, information = draw_tensors(seed, (40,), 3), draw_information(seed, (40,), 3)
    stacked, merged = torch.stack(models), merge_with(models, information)
    slack = 1e-6 * stacked.abs().amax(0)
    assert bool(((merged >= stacked.amin(0) - slack) & (merged <= stacked.amax(0) + slack)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_single_model_is_given_back_bit_for_bit(dtype):
    models, information = draw_tensors(1, (9,), 2, dtype), draw_information(1, (9,), 2)
    assert same_bits(merge_with(models[:1], information[:1]), models[0])
    assert same_bits(merge_with(models, information, weight=[0, 0.5]), models[1])
    explain = get_method("fisher").dead_knobs
    assert explain is not None
    assert explain({"fisher": ("a", "b"), "weight": (0.0, 0.5)}, 2)[0].startswith("fisher")
    assert explain({"fisher": ("a", "b")}, 2) == []


def test_equal_information_is_the_plain_average_and_equal_models_stay_as_they_are():
    models = draw_tensors(1, (9,), 3)
    ones = [torch.ones(9)] * 3
    assert_close(merge_with(models, ones), np.mean([wide(model) for model in models], axis=0), models)
    assert torch.equal(merge_with([models[0]] * 3, draw_information(1, (9,), 3)), models[0])


def test_information_too_small_for_float32_products_still_decides():
    models = [torch.zeros(2), torch.ones(2)]
    merged = merge_with(models, [torch.full((2,), 3e-38), torch.full((2,), 1e-38)], weight=1e-8)
    assert merged.tolist() == pytest.approx([0.25, 0.25])


def test_a_tensor_that_a_file_lacks_is_averaged_and_says_so():
    models = draw_tensors(1, (9,), 2)
    context = TensorContext("w")
    merged = merge_with(models, [torch.ones(9), None], context, weight=[1, 3])
    assert_close(merged, 0.25 * wide(models[0]) + 0.75 * wide(models[1]), models)
    assert str(context.notes["fallback"]).startswith("average")


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (5, 1), (1, 100_003)], ids=str)
def test_every_shape_and_piece_size_gives_the_same_tensor(shape):
    models, information = draw_tensors(2, shape, 3, torch.bfloat16), draw_information(2, shape, 3)
    results = [merge_with(models, information, piece_elements=size) for size in (None, 1024)]
    assert results[0].shape == shape
    assert same_bits(*results)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_information_that_is_none_is_refused(bad):
    models, information = draw_tensors(1, (9,), 2), draw_information(1, (9,), 2)
    information[1][3] = bad
    with pytest.raises(InputError, match="information of two/"):
        merge_with(models, information)
    with pytest.raises(InputError, match="another shape"):
        merge_with(models, [torch.ones(9), torch.ones(4)])
    with pytest.raises(InputError, match="every weight is 0"):
        merge_with(models, [torch.ones(9), torch.ones(9)], weight=0)
