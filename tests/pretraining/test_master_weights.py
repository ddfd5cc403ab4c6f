"""The update is made in float32; bfloat16 is only what the model computes with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dapt_merge.pretraining.optimizer import MasterWeightAdamW, split_off_masters


def pair() -> tuple[nn.Linear, MasterWeightAdamW, nn.Linear]:
    """A bfloat16 layer with masters, and its float32 twin."""
    torch.manual_seed(0)
    twin = nn.Linear(8, 4)
    layer = copy.deepcopy(twin)
    masters = split_off_masters(layer)
    optimizer = MasterWeightAdamW(layer.parameters(), masters=masters, lr=1e-3, weight_decay=0.1, max_grad_norm=1.0)
    return layer, optimizer, twin


def set_gradients(layer: nn.Module, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        # Powers of two, so that bfloat16 and float32 hold the same gradient.
        gradient = scale * 2.0 ** torch.randint(-3, 3, parameter.shape, generator=generator)
        (parameter * gradient.to(parameter.dtype)).sum().backward()


def test_splitting_holds_nothing_twice_and_keeps_buffers_exact() -> None:
    layer = nn.BatchNorm1d(4)
    layer.running_mean.fill_(1 / 3)
    old = layer.weight.data_ptr()
    masters = split_off_masters(layer)
    assert layer.weight.dtype == torch.bfloat16
    assert masters[layer.weight].data_ptr() == old
    assert layer.running_mean.dtype == torch.float32


def test_the_masters_follow_float32_adamw() -> None:
    layer, optimizer, twin = pair()
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.1)
    for step in range(5):
        set_gradients(layer, 1.0, step)
        set_gradients(twin, 1.0, step)
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        reference.step()
        reference.zero_grad()
        assert optimizer.last_grad_norm == pytest.approx(float(norm), rel=1e-5)
    for parameter, expected in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(optimizer.masters[parameter], expected.data)
        assert torch.equal(parameter.data, optimizer.masters[parameter].to(torch.bfloat16))


def test_updates_too_small_for_bfloat16_add_up() -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    optimizer = MasterWeightAdamW(layer.parameters(), masters=split_off_masters(layer), lr=1e-3, weight_decay=0.0)
    before = layer.weight.item()
    for _ in range(20):
        layer.weight.sum().backward()
        optimizer.step()
    assert optimizer.masters[layer.weight].item() == pytest.approx(0.98, abs=1e-4)
    assert layer.weight.item() < before


def test_micro_batches_are_summed_in_float32() -> None:
    layer = nn.Linear(1, 1, bias=False)
    optimizer = MasterWeightAdamW(layer.parameters(), masters=split_off_masters(layer), lr=1e-3)
    for gradient in [256.0, *[1.0] * 16]:
        (layer.weight * gradient).sum().backward()
    assert layer.weight.grad is None
    assert optimizer.masters[layer.weight].grad.item() == 272.0
    optimizer.step()
    assert optimizer.last_grad_norm == 272.0
    assert optimizer.masters[layer.weight].grad is None


def test_the_state_goes_on_from_where_it_was_saved() -> None:
    layer, optimizer, _ = pair()
    set_gradients(layer, 1.0, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [master.clone() for master in optimizer.masters.values()]
    set_gradients(layer, 1.0, 1)
    optimizer.step()

    other, resumed, _ = pair()
    for parameter, master in zip(other.parameters(), weights, strict=True):
        resumed.masters[parameter].copy_(master)
        parameter.data.copy_(master)
    resumed.load_state_dict(saved)
    set_gradients(other, 1.0, 1)
    resumed.step()
    for one, two in zip(optimizer.masters.values(), resumed.masters.values(), strict=True):
        assert torch.equal(one, two)
