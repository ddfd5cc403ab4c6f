"""In bfloat16, as models are stored, every method is as near to float64 as mergekit, and as rounding alone allows."""

import pytest
import torch
from accuracy import CASES, TIE, errors, verdict
from mergekit.merge_methods import registered_methods

SMALL = (96, 160)


def test_every_method_of_mergekit_is_measured():
    assert {method.spec.name for method in registered_methods()} == {case.method for case in CASES.values()}


@pytest.mark.parametrize("step", [1e-3, 1e-2])
@pytest.mark.parametrize("name", CASES)
def test_no_error_in_bfloat16_is_larger_than_mergekits(name, step):
    found = errors(name, torch.bfloat16, step, SMALL)
    assert verdict(found) in ("ours", "tie"), found


@pytest.mark.parametrize("step", [1e-3, 1e-2])
@pytest.mark.parametrize("name", CASES)
def test_ours_has_the_error_of_rounding_once_and_no_more(name, step):
    found = errors(name, torch.bfloat16, step, SMALL)
    assert found.ours <= found.rounding * (1 + TIE), found


@pytest.mark.parametrize("name", CASES)
def test_float64_is_computed_in_float64(name):
    """A float32 anywhere would leave an error of 1e-6 of so small an update; an `eps` of 1e-8 leaves 4e-11."""
    assert errors(name, torch.float64, 1e-3, SMALL).ours <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_in_tensors_of_a_real_models_size_too(name):
    found = errors(name, torch.bfloat16, 1e-3)
    assert verdict(found) in ("ours", "tie"), found
    assert found.ours <= found.rounding * (1 + TIE), found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nuslerp", "multislerp", "multislerp, task vectors", "model_stock"])
def test_in_float32_long_sums_cost_mergekit_accuracy_and_us_none(name):
    """Angles between near models come out of sums of 300,000 squares; ours are added in float64."""
    found = errors(name, torch.float32, 1e-3)
    assert found.ours <= found.mergekit / 1.5, found
