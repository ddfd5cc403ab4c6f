"""Breadcrumbs: both tails dropped, exactly, also where there is little to drop."""

import numpy as np
import pytest
import torch
from float64_reference import SHAPES, assert_close, banded, draw_tensors, elected, merge, wide
from hypothesis import assume, given
from hypothesis import strategies as st

from dapt_merge.methods.breadcrumbs import band_counts

SHARES = st.tuples(st.floats(0.05, 2), st.floats(0.01, 1), st.floats(0, 0.6))  # weight, density, gamma


def test_density_1_still_drops_the_outliers_and_gamma_1_everything():
    base, model = torch.ones(4), torch.tensor([1.1, 9.0, 1.2, 1.3])
    assert merge("breadcrumbs", base, [model], weight=1.0, gamma=0.25).tolist() == pytest.approx([1.1, 1, 1.2, 1.3])
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        assert torch.equal(merge(method, base, [model], weight=1.0, gamma=1), base)


@given(st.integers(1, 5000), st.floats(0, 1), st.floats(0, 1))
def test_counts_never_exceed_what_there_is(numel, density, gamma):
    outliers, kept = band_counts(density, gamma, numel)
    assert outliers == int(gamma * numel)
    assert kept == min(numel - outliers, max(1, int(density * numel)) if density else 0)


@given(st.integers(0, 999), st.floats(0.01, 1), st.floats(0, 0.9))
def test_equal_magnitudes_are_still_counted_exactly(seed, density, gamma):
    signs = torch.randint(0, 2, (60,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    outliers, kept = band_counts(density, gamma, 60)
    merged = merge("breadcrumbs", torch.zeros(60), [signs], weight=0.5, density=density, gamma=gamma)
    assert (merged != 0).nonzero().view(-1).tolist() == list(range(outliers, outliers + kept))


@given(st.integers(0, 9999), st.sampled_from(SHAPES), st.lists(SHARES, min_size=1, max_size=3), st.booleans())
def test_breadcrumbs_adds_the_bands(seed, shape, shares, normalize):
    weights, densities, gammas = zip(*shares, strict=True)
    base, *models = draw_tensors(seed, shape, len(shares) + 1)
    values = {"weight": weights, "density": densities, "gamma": gammas, "normalize": normalize}
    divisor = sum(weights) if normalize else 1
    steps = [w / divisor * banded(wide(m - base), d, g) for (w, d, g), m in zip(shares, models, strict=True)]
    merged = merge("breadcrumbs", base, models, **values)
    assert_close(merged, wide(base) + sum(steps), [base, *models], relative=1e-6 * (1 + sum(weights)))


@given(
    st.integers(0, 9999),
    st.sampled_from(SHAPES),
    st.lists(SHARES, min_size=2, max_size=3),
    st.sampled_from(["weighted", "unweighted", "count"]),
)
def test_breadcrumbs_ties_elects_among_the_bands(seed, shape, shares, elect):
    weights, densities, gammas = zip(*shares, strict=True)
    base, *models = draw_tensors(seed, shape, len(shares) + 1)
    deltas = [banded(wide(m - base), d, g) for (_, d, g), m in zip(shares, models, strict=True)]
    for scales in (weights, [1.0] * len(weights)):
        votes = np.abs(sum(scale * delta for scale, delta in zip(scales, deltas, strict=True)))
        assume(((votes > 1e-5) | (votes == 0)).all())  # cancelling up to rounding may elect either sign
    merged = merge("breadcrumbs_ties", base, models, weight=weights, density=densities, gamma=gammas, elect=elect)
    assert_close(merged, wide(base) + elected(deltas, weights, elect, True), [base, *models], relative=3e-6)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_l1_rescaling_restores_the_l1_norm(method):
    base, model = draw_tensors(1, (70, 60), 2)
    delta = model - base
    merged = merge(method, torch.zeros_like(base), [delta], weight=1.0, density=0.3, gamma=0.05, rescale="l1")
    assert merged.double().abs().sum().item() == pytest.approx(delta.double().abs().sum().item(), rel=1e-6)
