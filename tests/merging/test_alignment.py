"""Models with different vocabularies merge row by row of one token, once the recipe says whose tokens count."""

import json

import pytest
import torch
from merging_models import CONFIG, load_weights, random_weights, save_model

from dapt_merge import merge, open_checkpoint
from dapt_merge.errors import InputError

EMBEDDING = "model.embed_tokens.weight"
BASE_TOKENS = {f"t{i}": i for i in range(90)}  # 96 rows: six are padding
DAPT_TOKENS = {"t1": 0, "t0": 1, **{f"t{i}": i for i in range(2, 89)}, "<pad>": 89, "<new>": 90}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("vocabularies")
    base = random_weights(0)
    dapt = random_weights(1, near=base)
    dapt[EMBEDDING] = dapt[EMBEDDING][:91].clone()
    save_model(root / "base", base, tokens=BASE_TOKENS)
    save_model(root / "dapt", dapt, config=CONFIG | {"vocab_size": 91}, tokens=DAPT_TOKENS)
    return root / "base", root / "dapt"


def rows(folder):
    return load_weights(folder)[EMBEDDING]


def test_without_a_tokenizer_source_they_are_refused_with_the_remedy(pair):
    with pytest.raises(InputError) as error:
        merge(*pair, "linear", weight=0.5)
    assert "tokenizer_source" in str(error.value.remedy)


def test_rows_are_merged_by_token_and_padding_is_the_bases(pair):
    lazy = merge(*pair, "linear", weight=0.5, tokenizer_source="base")
    merged, base, dapt = lazy[EMBEDDING], rows(pair[0]), rows(pair[1])
    assert merged.shape == base.shape
    torch.testing.assert_close(merged[0], (base[0] + dapt[1]) / 2)
    torch.testing.assert_close(merged[1], (base[1] + dapt[0]) / 2)
    torch.testing.assert_close(merged[50], (base[50] + dapt[50]) / 2)
    assert torch.equal(merged[89], base[89])  # t89 is not in the DAPT model
    assert torch.equal(merged[91:], base[91:])


def test_a_union_adds_the_tokens_of_one_model_unchanged(pair, tmp_path):
    lazy = merge(*pair, "task_arithmetic", weight=0.3, tokenizer_source="union")
    report = lazy.save(tmp_path / "out")
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    added = {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    assert added == {"<pad>": 90, "<new>": 91}
    merged, base, dapt = lazy[EMBEDDING], rows(pair[0]), rows(pair[1])
    assert torch.equal(merged[90], dapt[89])
    assert torch.equal(merged[91], dapt[90])
    assert torch.equal(merged[89], base[89])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == len(merged) == 96
    found = report.tokens[str(pair[1])]
    assert (found["tokens"], found["moved"], found["dropped"]) == (91, 4, 0)
    assert any("changed their id" in warning for warning in report.warnings)


def test_the_tokens_of_a_named_model_and_disk_live_and_api_alike(pair, tmp_path):
    lazy = merge(*pair, "ties", weight=0.5, density=0.5, tokenizer_source=str(pair[1]))
    lazy.save(tmp_path / "out")
    written, live = open_checkpoint(tmp_path / "out"), open_checkpoint(lazy.to_model())
    for name in lazy:
        assert torch.equal(written.read(name), lazy[name])
        assert torch.equal(live.read(name), lazy[name])
    assert len(lazy[EMBEDDING]) == 91
    vocabulary = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    assert vocabulary == DAPT_TOKENS


def test_end_points_are_exact_and_equal_vocabularies_change_nothing(pair, models):
    whole = merge(*pair, "linear", weight=1.0, tokenizer_source=str(pair[1]))
    assert torch.equal(whole[EMBEDDING], rows(pair[1]))
    plain = merge(models["base"], models["one"], "linear", weight=0.5)
    aligned = merge(models["base"], models["one"], "linear", weight=0.5, tokenizer_source="union")
    assert all(torch.equal(plain[name], aligned[name]) for name in plain)


def test_a_source_that_is_none_of_the_models_is_refused(pair):
    with pytest.raises(InputError, match="none of the models"):
        merge(*pair, "linear", weight=0.5, tokenizer_source="elsewhere")


def test_a_model_without_a_tokenizer_is_refused_unless_its_rows_are_those_of_the_source(pair, tmp_path):
    save_model(tmp_path / "same", random_weights(2), tokens=None)
    merge(pair[0], tmp_path / "same", "linear", weight=0.5, tokenizer_source="base")
    save_model(tmp_path / "other", load_weights(pair[1]), config=CONFIG | {"vocab_size": 91}, tokens=None)
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        merge(pair[0], tmp_path / "other", "linear", weight=0.5, tokenizer_source="base")
