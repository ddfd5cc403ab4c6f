"""`rescale: l1`: what is kept has the L1 norm of the whole task vector, as in mergekit."""

from __future__ import annotations

import pytest
import torch

from dapt_merge.methods.apply import combine
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.registry import get_method


def merged(method, base, model, **values):
    values = {"weight": (1.0,), "normalize": False, **values}
    return combine(get_method(method), base, [model], values, TensorContext("w"))


@pytest.mark.parametrize("flag", ["l1", True])
def test_a_trimmed_task_vector_gets_its_norm_back(flag):
    base, delta = torch.zeros(4), torch.tensor([3.0, -1.0, 0.5, 0.5])
    found = merged("ties", base, base + delta, density=(0.25,), rescale=flag)
    assert found.tolist() == [5.0, 0.0, 0.0, 0.0]
    assert merged("ties", base, base + delta, density=(0.25,)).tolist() == [3.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_it_is_mergekits_for_several_task_vectors(density):
    from mergekit.merge_methods import merge_tensors

    torch.manual_seed(0)
    base = torch.randn(40, 30)
    models = [base + torch.randn(40, 30) for _ in range(3)]
    weights = (0.5, 0.3, 0.9)
    theirs = {"weight": weights, "density": density, "rescale": True, "normalize": True}
    expected = merge_tensors([base, *models], "ties", parameters=theirs, base_index=0)
    values = {"weight": weights, "density": (density,) * 3, "rescale": True, "normalize": True}
    found = combine(get_method("ties"), base, models, values, TensorContext("w"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_where_nothing_is_trimmed_it_is_a_dead_knob():
    method = get_method("ties")
    values = {"weight": (0.5,), "density": (1.0,), "rescale": "l1", "normalize": False}
    assert any("rescale" in sentence for sentence in method.dead_knobs(method.complete(values, 1, ""), 1))
