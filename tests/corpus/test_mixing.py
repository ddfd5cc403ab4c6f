"""Shares are shares of tokens, exact to the token, spread evenly; an epoch reads every document once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapt_merge.corpus.config import CorpusConfig
from dapt_merge.corpus.mixing import interleaved, reading_order, resolve_mix

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def config(*sources: dict[str, Any], **options: Any) -> CorpusConfig:
    named = [{"path": f"{number}.jsonl", **source} for number, source in enumerate(sources)]
    return CorpusConfig.model_validate({"sources": named, "sequence_length": 100, **options})


REPLAY = {"role": "replay"}


@given(
    share=st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.3, 0.9]),
    held=st.tuples(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(1, 10**9)),
    tokens=st.integers(1, 10**10),
    multiple=st.integers(1, 64),
)
def test_the_realised_share_is_the_one_asked_for_to_half_a_token(
    share: float, held: tuple[int, int, int], tokens: int, multiple: int
) -> None:
    mix = resolve_mix(config({}, {}, REPLAY, replay_share=share, tokens=tokens), held, multiple)
    total = sum(mix.tokens)
    assert total == mix.rows * 100
    assert mix.rows % multiple == 0
    assert 0 <= total - tokens < 100 * multiple
    assert abs(mix.tokens[2] - total * share) <= 0.5 + 1e-6 * total
    # Within a role every source is read equally often.
    assert abs(mix.tokens[0] * held[1] - mix.tokens[1] * held[0]) <= held[0] + held[1]


@given(
    epochs=st.floats(0.01, 20).map(lambda number: round(number, 3)),
    share=st.sampled_from([0.0, 0.05, 0.25, 0.5]),
    held=st.tuples(st.integers(1, 10**9), st.integers(1, 10**9)),
    weight=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_parts_of_epochs_give_the_domain_as_many_tokens_up_to_a_row(
    epochs: float, share: float, held: tuple[int, int], weight: float
) -> None:
    replay = [REPLAY] if share else []
    mix = resolve_mix(config({"weight": weight}, *replay, replay_share=share, epochs=epochs), held[: 1 + len(replay)])
    total = sum(mix.tokens)
    assert total == mix.rows * 100
    assert abs(mix.tokens[0] - epochs * weight * held[0]) <= 100 + 1e-9 * total
    assert abs(total - mix.tokens[0] - total * share) <= 0.5 + 1e-9 * total


def test_epochs_count_the_domain_and_replay_comes_on_top() -> None:
    mix = resolve_mix(config({}, REPLAY, replay_share=0.2, epochs=3), [8000, 10_000])
    assert mix.tokens == (24_000, 6_000)
    assert mix.epochs == (3.0, 0.6)


def test_without_a_budget_the_domain_is_read_once() -> None:
    assert resolve_mix(config({}), [12_345]).rows == 124


def test_weights_multiply_epochs_and_shares_are_of_the_role() -> None:
    assert resolve_mix(config({"weight": 2}, {}, epochs=1), [1000, 2000]).tokens == (2000, 2000)
    mix = resolve_mix(config({"share": 0.3}, {"weight": 3}, {}, tokens=10_000), [50, 1000, 4000])
    assert mix.tokens == (3000, 3000, 4000)


def test_every_token_of_the_budget_has_a_source() -> None:
    assert sum(resolve_mix(config({}, {}, {}, tokens=100), [1, 1, 1]).tokens) == 100


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([{"share": 0.5}, {"share": 0.6}], "add up to 1.1"),
        ([{"share": 0.5}, {"share": 0.4}], "add up to 0.9"),
        ([{"share": 1.0}, {}], "leave nothing"),
        ([{"share": 0.5, "weight": 2}, {}], "no effect"),
        ([{"name": "a"}, {"name": "a"}], "called 'a'"),
        ([REPLAY], "no source with the role 'domain'"),
        ([{}, REPLAY], "never be read"),
        ([{}, {**REPLAY, "weight": 2}], "only replay source"),
    ],
)
def test_contradictions_are_refused(sources: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(*sources)


@given(lengths=LENGTHS, tokens=st.integers(0, 3000), seed=st.integers(0, 9))
def test_an_epoch_reads_every_document_once_and_only_the_last_is_cut(
    lengths: list[int], tokens: int, seed: int
) -> None:
    order, read = reading_order(np.array(lengths), tokens, (seed, 0))
    assert read.sum() == tokens
    assert (read > 0).all()
    assert (read[:-1] == np.array(lengths)[order[:-1]]).all()
    for start in range(0, len(order), len(lengths)):
        epoch = order[start : start + len(lengths)].tolist()
        assert len(set(epoch)) == len(epoch)


def test_the_order_follows_the_seed_the_source_and_the_epoch() -> None:
    lengths = np.ones(50, dtype=np.int64)
    one, other, source = (reading_order(lengths, 100, key)[0].tolist() for key in ((0, 0), (1, 0), (0, 1)))
    assert len({tuple(order) for order in (one[:50], one[50:], other[:50], source[:50])}) == 4
    assert one == reading_order(lengths, 100, (0, 0))[0].tolist()


@given(first=LENGTHS, second=LENGTHS)
def test_every_stretch_has_the_proportions_of_the_whole_to_within_documents(
    first: list[int], second: list[int]
) -> None:
    reads = [np.array(first), np.array(second)]
    order = interleaved(reads)
    assert sorted(order.tolist()) == list(range(len(first) + len(second)))
    lengths = np.concatenate(reads)[order]
    of_second = order >= len(first)
    done, total = np.cumsum(lengths * of_second), np.cumsum(lengths)
    longest = max(max(first), max(second))
    assert (np.abs(done - total * sum(second) / total[-1]) <= longest + 1e-6).all()
    # Each source keeps its own order.
    assert (np.diff(order[~of_second]) > 0).all()
