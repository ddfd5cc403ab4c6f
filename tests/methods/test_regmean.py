"""RegMean against least squares on the inputs themselves."""

import math

import numpy as np
import pytest
import torch
from float64_reference import assert_close, draw_tensors, same_bits, wide
from hypothesis import given
from hypothesis import strategies as st

from dapt_merge.errors import InputError
from dapt_merge.methods.apply import combine
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.registry import get_method

SEEDS = st.integers(0, 10_000)


def merge_with(models, grams, context=None, **values):
    context = context or TensorContext("w", model_labels=("one/", "two/", "three/"))
    context.statistics = tuple(grams)
    values = {"gram": tuple(f"{position}.safetensors" for position in range(len(models))), **values}
    return combine(get_method("regmean"), None, models, values, context)


def draw_inputs(seed, features, count, rows=60):
    generator = np.random.default_rng(seed)
    return [generator.normal(size=(rows, features)) @ generator.normal(size=(features, features)) for _ in range(count)]


def gram(inputs):
    return torch.tensor(inputs.T @ inputs, dtype=torch.float32)


@given(SEEDS, st.integers(2, 3))
def test_with_alpha_1_it_is_least_squares_on_every_models_own_outputs(seed, count):
    models, inputs = draw_tensors(seed, (4, 5), count), draw_inputs(seed, 5, count)
    stacked = np.vstack(inputs)
    outputs = np.vstack([x @ wide(model).T for x, model in zip(inputs, models, strict=True)])
    expected = np.linalg.lstsq(stacked, outputs, rcond=None)[0].T
    merged = merge_with(models, [gram(x) for x in inputs], alpha=1)
    scale = torch.full((4, 5), float(max(model.abs().max() for model in models)))
    # the float32 Gram matrices carry an error of their own, which the conditioning of the inputs enlarges
    assert_close(merged, expected, [scale], relative=1e-6 * np.linalg.cond(stacked) ** 2)


@given(SEEDS, st.floats(0, 0.95), st.integers(2, 3))
def test_off_diagonals_are_scaled_by_alpha(seed, alpha, count):
    models, inputs = draw_tensors(seed, (4, 5), count), draw_inputs(seed, 5, count)
    scaled = []
    for x in inputs:
        matrix = wide(gram(x))
        scaled.append(alpha * matrix + (1 - alpha) * np.diag(np.diag(matrix)))
    expected = sum(wide(m) @ g for m, g in zip(models, scaled, strict=True)) @ np.linalg.inv(sum(scaled))
    scale = torch.full((4, 5), float(max(model.abs().max() for model in models)))
    merged = merge_with(models, [gram(x) for x in inputs], alpha=alpha)
    assert_close(merged, expected, [scale], relative=1e-6 * max(1, np.linalg.cond(sum(scaled))))


def test_a_worked_example():
    """Each model reads one of two inputs, and keeps its column: the merge reproduces both exactly."""
    models = [torch.tensor([[1.0, 9.0]]), torch.tensor([[9.0, 2.0]])]
    grams = [torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])]
    assert merge_with(models, grams).tolist() == [[1.0, 2.0]]
    half = [torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.eye(2)]
    assert merge_with(models, half, alpha=1)[0].tolist() == pytest.approx([3.0, 5.5])


def test_directions_that_no_text_used_stay_at_the_mean_and_the_notes_say_so():
    models = [torch.tensor([[1.0, 9.0]]), torch.tensor([[9.0, 2.0]])]
    context = TensorContext("w")
    merged = merge_with(models, [torch.tensor([[4.0, 0.0], [0.0, 0.0]])] * 2, context)
    assert merged.tolist()[0] == pytest.approx([5.0, 5.5], rel=1e-5)
    assert "ridge" in context.notes
    context = TensorContext("w")
    assert merge_with(models, [torch.zeros(2, 2)] * 2, context).tolist() == [[5.0, 5.5]]
    assert "never reached" in str(context.notes["fallback"])


@given(SEEDS, st.floats(0.5, 1), st.integers(2, 4))
def test_an_input_that_is_always_0_changes_nothing_for_the_others_however_small_they_are(seed, alpha, dead):
    """Inputs of language models differ by factors of thousands; none of them may be taken for noise."""
    models, inputs = draw_tensors(seed, (4, 5), 2), draw_inputs(seed, 5, 2)
    small = [x * np.array([1e3, 1e-3, 1.0, 1e-2, 10.0]) for x in inputs]
    without = [gram(np.delete(x, dead, axis=1)) for x in small]
    for x in small:
        x[:, dead] = 0
    alone = [model[:, [place for place in range(5) if place != dead]] for model in models]
    expected = merge_with(alone, without, alpha=alpha)
    merged = merge_with(models, [gram(x) for x in small], alpha=alpha)
    left = merged[:, [place for place in range(5) if place != dead]]
    assert_close(left, expected, [torch.full((4, 4), float(expected.abs().max()))], relative=1e-3)
    assert_close(merged[:, dead], sum(wide(model[:, dead]) for model in models) / 2, [models[0][:, dead]])


@pytest.mark.parametrize("seed", range(8))
def test_a_singular_matrix_that_rounding_makes_solvable_moves_nothing_along_its_unused_directions(seed):
    """Inputs 0 and 1 are always equal, so that their difference is never used: there the models' mean remains."""
    models, inputs = draw_tensors(seed, (4, 6), 2), draw_inputs(seed, 6, 2)
    for x in inputs:
        x[:, 1] = x[:, 0]
    context = TensorContext("w")
    merged = wide(merge_with(models, [gram(x) for x in inputs], context, alpha=1))
    mean = sum(wide(model) for model in models) / 2
    assert merged[:, 0] - merged[:, 1] == pytest.approx(mean[:, 0] - mean[:, 1], abs=1e-4)
    assert "ridge" in context.notes


@given(SEEDS)
def test_equal_inputs_give_the_mean_and_equal_models_stay_as_they_are(seed):
    models, (inputs,) = draw_tensors(seed, (4, 5), 3), draw_inputs(seed, 5, 1)
    mean = np.mean([wide(model) for model in models], axis=0)
    assert_close(merge_with(models, [gram(inputs)] * 3), mean, models, relative=1e-5)
    grams = [gram(x) for x in draw_inputs(seed, 5, 3)]
    assert torch.equal(merge_with([models[0]] * 3, grams), models[0])


@given(SEEDS, st.permutations([0, 1, 2]))
def test_the_order_of_the_models_and_the_scale_of_the_matrices_do_not_matter(seed, order):
    models, grams = draw_tensors(seed, (4, 5), 3), [gram(x) for x in draw_inputs(seed, 5, 3)]
    merged = merge_with(models, grams)
    scale = torch.full((4, 5), float(merged.abs().max()))
    moved = merge_with([models[place] for place in order], [grams[place] / 64 for place in order])
    assert_close(moved, merged, [scale], relative=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 2, 5), (4, 5)], ids=str)
def test_what_has_no_gram_matrix_gets_the_plain_mean_and_says_so(shape):
    models = draw_tensors(1, shape, 2)
    context = TensorContext("w")
    merged = merge_with(models, [None, None], context)
    assert_close(merged, (wide(models[0]) + wide(models[1])) / 2, models)
    assert str(context.notes["fallback"]).startswith("average")


@pytest.mark.parametrize("shape", [(5, 1), (1, 6), (0, 3), (3, 0), (30_000, 2)], ids=str)
def test_narrow_empty_and_tall_matrices_are_merged(shape):
    models = draw_tensors(1, shape, 2, torch.bfloat16)
    assert merge_with(models, [gram(x) for x in draw_inputs(1, shape[1], 2)]).shape == shape


def test_a_single_model_is_given_back_bit_for_bit():
    (model,) = draw_tensors(1, (4, 5), 1, torch.bfloat16)
    assert same_bits(merge_with([model], [torch.eye(5)]), model)
    explain = get_method("regmean").dead_knobs
    assert explain is not None
    assert explain({"gram": "a"}, 1)[0].startswith("gram")
    assert explain({"gram": ("a", "b")}, 2) == []


def test_matrices_that_are_none_are_refused():
    models = draw_tensors(1, (4, 5), 2)
    for bad in (torch.eye(4), torch.full((5, 5), math.nan), -torch.eye(5)):
        with pytest.raises(InputError, match="Gram matrix of two/"):
            merge_with(models, [torch.eye(5), bad])
