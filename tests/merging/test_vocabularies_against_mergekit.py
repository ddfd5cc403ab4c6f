"""Different vocabularies, merged by mergekit and by us: the same tokens, and for each token the same row."""

import pytest
import torch
from safetensors.torch import load_file
from tokenized_models import byte_pairs, save_tokenized, with_added

from dapt_merge import merge, open_checkpoint
from dapt_merge.checkpoints.vocabulary import token_ids

TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module", params=["untied", "tied"])
def folders(request, tmp_path_factory):
    """Return a base, a DAPT model that added tokens, and one that has another order and other pairs."""
    root = tmp_path_factory.mktemp(request.param)
    tied = {"tie_word_embeddings": request.param == "tied"}
    added = with_added(byte_pairs(), "<med>", pad="<pad>")
    other = with_added(byte_pairs("ponmlkjihgfedcba", (("e", "f"), ("a", "b"))), "<dose>", "<med>")
    return {
        "base": save_tokenized(root / "base", byte_pairs(), 0, **tied),
        "added": save_tokenized(root / "added", added, 1, **tied),
        "other": save_tokenized(root / "other", other, 2, **tied),
    }


def recipe(folders, method, vocabulary):
    content = {
        "merge_method": method,
        "base_model": str(folders["base"]),
        "models": [
            {"model": str(folders["added"]), "parameters": {"weight": 0.5}},
            {"model": str(folders["other"]), "parameters": {"weight": 0.3}},
        ],
        "dtype": "float32",
        **vocabulary,
    }
    if method == "linear":
        content["models"].insert(0, {"model": str(folders["base"]), "parameters": {"weight": 0.2}})
    return content


def by_mergekit(content, out):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    run_merge(MergeConfiguration.model_validate(content), str(out), MergeOptions(quiet=True, write_model_card=False))


def assert_same_rows(content, tmp_path):
    by_mergekit(content, tmp_path / "theirs")
    merge(recipe=content).save(tmp_path / "ours")
    theirs, ours = open_checkpoint(tmp_path / "theirs"), open_checkpoint(tmp_path / "ours")
    their_ids, our_ids = token_ids(theirs), token_ids(ours)
    assert set(our_ids) == set(their_ids)
    their_rows = torch.tensor([their_ids[token] for token in our_ids])
    our_rows = torch.tensor(list(our_ids.values()))
    assert set(ours.tensors) == set(theirs.tensors)
    for name in ours.tensors:
        one, two = ours.read(name), theirs.read(name)
        if name in TABLES:
            assert len(one) == len(two) == ours.config["vocab_size"] == theirs.config["vocab_size"]
            one, two = one[our_rows], two[their_rows]
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    return load_file(tmp_path / "ours" / "model.safetensors"), our_ids


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("source", ["base", "union", "other"])
def test_each_source_of_tokens_gives_every_token_the_same_row(folders, tmp_path, method, source):
    wanted = str(folders.get(source, source)) if source == "other" else source
    assert_same_rows(recipe(folders, method, {"tokenizer_source": wanted}), tmp_path)


@pytest.mark.parametrize("source", ["union", "other"])  # with "base", mergekit fails on tokens that the base lacks
def test_single_tokens_get_the_rows_that_the_tokenizer_block_names(folders, tmp_path, source):
    other, added = str(folders["other"]), str(folders["added"])
    tokens = {
        "a": {"source": other, "force": True},
        "b": {"source": {"kind": "zero"}, "force": True},
        "c": {"source": {"kind": "zero"}},  # every model has it: no effect
        "<med>": {"source": added},
        "<pad>": {"source": {"kind": "model_token", "model": other, "token": "</s>"}},
        "<dose>": {"source": {"kind": "model_token", "model": added, "token_id": 3}, "force": True},
        "<nobody's>": {"source": {"kind": "model_token", "model": other, "token": "ef"}},
    }
    wanted = other if source == "other" else source
    vocabulary = {"tokenizer": {"source": wanted, "tokens": tokens, "pad_to_multiple_of": 16}}
    weights, ids = assert_same_rows(recipe(folders, "linear", vocabulary), tmp_path)
    embedding = weights[TABLES[0]]
    assert len(embedding) == 32
    assert torch.equal(embedding[ids["b"]], torch.zeros(16))
    expected = load_file(folders["other"] / "model.safetensors")[TABLES[0]]
    row = token_ids(open_checkpoint(other))["ef"]
    torch.testing.assert_close(embedding[ids["<nobody's>"]], expected[row])


def test_new_padding_is_the_mean_of_the_other_rows(folders, tmp_path):
    vocabulary = {"tokenizer": {"source": "base", "pad_to_multiple_of": 32}}
    content = recipe(folders, "linear", vocabulary)
    by_mergekit(content, tmp_path / "theirs")
    ours = merge(recipe=content)
    theirs = open_checkpoint(tmp_path / "theirs").read(TABLES[0])
    assert ours[TABLES[0]].shape == theirs.shape == (32, 16)
    torch.testing.assert_close(ours[TABLES[0]], theirs, rtol=1e-5, atol=1e-6)
