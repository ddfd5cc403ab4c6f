"""DELLA: probabilities by rank, unbiased over seeds, exact given its mask."""

import math

import pytest
import torch
from float64_reference import assert_close, draw_tensors, elected, merge, rank_probabilities, wide
from hypothesis import given
from hypothesis import strategies as st
from mergekit.merge_methods.api import merge_tensors

from dapt_merge.methods.della import keep_probabilities
from dapt_merge.methods.masks import keep_mask

SHAPES = [(), (7,), (5, 1), (4, 9), (3, 2, 5)]


def mask_of(delta, density, epsilon, stream, seed):
    probabilities = torch.from_numpy(rank_probabilities(wide(delta), density, epsilon)).reshape(-1)
    mask = keep_mask(seed, "layer.weight", stream, 0, delta.numel(), probabilities).reshape(delta.shape)
    return wide(mask), wide(probabilities.reshape(delta.shape))


def test_probabilities_by_hand():
    """Row |9| > |3| > |1| > |0.5|: ranks 3, 2, 1, 0 of 3 from 0.5 − 0.15 on in steps of 0.3/3; each row on its own."""
    delta = torch.tensor([[3.0, -9.0, 0.5, 1.0], [1e-3, 2e-3, -4e-3, 3e-3]])
    found = keep_probabilities(delta.reshape(-1), 4, 0.5, 0.15).view(2, 4)
    torch.testing.assert_close(found, torch.tensor([[0.55, 0.65, 0.35, 0.45], [0.35, 0.45, 0.65, 0.55]]).double())


def test_equal_magnitudes_rank_by_index_and_an_element_alone_has_the_density():
    found = keep_probabilities(torch.tensor([1.0, -1.0, 1.0]), 3, 0.5, 0.25)
    assert found.tolist() == [0.75, 0.5, 0.25]
    assert keep_probabilities(torch.tensor([1.0, 2.0]), 1, 0.3, 0.25).tolist() == [0.3, 0.3]


@given(st.integers(0, 1000), st.sampled_from(SHAPES), st.floats(0.2, 0.8), st.floats(0, 0.19))
def test_probabilities_agree_with_the_formula_and_average_to_the_density(seed, shape, density, epsilon):
    (delta,) = draw_tensors(seed, shape, 1)
    found = keep_probabilities(delta.reshape(-1), shape[-1] if shape else 1, density, epsilon)
    expected = rank_probabilities(wide(delta), density, epsilon)
    assert abs(wide(found).reshape(shape) - expected).max() < 1e-12
    assert found.mean().item() == pytest.approx(density)


@given(st.integers(0, 1000), st.sampled_from(SHAPES), st.floats(0.3, 0.7), st.floats(0, 0.2), st.booleans())
def test_della_linear_is_exact_given_its_masks(seed, shape, density, epsilon, normalize):
    base, *models = draw_tensors(seed, shape, 3)
    weights = [0.4, 0.9]
    expected = wide(base)
    for stream, (weight, model) in enumerate(zip(weights, models, strict=True)):
        mask, probabilities = mask_of(model - base, density, epsilon, stream, seed)
        expected = expected + weight / (sum(weights) if normalize else 1) * mask * wide(model - base) / probabilities
    values = {"weight": weights, "density": density, "epsilon": epsilon, "normalize": normalize}
    assert_close(merge("della_linear", base, models, seed=seed, **values), expected, [base, *models], relative=1e-5)


@given(st.integers(0, 1000), st.sampled_from(["weighted", "unweighted", "count"]))
def test_della_elects_and_merges_like_ties_given_its_masks(seed, elect):
    base, *models = draw_tensors(seed, (4, 9), 4)
    weights, deltas = [0.4, 0.9, 0.7], []
    for stream, model in enumerate(models):
        mask, probabilities = mask_of(model - base, 0.5, 0.2, stream, seed)
        deltas.append(mask * wide(model - base) / probabilities)
    merged = merge("della", base, models, seed=seed, weight=weights, density=0.5, epsilon=0.2, elect=elect)
    assert_close(merged, wide(base) + elected(deltas, weights, elect, True), [base, *models], relative=1e-5)


def test_epsilon_0_is_dare():
    base, *models = draw_tensors(2, (6, 7), 3)
    values = {"weight": [0.3, 0.6], "density": 0.4}
    for della, dare in (("della", "dare_ties"), ("della_linear", "dare_linear")):
        ours = merge(della, base, models, epsilon=0, **values)
        torch.testing.assert_close(ours, merge(dare, base, models, **values), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_l1_rescaling_restores_the_l1_norm(method):
    base, model = draw_tensors(1, (70, 60), 2)
    merged = merge(method, torch.zeros_like(base), [model - base], weight=1.0, density=0.2, rescale="l1")
    assert merged.double().abs().sum().item() == pytest.approx((model - base).double().abs().sum().item(), rel=1e-6)


def test_over_seeds_the_mean_is_task_arithmetic():
    """Each element is δ·Bernoulli(p)/p: mean δ, variance δ²(1−p)/p; within four standard errors, element by element."""
    seeds, density, epsilon = 300, 0.4, 0.3
    base, model = draw_tensors(5, (3, 5), 2)
    values = {"weight": 0.5, "density": density, "epsilon": epsilon}
    merged = torch.stack([merge("della_linear", base, [model], seed=seed, **values) for seed in range(seeds)])
    expected = wide(0.5 * (model - base))
    probabilities = rank_probabilities(wide(model - base), density, epsilon)
    standard_error = abs(expected) * ((1 - probabilities) / probabilities / seeds) ** 0.5
    assert (abs(wide((merged - base).mean(dim=0)) - expected) < 4 * standard_error + 1e-6).all()


def test_the_keep_rate_of_each_rank_is_the_formulas_and_mergekits():
    rows, density, epsilon = 3000, 0.4, 0.3
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(rows, 4, generator=generator)
    order = delta.abs().argsort(dim=1)  # smallest first
    values = {"weight": 1.0, "density": density, "epsilon": epsilon}
    ours = merge("della_linear", torch.zeros_like(delta), [delta], **values)
    torch.manual_seed(1)  # theirs draws from the global generator: with seed 0 it would repeat the numbers of delta
    theirs = merge_tensors(
        [torch.zeros_like(delta), delta], "della_linear", parameters={**values, "rescale": False}, base_index=0
    )
    kept, their_kept = ((result != 0).gather(1, order).double().mean(dim=0) for result in (ours, theirs))
    for rank in range(4):
        rate = density - epsilon + 2 * epsilon * rank / 3
        standard_error = math.sqrt(rate * (1 - rate) / rows)
        assert abs(kept[rank] - rate) < 4 * standard_error
        assert abs(kept[rank] - their_kept[rank]) < 4 * math.sqrt(2) * standard_error
