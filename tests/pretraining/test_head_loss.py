"""The loss by parts is the loss of transformers: the same value and the same gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpora import make_base

from dapt_merge.pretraining import loss
from dapt_merge.pretraining.loss import has_plain_head, head_loss, keeps_documents_apart


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@given(tokens=st.integers(1, 40), at_once=st.integers(1, 50), seed=st.integers(0, 99), ignored=st.floats(0, 0.9))
@settings(max_examples=50)
def test_value_and_gradients_are_those_of_the_whole_table(tokens: int, at_once: int, seed: int, ignored: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 6, generator=generator, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64).float().requires_grad_()
    targets = torch.randint(0, 11, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = -100
    count = max(1, int((targets != -100).sum()))

    logits = hidden.double() @ weight.double().T
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / count
    expected_gradients = torch.autograd.grad(expected, [hidden, weight])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "TOKENS_AT_ONCE", at_once)
        found = head_loss(hidden, weight, targets, count)
    gradients = torch.autograd.grad(found, [hidden, weight])
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_scaled_loss_scales_its_gradients() -> None:
    hidden = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight, targets = torch.eye(3), torch.tensor([0, 1, 2, 0, 1])
    (once,) = torch.autograd.grad(head_loss(hidden, weight, targets, 5), hidden)
    (thrice,) = torch.autograd.grad(3 * head_loss(hidden, weight, targets, 5), hidden)
    torch.testing.assert_close(thrice, 3 * once)


def test_a_llama_has_a_plain_head_and_keeps_documents_apart(base: Path) -> None:
    model = load(base)
    assert has_plain_head(model)
    assert keeps_documents_apart(model)


def test_a_head_with_a_bias_or_a_scale_keeps_its_own_loss(base: Path) -> None:
    model = load(base)
    head = model.lm_head
    model.lm_head = torch.nn.Linear(head.in_features, head.out_features, bias=True)
    assert not has_plain_head(model)
    scaled = load(base)
    scaled.lm_head.register_forward_hook(lambda module, given_, output: output / 2)
    assert not has_plain_head(scaled)


def test_an_attention_that_ignores_positions_is_found_out(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50, n_positions=32))
    masked = model.eval()
    # A model that drops position_ids before its mask is made attends across documents.
    forward = masked.forward
    masked.forward = lambda input_ids, position_ids=None, **rest: forward(input_ids=input_ids, **rest)
    assert not keeps_documents_apart(masked)


def test_an_attention_that_ignores_positions_in_more_than_one_row_is_found_out(base: Path) -> None:
    model = load(base)
    assert keeps_documents_apart(model, rows=2)
    forward = model.forward

    def of_one_row(input_ids: torch.Tensor, position_ids: torch.Tensor, **rest: Any) -> Any:
        """As flash attention in transformers: documents are looked for in a batch of one row alone."""
        known = {"position_ids": position_ids} if len(input_ids) == 1 else {}
        return forward(input_ids=input_ids, **known, **rest)

    model.forward = of_one_row
    assert keeps_documents_apart(model)
    assert not keeps_documents_apart(model, rows=2)


def test_both_losses_of_a_model_agree(tmp_path: Path) -> None:
    model = load(make_base(tmp_path / "untied", tie_word_embeddings=False))
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, 5] = -100
    whole = model(input_ids=ids, labels=labels).loss
    hidden = model.base_model(input_ids=ids).last_hidden_state.flatten(0, 1)
    targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
    parts = head_loss(hidden, model.lm_head.weight, targets, int((targets != -100).sum()))
    torch.testing.assert_close(parts, whole)
