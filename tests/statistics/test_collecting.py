"""Fisher information and Gram matrices against what they are defined as, on a tiny model."""

import pytest
import torch
from statistics_models import TEXTS, make_model, write_corpus

from dapt_merge.checkpoints.opening import open_checkpoint
from dapt_merge.corpus.config import CorpusSource
from dapt_merge.errors import DaptMergeError, InputError
from dapt_merge.statistics.collecting import collect_statistics, read_sequences


def load(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), AutoTokenizer.from_pretrained(folder)


def sequences_of(tokenizer, length=1024):
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS if text]
    parts = [row[start : start + length] for row in rows for start in range(0, len(row), length)]
    return [part for part in parts if len(part) > 1]


def test_fisher_is_the_squared_gradient_of_each_sequences_log_likelihood_per_token(models, corpus):
    found = collect_statistics(models[0], corpus, "fisher", 10_000, device="cpu")
    model, tokenizer = load(models[0])
    names, parameters = zip(*model.named_parameters(), strict=True)
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    predicted = 0
    for row in sequences_of(tokenizer):
        ids = torch.tensor([row])
        log_probabilities = torch.log_softmax(model(input_ids=ids).logits[0, :-1], dim=-1)
        likelihood = log_probabilities.gather(1, ids[0, 1:, None]).sum()
        for total, gradient in zip(sums, torch.autograd.grad(likelihood, parameters), strict=True):
            total += gradient.square()
        predicted += len(row) - 1
    assert found.tensors.keys() == set(names)
    for name, total in zip(names, sums, strict=True):
        expected = total / predicted
        assert found.tensors[name].dtype == torch.float32
        torch.testing.assert_close(found.tensors[name].double(), expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


def test_gram_is_the_mean_outer_product_of_a_layers_inputs(models, corpus):
    found = collect_statistics(models[0], corpus, "gram", 10_000, device="cpu")
    model, tokenizer = load(models[0])
    first = model.model.layers[0]
    total, tokens = torch.zeros(16, 16, dtype=torch.float64), 0
    for row in sequences_of(tokenizer):
        inputs = first.input_layernorm(model.model.embed_tokens(torch.tensor(row)))
        total += inputs.T @ inputs
        tokens += len(row)
    for part in ("q_proj", "k_proj", "v_proj"):
        matrix = found.tensors[f"model.layers.0.self_attn.{part}.weight"]
        torch.testing.assert_close(matrix.double(), (total / tokens).detach(), rtol=1e-4, atol=1e-6)
    assert found.tensors["model.layers.1.mlp.down_proj.weight"].shape == (24, 24)


def test_gram_matrices_are_of_the_linear_layers_that_the_checkpoint_stores(models, corpus, tmp_path):
    tied = collect_statistics(models[0], corpus, "gram", 50)
    assert len(tied.tensors) == 14
    assert not any("head" in name or "embed" in name for name in tied.tensors)
    untied = collect_statistics(make_model(tmp_path / "untied", 3, tie_word_embeddings=False), corpus, "gram", 50)
    assert untied.tensors["lm_head.weight"].shape == (16, 16)


def test_the_same_pass_gives_the_same_bits_and_says_what_it_was(models, corpus):
    calls = []
    one = collect_statistics(models[0], corpus, "fisher", 40, on_progress=lambda *call: calls.append(call))
    two = collect_statistics(models[0], corpus, "fisher", 40)
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
    assert one.about["model"] == open_checkpoint(models[0]).fingerprint()
    assert one.about["tokens"] == "40"
    assert one.about["corpus"].startswith("xxh3:")
    assert calls[-1] == (40, 40)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_documents_are_cut_into_parts_and_at_most_the_tokens_asked_for_are_read(models, corpus):
    _, tokenizer = load(models[0])
    source = CorpusSource(path=corpus, text_field="text")
    assert list(read_sequences(source, tokenizer, 10_000, 1024)) == sequences_of(tokenizer)
    assert list(read_sequences(source, tokenizer, 10_000, 8)) == sequences_of(tokenizer, 8)
    for tokens in (2, 3, 29, 30, 31, 60):
        rows = list(read_sequences(source, tokenizer, tokens, 8))
        assert tokens - 1 <= sum(map(len, rows)) <= tokens
        assert all(2 <= len(row) <= 8 for row in rows)


def test_text_that_spells_a_special_token_is_text(models, tmp_path):
    _, tokenizer = load(models[0])
    corpus = write_corpus(tmp_path / "odd.jsonl", ["a</s>b"])
    (row,) = read_sequences(CorpusSource(path=corpus, text_field="text"), tokenizer, 100, 100)
    assert row.count(tokenizer.eos_token_id) == 1


def test_what_cannot_be_collected_is_said(models, corpus, tmp_path):
    with pytest.raises(InputError, match=r"no kind 'fischer'\. Did you mean 'fisher'"):
        collect_statistics(models[0], corpus, "fischer", 10)
    with pytest.raises(InputError, match="no such corpus file"):
        collect_statistics(models[0], tmp_path / "none.jsonl", "fisher", 10)
    with pytest.raises(InputError, match="no such file or folder"):
        collect_statistics(tmp_path / "none", corpus, "fisher", 10)
    with pytest.raises(InputError, match="no text"):
        collect_statistics(models[0], write_corpus(tmp_path / "empty.jsonl", ["", " "]), "gram", 10)


def test_a_diverged_model_is_told(tmp_path, corpus):
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path / "diverged", 0)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DaptMergeError, match="NaN or infinite"):
        collect_statistics(folder, corpus, "fisher", 30)
