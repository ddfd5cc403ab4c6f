"""DARE: unbiased over seeds, exact given its mask."""

import math

import pytest
import torch
from float64_reference import assert_close, draw_tensors, elected, merge, wide
from hypothesis import given
from hypothesis import strategies as st

from dapt_merge.methods.masks import keep_mask


def masks_of(count: int, numel: int, density: float, seed: int) -> list:
    return [wide(keep_mask(seed, "layer.weight", stream, 0, numel, density)) for stream in range(count)]


def test_dare_by_hand_rescales_what_it_keeps():
    """δ = 2 everywhere, density 1/4, weight 1/2: kept elements move by ½·2/(1/4) = 4, dropped ones not at all."""
    merged = merge("dare_linear", torch.zeros(400), [torch.full((400,), 2.0)], weight=0.5, density=0.25)
    assert set(merged.tolist()) == {0.0, 4.0}


@given(st.integers(0, 1000), st.floats(0.05, 0.95), st.booleans())
def test_dare_linear_is_exact_given_its_masks(seed, density, normalize):
    base, *models = draw_tensors(seed, (8, 5), 3)
    weights = [0.4, 0.9]
    masks = masks_of(2, 40, density, seed)
    divisor = sum(weights) if normalize else 1
    moves = [
        weight / divisor * mask.reshape(8, 5) * (wide(model) - wide(base)) / density
        for weight, mask, model in zip(weights, masks, models, strict=True)
    ]
    merged = merge("dare_linear", base, models, seed=seed, weight=weights, density=density, normalize=normalize)
    assert_close(merged, wide(base) + sum(moves), [base, *models], relative=1e-6 / density)


@given(st.integers(0, 1000), st.floats(0.2, 0.95), st.sampled_from(["weighted", "unweighted", "count"]))
def test_dare_ties_is_exact_given_its_masks(seed, density, elect):
    base, *models = draw_tensors(seed, (8, 5), 4)
    weights = [0.4, 0.9, 0.7]
    masks = masks_of(3, 40, density, seed)
    deltas = [mask.reshape(8, 5) * wide(model - base) / density for mask, model in zip(masks, models, strict=True)]
    merged = merge("dare_ties", base, models, seed=seed, weight=weights, density=density, elect=elect)
    assert_close(merged, wide(base) + elected(deltas, weights, elect, True), [base, *models], relative=1e-6 / density)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_l1_rescaling_restores_the_l1_norm(method):
    base, model = draw_tensors(1, (70, 60), 2)
    merged = merge(method, torch.zeros_like(base), [model - base], weight=1.0, density=0.1, rescale="l1")
    assert merged.double().abs().sum().item() == pytest.approx((model - base).double().abs().sum().item(), rel=1e-6)


def test_mergekits_flags_stand_for_l1_and_none():
    base, model = draw_tensors(1, (50,), 2)
    for flag, word in ((True, "l1"), (False, "none")):
        results = [
            merge("dare_linear", base, [model], weight=0.5, density=0.5, rescale=value) for value in (flag, word)
        ]
        assert torch.equal(*results)


def test_l1_rescaling_of_an_unlucky_mask_that_keeps_nothing_is_the_base():
    kept_nothing = next(seed for seed in range(100) if not keep_mask(seed, "layer.weight", 0, 0, 3, 0.1).any())
    base, model = torch.ones(3), torch.zeros(3)
    assert torch.equal(
        merge("dare_linear", base, [model], seed=kept_nothing, weight=1.0, density=0.1, rescale="l1"), base
    )


def test_over_seeds_the_mean_is_task_arithmetic_and_the_keep_rate_the_density():
    """Each element is δ·Bernoulli(p)/p: mean δ, variance δ²(1−p)/p; both within four standard errors."""
    density, seeds = 0.3, 400
    base, model = draw_tensors(5, (20,), 2)
    merged = torch.stack(
        [merge("dare_linear", base, [model], seed=seed, weight=0.5, density=density) for seed in range(seeds)]
    )
    moves = (merged - base).double()
    expected = 0.5 * (model - base).double()
    standard_error = expected.abs().sum() * math.sqrt((1 - density) / density / seeds)
    assert (moves.mean(dim=0) - expected).sum().abs() < 4 * standard_error
    rate = (moves != 0).double().mean().item()
    assert abs(rate - density) < 4 * math.sqrt(density * (1 - density) / moves.numel())


def test_two_models_are_dropped_independently():
    density, numel = 0.5, 40_000
    first, second = masks_of(2, numel, density, seed=0)
    both = (first * second).mean()
    assert abs(both - density**2) < 4 * math.sqrt(density**2 * (1 - density**2) / numel)
