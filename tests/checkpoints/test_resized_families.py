"""Every family's token tables follow a vocabulary that grew: embedding, head, and the biases beside them."""

import json

import pytest
import torch
from model_families import VOCABULARY, moved, tiny_model

from dapt_merge import merge, open_checkpoint
from dapt_merge.checkpoints.groups import vocabulary_axis

FAMILIES = (
    "bert",
    "camembert",
    "distilbert",
    "deberta",
    "modernbert",
    "t5",
    "bart",
    "gpt2",
    "gpt_neox",
    "qwen2",
    "mixtral",
)
TOKENS = {f"t{row}": row for row in range(VOCABULARY)}


def save(folder, model, tokens):
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return a function: family → a base, and a model trained from it that has five more tokens and swapped two."""
    made = {}

    def folders(family):
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            model = tiny_model(family)
            save(root / "base", model, TOKENS)
            model.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
            more = {f"new{row}": VOCABULARY + row for row in range(5)}
            save(root / "dapt", moved(model, seed=1), TOKENS | {"t3": 7, "t7": 3} | more)
            made[family] = (root / "base", root / "dapt")
        return made[family]

    return folders


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tables_are_all_that_grew_and_all_are_known(family, pair):
    base, dapt = (open_checkpoint(folder) for folder in pair(family))
    grown = {name for name in base.tensors if base.tensors[name].shape != dapt.tensors[name].shape}
    assert grown
    assert grown == {name for name in base.tensors if vocabulary_axis(name) is not None}
    for name in grown:
        axis = vocabulary_axis(name)
        assert (base.tensors[name].shape[axis], dapt.tensors[name].shape[axis]) == (VOCABULARY, VOCABULARY + 5)


@pytest.mark.parametrize("source", ["base", "union"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_grown_vocabulary_is_merged_by_token_on_disk_and_in_a_live_model(family, source, pair, tmp_path):
    base, dapt = pair(family)
    lazy = merge(base, dapt, "linear", weight=0.25, tokenizer_source=source)
    rows = VOCABULARY + 5 * (source == "union")
    lazy.save(tmp_path / "out")
    written, model = open_checkpoint(tmp_path / "out"), open_checkpoint(lazy.to_model())
    assert list(written.tensors) == list(model.tensors) == list(lazy)
    assert written.config["vocab_size"] == rows
    one, other = open_checkpoint(base), open_checkpoint(dapt)
    swapped = torch.arange(VOCABULARY)
    swapped[[3, 7]] = swapped[[7, 3]]
    for name in lazy:
        assert torch.equal(written.read(name), lazy[name])
        assert torch.equal(model.read(name), lazy[name])
        axis = vocabulary_axis(name)
        first, second = one.read(name), other.read(name)
        if axis is None:
            torch.testing.assert_close(lazy[name], 0.75 * first + 0.25 * second, rtol=1e-5, atol=1e-6)
            continue
        merged, first, second = (tensor.movedim(axis, 0) for tensor in (lazy[name], first, second))
        assert len(merged) == rows
        expected = 0.75 * first + 0.25 * second[swapped]
        torch.testing.assert_close(merged[:VOCABULARY], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(merged[VOCABULARY:], second[VOCABULARY:rows])
