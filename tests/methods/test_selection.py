"""Exactly the k largest magnitudes, equal ones by lower index."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from dapt_merge.methods.selection import find_cutoff, kept_count, kept_mask

FEW_MAGNITUDES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, -1e-40, 3e38])
VALUES = npst.arrays(np.float32, st.integers(1, 60), elements=st.one_of(FEW_MAGNITUDES, st.floats(-10, 10, width=32)))


def select(values: np.ndarray, kept: int, piece: int) -> np.ndarray:
    tensor = torch.from_numpy(values)
    cutoff = find_cutoff(lambda: iter([part.clone() for part in tensor.split(piece)]), kept)
    parts = [kept_mask(part, cutoff, index * piece) for index, part in enumerate(tensor.split(piece))]
    return torch.cat(parts).numpy()


@given(VALUES, st.data())
def test_it_keeps_exactly_k_and_ties_go_to_the_lower_index(values, data):
    kept = data.draw(st.integers(1, values.size))
    piece = data.draw(st.integers(1, values.size))
    order = sorted(range(values.size), key=lambda index: (-abs(values[index]), index))
    expected = np.zeros(values.size, dtype=bool)
    expected[order[:kept]] = True
    assert (select(values, kept, piece) == expected).all()


@pytest.mark.parametrize("kept", [1, 500, 999])
def test_a_constant_tensor_keeps_its_first_k(kept):
    mask = select(np.full(1000, 0.5, dtype=np.float32), kept, piece=64)
    assert mask[:kept].all()
    assert not mask[kept:].any()


def test_differences_of_bfloat16_tie_and_are_still_counted_exactly():
    base = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    delta = (base + 0.01).bfloat16().float() - base.float()
    assert delta.unique().numel() < 1000
    assert select(delta.numpy(), 6000, piece=4096).sum() == 6000


@given(st.floats(0, 1), st.integers(0, 10_000))
def test_the_count_is_the_floor_but_at_least_one(density, numel):
    kept = kept_count(density, numel)
    assert kept <= numel
    if density == 0 or numel == 0:
        assert kept == 0
    else:
        assert kept == max(1, int(density * numel))
