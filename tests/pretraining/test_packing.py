"""Packing loses no token, repeats none before its epoch is over, and depends on the seed and the index alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_merge.pretraining.corpus import TokenisedCorpus
from dapt_merge.pretraining.packing import DocumentStream, PackedBlocks, plan_steps, report_mix

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def corpus_of(lengths: list[int], first_id: int = 0) -> TokenisedCorpus:
    """Documents whose tokens are all different: first_id, first_id + 1, …, split over two chunks."""
    array = np.array(lengths, dtype=np.int64)
    ids = np.arange(first_id, first_id + array.sum(), dtype=np.int32)
    half = len(lengths) // 2
    cut = int(array[:half].sum())
    return TokenisedCorpus(
        lengths=array,
        empty_documents=0,
        highest_id=int(ids.max()),
        chunks=(ids[:cut], ids[cut:]),
        chunk_documents=np.array([0, half]),
        starts=np.cumsum(array) - array,
    )


@given(lengths=LENGTHS, more=LENGTHS, seed=st.integers(0, 5), window=st.integers(1, 64))
def test_an_epoch_holds_every_token_exactly_once(lengths: list[int], more: list[int], seed: int, window: int) -> None:
    corpora = [corpus_of(lengths), corpus_of(more, first_id=sum(lengths))]
    stream = DocumentStream(corpora, "domain", seed)
    total = sum(lengths) + sum(more)
    assert stream.tokens_per_epoch == total
    count = 2 * -(-total // window)
    ids = np.concatenate([stream.window(index * window, window)[0] for index in range(count)])
    for epoch in range(2):
        assert sorted(ids[epoch * total : (epoch + 1) * total]) == list(range(total))


@given(lengths=LENGTHS, seed=st.integers(0, 5), start=st.integers(0, 300), length=st.integers(1, 100))
def test_a_window_is_a_cut_of_the_stream_and_its_positions_restart_with_each_document(
    lengths: list[int], seed: int, start: int, length: int
) -> None:
    whole, _ = DocumentStream([corpus_of(lengths)], "domain", seed).window(0, start + length)
    ids, positions = DocumentStream([corpus_of(lengths)], "domain", seed).window(start, length)
    assert ids.tolist() == whole[start:].tolist()
    first_ids = set((np.cumsum(lengths) - np.array(lengths)).tolist())
    expected, position = [], -1
    for token in ids.tolist():
        position = 0 if token in first_ids else position + 1
        expected.append(position)
    assert positions.tolist() == expected


def test_the_order_changes_with_the_seed_the_epoch_and_the_role() -> None:
    def start_of(seed: int, role: str = "domain", epoch: int = 0) -> list[int]:
        stream = DocumentStream([corpus_of([1] * 50)], role, seed)
        return stream.window(epoch * 50, 50)[0].tolist()

    orders = [start_of(0), start_of(1), start_of(0, epoch=1), start_of(0, role="replay")]
    assert len({tuple(order) for order in orders}) == 4
    assert start_of(0) == orders[0]


def blocks(count: int, share: float, **options: Any) -> PackedBlocks:
    return PackedBlocks(
        DocumentStream([corpus_of([7] * 20)], "domain", 0),
        DocumentStream([corpus_of([7] * 20, first_id=1000)], "replay", 0) if share else None,
        replay_share=share,
        sequence_length=16,
        count=count,
        **options,
    )


@given(count=st.integers(1, 300), share=st.sampled_from([0.0, 0.01, 0.1, 0.25, 1 / 3, 0.9]))
@settings(max_examples=30)
def test_every_stretch_of_a_run_has_its_share_of_replay_to_within_one_block(count: int, share: float) -> None:
    run = blocks(count, share)
    roles = [run.role(index) for index in range(count)]
    for end in range(1, count + 1):
        replay = [number for role, number in roles[:end] if role == "replay"]
        domain = [number for role, number in roles[:end] if role == "domain"]
        assert 0 <= end * share - len(replay) < 1 + 1e-9
        assert replay == list(range(len(replay)))
        assert domain == list(range(len(domain)))


def test_replay_blocks_hold_replay_documents() -> None:
    run = blocks(8, 0.25)
    from_replay = [bool((run[index]["input_ids"] >= 1000).all()) for index in range(8)]
    assert from_replay == [False, False, False, True] * 2


def test_the_first_token_of_a_document_is_no_target() -> None:
    block = blocks(1, 0.0)[0]
    starts = block["position_ids"] == 0
    assert (block["labels"][starts] == -100).all()
    assert torch.equal(block["labels"][~starts], block["input_ids"][~starts])


def test_blocks_without_document_boundaries_carry_no_positions() -> None:
    block = blocks(1, 0.0, keep_documents_apart=False)[0]
    assert set(block) == {"input_ids", "labels"}
    assert torch.equal(block["input_ids"], block["labels"])


@pytest.mark.parametrize(
    ("budget", "share", "steps"),
    [({"tokens": 1}, 0.0, 1), ({"tokens": 201}, 0.0, 3), ({"epochs": 2.0}, 0.0, 10), ({"epochs": 0.9}, 0.1, 5)],
)
def test_a_budget_is_rounded_up_to_whole_steps(budget: dict[str, Any], share: float, steps: int) -> None:
    given_budget = {"tokens": None, "epochs": None, **budget}
    assert plan_steps(**given_budget, domain_tokens=500, replay_share=share, tokens_per_step=100) == steps


def test_the_report_accounts_for_every_token() -> None:
    report = report_mix(
        [corpus_of([10] * 10)],
        [corpus_of([100] * 4)],
        replay_share=0.25,
        steps=2,
        batch_sequences=4,
        sequence_length=16,
    )
    assert (report.tokens, report.domain_tokens, report.replay_tokens) == (128, 96, 32)
    assert report.domain_tokens + report.domain_tokens_never_read == 100
    assert report.replay_tokens + report.replay_tokens_never_read == 400
    assert report.documents_longer_than_a_block == 4
