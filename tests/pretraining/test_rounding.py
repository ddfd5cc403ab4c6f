"""Pure bfloat16 loses no update in expectation, or says how many it lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import Stop, assert_same_weights, log_of, stop_at, train, weights
from torch import nn

from dapt_merge.pretraining.optimizer import Bf16AdamW, stochastically_rounded


@given(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), st.integers(0, 99))
def test_a_rounded_value_is_one_of_the_two_neighbours(value: float, seed: int) -> None:
    exact = torch.full((64,), value)
    found = stochastically_rounded(exact, torch.Generator().manual_seed(seed)).float()
    bits = exact.view(torch.int32) & -65536
    below, above = bits.view(torch.float32), (bits + 65536).view(torch.float32)
    representable = bits == exact.view(torch.int32)
    assert bool(torch.where(representable, found == exact, (found == below) | (found == above)).all())


@pytest.mark.parametrize("value", [1.001, -0.3337, 3e-5, 0.0])
def test_rounding_keeps_the_value_in_expectation(value: float) -> None:
    exact = torch.full((200_000,), value)
    found = stochastically_rounded(exact, torch.Generator().manual_seed(1)).double()
    spacing = abs(value) / 128
    assert abs(float(found.mean()) - float(exact[0])) <= 5 * spacing / 200_000**0.5


def steps_of(rounding: Any, count: int = 30) -> tuple[Bf16AdamW, torch.Tensor, torch.Tensor]:
    """Weights of 1 under a steady gradient: what pure bfloat16 and what float32 make of them."""
    parameter = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    twin = nn.Parameter(torch.ones(20_000))
    optimizer = Bf16AdamW([parameter], lr=1e-4, weight_decay=0.1, rounding=rounding)
    reference = torch.optim.AdamW([twin], lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95))
    for _ in range(count):
        parameter.grad, twin.grad = torch.ones_like(parameter), torch.ones_like(twin)
        optimizer.step()
        reference.step()
    return optimizer, parameter.detach(), twin.detach()


def test_stochastic_rounding_follows_float32_on_average() -> None:
    optimizer, found, expected = steps_of("stochastic")
    assert float(found.double().mean() - 1) == pytest.approx(float(expected.double().mean() - 1), rel=0.02)
    assert optimizer.updates_lost is None


def test_nearest_rounding_loses_what_is_under_half_a_spacing_and_counts_it() -> None:
    optimizer, found, _ = steps_of("nearest")
    assert bool((found == 1).all())
    assert optimizer.updates_lost == 1.0


def test_a_large_update_is_not_lost() -> None:
    parameter = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    optimizer = Bf16AdamW([parameter], lr=0.1, rounding="nearest")
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.updates_lost == 0.0


@pytest.mark.slow
def test_a_bf16_run_saves_bfloat16_and_goes_on_exactly(settings: dict[str, Any], tmp_path: Path) -> None:
    overrides = ("precision=bf16", "checkpoints=3")
    whole = train({**settings, "output": str(tmp_path / "whole")}, *overrides)
    assert {tensor.dtype for tensor in weights(whole[-1]).values()} == {torch.bfloat16}
    with pytest.raises(Stop):
        train(settings, *overrides, on_log=stop_at(3))
    for one, other in zip(whole, train(settings, *overrides), strict=True):
        assert_same_weights(one, other)


def test_a_run_that_rounds_to_nearest_warns_with_the_measured_share(settings: dict[str, Any]) -> None:
    told: list[str] = []
    train(settings, "precision=bf16", "bf16_rounding=nearest", "learning_rate=1e-5", on_note=told.append)
    lost = [line["updates_lost"] for line in log_of(Path(settings["output"]))]
    (warning,) = [text for text in told if "lost" in text]
    assert f"lost {100 * sum(lost) / len(lost):.0f}% of the updates" in warning
    assert sum(lost) / len(lost) > 0.5
