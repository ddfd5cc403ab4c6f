"""The effective rank: exp of the entropy of the normalised singular values, computed or, for large sides, estimated."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_merge.inspection.rank import effective_rank


def defined(matrix):
    values = torch.linalg.svdvals(matrix.double())
    shares = (values / values.sum())[values > 0]
    return math.exp(-float((shares * shares.log()).sum()))


def of_delta(delta, **options):
    return effective_rank(torch.zeros_like(delta), delta, **options)


def spectrum(values, columns=260):
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=generator)).Q
    return left * torch.tensor(values, dtype=torch.float32) @ right.T


def test_an_outer_product_has_one_direction():
    delta = torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 31))
    assert of_delta(delta) == pytest.approx(1.0, abs=1e-3)


def test_equal_singular_values_count_in_full():
    assert of_delta(torch.eye(16)) == pytest.approx(16.0)


def test_a_zero_task_vector_has_no_direction():
    base = torch.randn(5, 6).bfloat16()
    assert effective_rank(base, base.clone()) == 0.0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 40), columns=st.integers(1, 40), scale=st.floats(1e-6, 1e3))
def test_it_is_that_of_its_definition_whatever_shape_and_scale(seed, rows, columns, scale):
    delta = scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = of_delta(delta)
    assert found == pytest.approx(defined(delta), rel=1e-3)
    assert found == pytest.approx(of_delta(delta.T), rel=1e-6)
    assert 1 <= found <= min(rows, columns) * (1 + 1e-9)


def test_a_tensor_in_blocks_is_a_tensor_as_a_whole(monkeypatch):
    delta = torch.randn(20, 333, generator=torch.Generator().manual_seed(0))
    whole = of_delta(delta)
    monkeypatch.setattr("dapt_merge.inspection.rank._BLOCK_ELEMENTS", 100)
    monkeypatch.setattr("dapt_merge.inspection.rank._KEPT_ELEMENTS", 0)
    assert of_delta(delta) == pytest.approx(whole)
    assert of_delta(delta, exact_side=1) == pytest.approx(of_delta(delta), rel=0.05)


@pytest.mark.parametrize(
    "values",
    [
        [1.0] * 200,
        [1.0 / k for k in range(1, 201)],
        [math.exp(-k / 20) for k in range(200)],
        [100.0] + [1.0 + k / 200 for k in range(199)],
        [1.0] * 8 + [0.0] * 192,
    ],
    ids=["flat", "power law", "exponential", "one spike", "low rank"],
)
def test_the_estimate_for_large_matrices_is_near_the_exact_value(values):
    delta = spectrum(values)
    assert of_delta(delta, exact_side=100) == pytest.approx(defined(delta), rel=0.06)


def test_the_estimate_is_the_same_each_time():
    delta = torch.randn(150, 160, generator=torch.Generator().manual_seed(0))
    assert of_delta(delta, exact_side=100) == of_delta(delta, exact_side=100)


def test_only_matrices_have_one():
    with pytest.raises(ValueError, match="matrix"):
        effective_rank(torch.zeros(3), torch.ones(3))
