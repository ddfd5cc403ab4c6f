"""Attention document by document is the attention that a mask of documents describes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dapt_merge.pretraining import attention
from dapt_merge.pretraining.attention import by_document, document_lengths, use_document_attention
from dapt_merge.pretraining.loss import keeps_documents_apart

TOKENS = 24
ROWS = st.lists(st.lists(st.integers(1, TOKENS - 1), max_size=6, unique=True).map(sorted), min_size=1, max_size=3)


def mask_of(rows: list[list[int]]) -> Tensor:
    """The mask of rows that are cut at the given places, by definition."""
    number = torch.tensor([[sum(cut <= place for cut in cuts) for place in range(TOKENS)] for cuts in rows])
    return ((number[:, :, None] == number[:, None, :]) & torch.ones(TOKENS, TOKENS).tril().bool())[:, None]


@given(ROWS)
def test_lengths_are_read_off_the_mask(rows: list[list[int]]) -> None:
    expected = [end - start for cuts in rows for start, end in zip([0, *cuts], [*cuts, TOKENS], strict=True)]
    assert document_lengths(mask_of(rows)) == expected


@given(ROWS, st.integers(0, 2), st.integers(0, TOKENS - 1), st.integers(0, TOKENS - 1))
def test_a_mask_with_any_other_entry_is_no_mask_of_documents(
    rows: list[list[int]], row: int, query: int, key: int
) -> None:
    mask = mask_of(rows)
    mask[row % len(rows), 0, query, key] ^= True
    found = document_lengths(mask)
    # A flipped entry may join two documents of one token or part them; then it is another mask of documents.
    if found is not None:
        edges = torch.tensor(found).cumsum(0).tolist()
        rebuilt = [
            [edge - at * TOKENS for edge in edges if at * TOKENS < edge < (at + 1) * TOKENS] for at in range(len(rows))
        ]
        assert torch.equal(mask_of(rebuilt), mask)


def test_windows_padding_and_bidirectional_masks_are_left_alone() -> None:
    causal = torch.ones(1, 1, 8, 8).tril().bool()
    assert document_lengths(causal) == [8]
    assert document_lengths(causal & causal.new_ones(8, 8).triu(-3)) is None
    padded = causal.clone()
    padded[..., 6:] = False
    assert document_lengths(padded) is None
    assert document_lengths(torch.ones_like(causal)) is None
    assert document_lengths(causal.float()) is None
    assert document_lengths(causal[:, :, -1:]) is None


@given(ROWS, st.sampled_from([(1, 1), (2, 2), (6, 2)]), st.sampled_from([None, 0.3]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_values_and_gradients_are_those_of_the_masked_table(
    rows: list[list[int]], heads: tuple[int, int], scale: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(len(rows), number, TOKENS, 4) for number in (heads[0], heads[1], heads[1])]
    parts = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    mask = mask_of(rows)
    found = by_document(*parts, document_lengths(mask) or [], scale)
    query, key, value = (part.double().repeat_interleave(heads[0] // part.shape[1], 1) for part in parts)
    scores = (query @ key.transpose(2, 3) * (scale or 0.5)).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ value).transpose(1, 2).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(expected.shape, generator=generator)
    for one, other in zip(
        torch.autograd.grad(found, parts, upstream), torch.autograd.grad(expected, parts, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.fixture
def model(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


def called(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The lengths that every call of attention by document is given."""
    calls: list[list[int]] = []

    def watched(*parts: Any) -> Tensor:
        calls.append(parts[3])
        return by_document(*parts)

    monkeypatch.setattr(attention, "by_document", watched)
    return calls


def test_packed_loss_is_the_mean_over_documents_scored_apart(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_document_attention(model)
    calls = called(monkeypatch)
    assert keeps_documents_apart(model)
    calls.clear()
    lengths = [7, 1, 12, 5]
    ids = torch.randint(0, 300, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in lengths])
    labels = ids.masked_fill(positions == 0, -100)
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions[None], labels=labels, use_cache=False).loss
        assert calls == [lengths] * 2
        apart = [model(input_ids=part, labels=part).loss * (part.shape[1] - 1) for part in ids.split(lengths, 1)[::2]]
        apart.append(model(input_ids=ids[:, -5:], labels=ids[:, -5:]).loss * 4)
    assert float(packed) == pytest.approx(float(sum(apart)) / (sum(lengths) - len(lengths)), abs=1e-5)


def test_padded_batches_and_whole_rows_are_as_before(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = copy.deepcopy(model)
    use_document_attention(model)
    calls = called(monkeypatch)
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(ids)
    seen[1, 6:] = 0
    with torch.no_grad():
        for mask in (seen, torch.ones_like(ids), None):
            one, other = (each(input_ids=ids, attention_mask=mask).logits for each in (model, plain))
            assert torch.equal(one, other)
    assert not calls


def test_no_trace_of_it_is_saved(model: Any, tmp_path: Path) -> None:
    use_document_attention(model)
    model.save_pretrained(tmp_path)
    assert attention.NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_a_model_that_was_asked_to_attend_otherwise_does_so(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    eager = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    use_document_attention(eager)
    assert eager.config._attn_implementation == "eager"
