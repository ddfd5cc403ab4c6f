"""Random masks: a pure function of seed, name, stream and index, and indistinguishable from fair coins."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dapt_merge.methods.masks import _hashed, _key, keep_mask

HUGE = 1 << 32


@given(st.integers(0, 200_000), st.integers(1, 3000), st.floats(0.01, 0.99))
def test_any_part_of_a_mask_is_the_part_of_the_whole(start, count, probability):
    whole = keep_mask(1, "w", 0, 0, start + count, probability)
    assert torch.equal(keep_mask(1, "w", 0, start, count, probability), whole[start:])


def test_the_mask_does_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        masks = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            masks.append(keep_mask(1, "w", 0, 0, 300_000, 0.4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_the_hash_is_the_published_one_in_plain_integers():
    """Two rounds of Wellons' lowbias32, each after adding a key word, in Python's unbounded integers."""

    def plain(value: int, key: tuple[int, int]) -> int:
        for word in key:
            value = (value + word) % HUGE
            value ^= value >> 16
            value = value * 0x7FEB352D % HUGE
            value ^= value >> 15
            value = value * 0x846CA68B % HUGE
            value ^= value >> 16
        return value

    key = _key(7, "model.layers.0.mlp.up_proj.weight", 1, 0)
    for low in (0, 12_345, HUGE - 64):
        assert _hashed(low, 64, key, None).tolist() == [plain(low + lane, key) for lane in range(64)]


def test_the_mask_is_pinned_across_versions():
    """Merges made with an older version must be reproducible: these elements may never change."""
    mask = keep_mask(0, "model.embed_tokens.weight", 0, 0, 64, 0.5)
    assert hex(sum(1 << index for index, kept in enumerate(mask.tolist()) if kept)) == "0x171c7c7ba97b792f"


@pytest.mark.parametrize("other", [(2, "w", 0), (1, "v", 0), (1, "w", 1)])
def test_seed_name_and_stream_each_give_an_independent_mask(other):
    count = 100_000
    left, right = keep_mask(1, "w", 0, 0, count, 0.5), keep_mask(*other, 0, count, 0.5)
    for shift in (0, 1, 7):
        agreement = (left[: count - shift] == right[shift:]).double().mean().item()
        assert abs(agreement - 0.5) < 4 * math.sqrt(0.25 / count)


@pytest.mark.parametrize("probability", [0.002, 0.1, 0.5, 0.9])
def test_the_keep_rate_is_the_probability_within_four_standard_errors(probability):
    count = 400_000
    rate = keep_mask(3, "w", 0, 0, count, probability).double().mean().item()
    assert abs(rate - probability) < 4 * math.sqrt(probability * (1 - probability) / count)


@pytest.mark.parametrize("lag", [1, 2, 3, 16, 64, 1024, 4096])
def test_neighbours_are_uncorrelated(lag):
    count = 400_000
    coins = keep_mask(3, "w", 0, 0, count, 0.5).numpy().astype(float) - 0.5
    correlation = np.mean(coins[:-lag] * coins[lag:]) / 0.25
    assert abs(correlation) < 4 / math.sqrt(count - lag)


def test_the_hash_is_uniform():
    """Chi-square of 256 equal buckets, its normal approximation within four standard deviations."""
    count, buckets = 1 << 18, 256
    counts = torch.bincount(_hashed(0, count, _key(0, "w", 0, 0), None) >> 24, minlength=buckets).double()
    chi_square = ((counts - count / buckets) ** 2 / (count / buckets)).sum().item()
    assert abs(chi_square - (buckets - 1)) < 4 * math.sqrt(2 * (buckets - 1))


def test_probability_0_keeps_nothing_and_1_everything():
    assert not keep_mask(0, "w", 0, 0, 1000, 0.0).any()
    assert keep_mask(0, "w", 0, 0, 1000, 1.0).all()


def test_indices_past_32_bits_have_masks_of_their_own():
    across = keep_mask(0, "w", 0, HUGE - 500, 1000, 0.5)
    assert torch.equal(across[500:], keep_mask(0, "w", 0, HUGE, 500, 0.5))
    assert not torch.equal(across[500:], keep_mask(0, "w", 0, 0, 500, 0.5))
