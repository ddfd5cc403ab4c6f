"""Each method against its formula: by hand, in float64, and in properties."""

import itertools
import math

import numpy as np
import pytest
import torch
from float64_reference import (
    SHAPES,
    WEIGHTS,
    assert_close,
    draw_tensors,
    elected,
    merge,
    spherical,
    trimmed,
    wide,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from dapt_merge.errors import InputError
from dapt_merge.methods.apply import combine
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.pieces import Operands
from dapt_merge.methods.registry import get_method
from dapt_merge.methods.ties import model_cutoffs
from dapt_merge.tensors.stored import StoredTensor

SEEDS = st.integers(0, 10_000)


@given(SEEDS, st.sampled_from(SHAPES), st.lists(st.floats(0.01, 3), min_size=1, max_size=4))
def test_linear_without_a_base_is_the_weighted_mean(seed, shape, weights):
    models = draw_tensors(seed, shape, len(weights))
    total = sum(weights)
    expected = sum(weight / total * wide(model) for weight, model in zip(weights, models, strict=True))
    assert_close(merge("linear", None, models, weight=weights), expected, models)


@given(SEEDS, st.sampled_from(SHAPES), st.lists(WEIGHTS, min_size=1, max_size=4))
def test_linear_without_normalization_is_the_weighted_sum(seed, shape, weights):
    models = draw_tensors(seed, shape, len(weights))
    expected = sum(weight * wide(model) for weight, model in zip(weights, models, strict=True))
    assert_close(merge("linear", None, models, weight=weights, normalize=False), expected, models)


@given(SEEDS, st.lists(st.floats(0, 1), min_size=1, max_size=3))
def test_linear_with_a_base_leaves_it_the_complement(seed, weights):
    base, *models = draw_tensors(seed, (4, 5), len(weights) + 1)
    expected = (1 - sum(weights)) * wide(base)
    expected = expected + sum(weight * wide(model) for weight, model in zip(weights, models, strict=True))
    assert_close(merge("linear", base, models, weight=weights), expected, [base, *models])


def test_linear_refuses_to_normalize_by_zero():
    models = draw_tensors(0, (3,), 2)
    with pytest.raises(InputError, match="add to 0"):
        merge("linear", None, models, weight=[1, -1])


@given(SEEDS)
def test_an_average_keeps_what_all_models_agree_on_bit_for_bit(seed):
    model = draw_tensors(seed, (50,), 1)[0]
    assert torch.equal(merge("linear", None, [model] * 3, weight=[0.1, 0.7, 0.3]), model)
    assert torch.equal(merge("task_arithmetic", model, [model] * 2, weight=[0.1, 0.7]), model)


@given(SEEDS, st.sampled_from([(2,), (7,), (5, 1), (3, 2, 5)]), st.floats(0.01, 0.99))
def test_slerp_moves_along_the_arc(seed, shape, t):
    base, model = draw_tensors(seed, shape, 2, spread=2.0)
    cosine = float((base * model).sum() / base.norm() / model.norm())
    assume(abs(cosine) < 0.9994)
    merged = merge("slerp", base, [model], t=t)
    # coefficients can be far above 1 when the vectors are nearly opposite, so the error is relative to the tensor
    assert np.abs(wide(merged) - spherical(wide(base), wide(model), t)).max() <= 1e-5 * float(
        base.norm() + model.norm()
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_slerp_past_the_threshold_is_linear_and_says_so(sign):
    base = torch.linspace(1, 2, 64)
    model = sign * (base + 1e-3 * torch.sin(torch.arange(64.0)))
    context = TensorContext("w")
    merged = combine(get_method("slerp"), base, [model], {"t": 0.25}, context)
    assert_close(merged, 0.75 * wide(base) + 0.25 * wide(model), [base, model])
    assert str(context.notes["fallback"]).startswith("linear: |cos|")


def test_slerp_reaches_further_with_a_higher_threshold():
    base, noise = torch.linspace(1, 2, 64), torch.sin(torch.arange(64.0))
    context = TensorContext("w")
    combine(get_method("slerp"), base, [base + 1e-2 * noise], {"t": 0.25, "dot_threshold": 1.0}, context)
    assert not context.notes


@pytest.mark.parametrize("zero", ["base", "model"])
def test_slerp_of_a_zero_vector_is_linear_and_says_so(zero):
    base, model = torch.tensor([3.0, 4.0]), torch.tensor([3.0, -1.0])
    (base if zero == "base" else model).zero_()
    context = TensorContext("w")
    merged = combine(get_method("slerp"), base, [model], {"t": 0.25}, context)
    assert_close(merged, 0.75 * wide(base) + 0.25 * wide(model), [base, model])
    assert "no direction" in str(context.notes["fallback"])


def test_slerp_survives_values_whose_squares_overflow_float32():
    merged = merge("slerp", torch.tensor([1e30, 0.0]), [torch.tensor([0.0, 1e30])], t=0.5)
    assert merged.tolist() == pytest.approx([1e30 * math.sqrt(0.5)] * 2, rel=1e-6)


@given(SEEDS, st.sampled_from(SHAPES), st.lists(WEIGHTS, min_size=1, max_size=4), st.floats(-2, 2), st.booleans())
def test_task_arithmetic_adds_scaled_task_vectors(seed, shape, weights, lambda_, normalize):
    assume(not normalize or abs(sum(weights)) > 0.1)
    base, *models = draw_tensors(seed, shape, len(weights) + 1)
    divisor = sum(weights) if normalize else 1
    steps = [lambda_ * w / divisor * (wide(m) - wide(base)) for w, m in zip(weights, models, strict=True)]
    merged = merge("task_arithmetic", base, models, weight=weights, lambda_=lambda_, normalize=normalize)
    scale = 1 + abs(lambda_) * sum(map(abs, weights)) / abs(divisor)
    assert_close(merged, wide(base) + sum(steps), [base, *models], relative=1e-6 * scale)


def test_task_arithmetic_does_not_normalize_by_zero_and_says_so():
    base, first, second = torch.zeros(2), torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])
    context = TensorContext("w")
    values = {"weight": [1, -1], "normalize": True}
    merged = combine(get_method("task_arithmetic"), base, [first, second], values, context)
    assert merged.tolist() == [1.0, 1.0]
    assert "add to 0" in str(context.notes["normalize"])


# TIES by hand (arXiv:2306.01708, section 3). Four elements, density 1/2 keeps two of each task vector:
#   δ₁ = [ 4, -1,  3,  0.5] → [ 4, 0,  3, 0]
#   δ₂ = [-3,  2,  1, -0.1] → [-3, 2,  0, 0]
#   δ₃ = [ 1,  5, -6,  2  ] → [ 0, 5, -6, 0]
#   elected signs: 4 − 3 > 0 → +;  2 + 5 → +;  3 − 6 → −;  0 → +
#   mean of those that agree: [4, 3.5, −6, 0]
TIES_DELTAS = [[4.0, -1.0, 3.0, 0.5], [-3.0, 2.0, 1.0, -0.1], [1.0, 5.0, -6.0, 2.0]]


@pytest.mark.parametrize(
    ("elect", "expected"),
    # first element, weights 0.5, 1, 1: votes 2 − 3 (weighted), 4 − 3 (unweighted), one against one, so + (count)
    [("weighted", -3.0), ("unweighted", 4.0), ("count", 4.0)],
)
def test_ties_by_hand_elects_by_the_chosen_sum(elect, expected):
    models = [torch.tensor(delta) for delta in TIES_DELTAS]
    merged = merge("ties", torch.zeros(4), models, weight=[0.5, 1, 1], density=0.5, elect=elect)
    assert merged[0].item() == pytest.approx(expected)


def test_ties_without_normalization_sums_the_agreeing_and_an_even_vote_is_positive():
    models = [torch.tensor([2.0, 1.0]), torch.tensor([-2.0, 3.0])]
    merged = merge("ties", torch.zeros(2), models, weight=1.0, normalize=False)
    assert merged.tolist() == [2.0, 4.0]


@given(
    SEEDS,
    st.sampled_from(SHAPES),
    st.lists(st.tuples(WEIGHTS, st.floats(0, 1)), min_size=1, max_size=4),
    st.sampled_from(["weighted", "unweighted", "count"]),
    st.sampled_from(["auto", True, False]),
)
def test_ties_agrees_with_its_formula_element_by_element(seed, shape, votes, elect, normalize):
    weights, densities = zip(*votes, strict=True)
    assume(all(density > 0 for density in densities))
    base, *models = draw_tensors(seed, shape, len(votes) + 1)
    deltas = [trimmed(wide(m - base), d) for m, d in zip(models, densities, strict=True)]
    for scales in (weights, [1.0] * len(weights)):
        votes_cast = np.abs(sum(scale * delta for scale, delta in zip(scales, deltas, strict=True)))
        assume(((votes_cast > 1e-5) | (votes_cast == 0)).all())  # cancelling up to rounding may elect either sign
    divides = len(votes) > 1 if normalize == "auto" else normalize
    merged = merge("ties", base, models, weight=weights, density=densities, elect=elect, normalize=normalize)
    expected = elected(deltas, weights, elect, divides)
    # The divisor is a sum of signed weights, which can nearly cancel: its rounding is relative to what was added.
    sums = [abs(sum(some)) for count in range(1, len(weights) + 1) for some in itertools.combinations(weights, count)]
    stretched = sum(map(abs, weights)) / min(filter(None, sums)) if divides else 1
    magnitude = torch.full(shape, stretched * float(np.abs(expected).max()), dtype=torch.float64)
    assume(float(np.abs(expected).max()) < 100)
    assert_close(merged, wide(base) + expected, [base, *models, magnitude], relative=1e-6)


@given(SEEDS, st.permutations(range(3)))
def test_the_order_of_the_models_does_not_matter_to_ties_and_sums(seed, order):
    base, *models = draw_tensors(seed, (6, 5), 4)
    weights, densities = [0.5, 0.8, 1.1], [0.3, 0.5, 0.9]
    for name, values in [
        ("linear", {"weight": weights}),
        ("task_arithmetic", {"weight": weights}),
        ("ties", {"weight": weights, "density": densities}),
    ]:
        merged = merge(name, base, models, **values)
        permuted = {key: [value[i] for i in order] for key, value in values.items()}
        assert_close(merge(name, base, [models[i] for i in order], **permuted), merged, [base, *models])


@given(SEEDS, st.floats(0.01, 0.99))
def test_ties_with_one_task_vector_keeps_exactly_k_elements(seed, density):
    base, model = draw_tensors(seed, (9, 11), 2)
    merged = merge("ties", base, [model], weight=0.5, density=density)
    assert int((merged != base).sum()) == max(1, int(density * 99))


def test_a_model_of_weight_or_density_0_has_no_vote():
    base, first, second = draw_tensors(3, (20,), 3)
    alone = merge("ties", base, [first], weight=0.7, density=0.5)
    for values in ({"weight": [0.7, 0], "density": 0.5}, {"weight": 0.7, "density": [0.5, 0]}):
        both = merge("ties", base, [first, second], normalize=False, **values)
        assert torch.equal(both, alone)


@given(SEEDS, st.floats(0.05, 0.95))
def test_trimming_over_the_whole_model_keeps_the_largest_of_all_tensors(seed, density):
    shapes = [(30,), (), (4, 6), (0,), (9,)]
    pairs = [draw_tensors(seed + index, shape, 2) for index, shape in enumerate(shapes)]
    contexts = [TensorContext(f"tensor {index}") for index in range(len(shapes))]
    operands = [
        Operands(StoredTensor.of(base), (StoredTensor.of(model),), context)
        for (base, model), context in zip(pairs, contexts, strict=True)
    ]
    values = {"weight": 0.5, "density": density, "trim_scope": "model"}
    together = np.concatenate([wide(model - base).reshape(-1) for base, model in pairs])
    expected = np.split(trimmed(together, density), np.cumsum([base.numel() for base, _ in pairs])[:-1])
    rows = model_cutoffs(operands, [density])
    for (base, model), context, cutoffs, part in zip(pairs, contexts, rows, expected, strict=True):
        context.cutoffs = cutoffs
        merged = combine(get_method("ties"), base, [model], values, context)
        assert_close(merged, wide(base) + 0.5 * part.reshape(base.shape), [base, model])


def test_whole_model_trimming_without_thresholds_is_refused():
    base, model = draw_tensors(0, (4,), 2)
    with pytest.raises(InputError, match="trim_scope"):
        merge("ties", base, [model], weight=0.5, density=0.5, trim_scope="model")
