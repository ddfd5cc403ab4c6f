"""Packing loses no token, and a model reads packed documents as if each were alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpora import texts, write_jsonl

from dapt_merge.corpus import BuiltCorpus, CorpusConfig, build_corpus
from dapt_merge.corpus.built import positions_of
from dapt_merge.corpus.packing import Layout, _starts, _tokens_between, _tokens_until
from dapt_merge.corpus.tokens import TokenStore

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def store_of(lengths: list[int]) -> TokenStore:
    """Documents whose tokens are all different: 0, 1, 2, …, split over two chunks."""
    array = np.array(lengths, dtype=np.int64)
    ids = np.arange(array.sum(), dtype=np.int32)
    half = len(lengths) // 2
    cut = int(array[:half].sum())
    starts = np.cumsum(array) - array
    chunks = (np.arange(len(lengths)) >= half).astype(np.int32)
    return TokenStore(
        array, np.zeros(len(array), np.int32), 0, "", (ids[:cut], ids[cut:]), chunks, starts - cut * chunks
    )


def built(tmp_path: Path, tokenizer: Any, found: list[str], **options: Any) -> BuiltCorpus:
    source = {"path": write_jsonl(tmp_path / "c.jsonl", found)}
    return build_corpus(CorpusConfig.model_validate({"sources": [source], **options}), tokenizer)


@given(lengths=LENGTHS, start=st.integers(0, 300), size=st.integers(1, 200))
@settings(max_examples=60)
def test_a_stretch_is_cut_out_of_all_documents_laid_end_to_end(lengths: list[int], start: int, size: int) -> None:
    order = np.random.default_rng(0).permutation(len(lengths))
    store = store_of(lengths)
    read = store.lengths[order]
    layout = Layout(order, read, np.zeros(len(order), dtype=bool))
    whole = np.concatenate([store.document(document) for document in order])
    end = min(start + size, len(whole))
    if start < end:
        stretch = _tokens_between(layout, store, np.cumsum(read) - read, start, end)
        assert stretch.tolist() == whole[start:end].tolist()


@given(lengths=LENGTHS, length=st.integers(8, 32))
@settings(max_examples=60)
def test_pieces_start_where_documents_and_rows_do(lengths: list[int], length: int) -> None:
    begins = np.cumsum(lengths) - np.array(lengths)
    rows = sum(lengths) // length
    for row, starts in enumerate(_starts(begins, 0, rows, length)):
        inside = set(begins.tolist()) & set(range(row * length, (row + 1) * length))
        assert starts.tolist() == sorted({0} | {place - row * length for place in inside})


@given(lengths=LENGTHS, kinds=st.lists(st.booleans(), min_size=30, max_size=30))
def test_replay_tokens_are_counted_to_the_token(lengths: list[int], kinds: list[bool]) -> None:
    replay = np.array(kinds[: len(lengths)])
    layout = Layout(np.arange(len(lengths)), np.array(lengths), replay)
    of_token = np.repeat(replay, lengths)
    expected = np.concatenate([[0], np.cumsum(of_token)])
    assert _tokens_until(layout, np.arange(sum(lengths) + 1)).tolist() == expected.tolist()


@given(st.lists(st.integers(1, 30), max_size=5))
def test_positions_start_again_in_every_piece(cuts: list[int]) -> None:
    starts = sorted({0, *(cut for cut in cuts if cut < 30)})
    expected = [i - max(s for s in starts if s <= i) for i in range(30)]
    assert positions_of(starts, 30).tolist() == expected


def test_every_token_of_every_document_is_in_the_rows_with_an_end_after_each(tmp_path: Path, tokenizer: Any) -> None:
    found = [*texts(30, 3), "long " * 500, "a <|end|> b"]
    corpus = built(tmp_path, tokenizer, found, sequence_length=64)
    ids = torch.cat([row["input_ids"] for row in corpus.train]).tolist()
    documents = "".join(tokenizer.decode(ids)).split(tokenizer.eos_token)
    end = tokenizer.eos_token_id
    assert ids.count(end) >= len(found)
    # What is left of the last row starts the next epoch.
    pieces: list[list[int]] = [[]]
    for token in ids:
        pieces[-1].append(token) if token != end else pieces.append([])
    whole = [tokenizer.decode(piece) for piece in pieces[: len(found)]]
    assert sorted(whole) == sorted(found)
    assert documents
    assert corpus.manifest["packing"]["documents_longer_than_a_row"] >= 1


def test_targets_are_all_tokens_but_the_first_of_a_piece(tmp_path: Path, tokenizer: Any) -> None:
    corpus = built(tmp_path, tokenizer, texts(10, 3), sequence_length=64)
    targets = 0
    for row in corpus.train:
        first = row["position_ids"] == 0
        assert first[0]
        assert (row["labels"][first] == -100).all()
        assert torch.equal(row["labels"][~first], row["input_ids"][~first])
        targets += int((row["labels"] != -100).sum())
    assert targets == corpus.manifest["packing"]["targets"]


def test_rows_without_document_boundaries_carry_no_positions(tmp_path: Path, tokenizer: Any) -> None:
    row = built(tmp_path, tokenizer, texts(10, 3), sequence_length=64, attention="block").train[0]
    assert set(row) == {"input_ids", "labels"}
    assert torch.equal(row["input_ids"], row["labels"])


def test_rows_come_alone_and_in_batches_and_from_loader_processes(tmp_path: Path, tokenizer: Any) -> None:
    corpus = built(tmp_path, tokenizer, texts(20, 3), sequence_length=64)
    batch = corpus.train[[1, 2]]
    assert batch["input_ids"].shape == (2, 64)
    assert batch["position_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"][0], corpus.train[1]["input_ids"])
    loaded = list(torch.utils.data.DataLoader(corpus.train, batch_size=2, num_workers=1))
    assert torch.equal(loaded[0]["labels"][1], corpus.train[1]["labels"])


def tiny(kind: str, attention: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 400, "max_position_embeddings": 4096, "initializer_range": 0.3}
    model = (
        LlamaForCausalLM(LlamaConfig(**shape, attn_implementation=attention))
        if kind == "llama"
        else Qwen2ForCausalLM(Qwen2Config(**shape, attn_implementation=attention))
    )
    return model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@torch.no_grad()
def test_the_packed_loss_is_the_mean_over_documents_scored_apart(
    tmp_path: Path, tokenizer: Any, kind: str, attention: str
) -> None:
    found = texts(12, 5, words=20)
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in found]
    model = tiny(kind, attention)
    # One row holds all documents whole.
    row = built(tmp_path, tokenizer, found, sequence_length=sum(lengths)).train[[0]]
    packed = model(**row, use_cache=False).loss
    total = targets = 0.0
    for text in found:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        logits = model(input_ids=ids).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        targets += ids.shape[1] - 1
    assert float(packed) == pytest.approx(total / targets, rel=1e-5)
    # Were documents not apart, the loss would be another.
    row.pop("position_ids")
    assert abs(float(model(**row, use_cache=False).loss) - total / targets) > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_batch_of_rows_with_cut_documents_scores_each_piece_apart(
    tmp_path: Path, tokenizer: Any, attention: str
) -> None:
    corpus = built(tmp_path, tokenizer, texts(12, 5, words=40), sequence_length=96)
    model = tiny("llama", attention)
    batch = corpus.train[list(range(3))]
    packed = model(**batch, use_cache=False).loss
    total = targets = 0.0
    for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
        for start, end in pairwise(starts):
            if end - start > 1:
                logits = model(input_ids=ids[None, start:end]).logits[0, :-1]
                total += float(torch.nn.functional.cross_entropy(logits, ids[start + 1 : end], reduction="sum"))
                targets += end - start - 1
    assert float(packed) == pytest.approx(total / targets, rel=1e-5)
