"""A tiny base, a run of two checkpoints that moved away from it, and two suites, all on disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT_TASK = """\
task: {name}_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
metadata: {{version: 1}}
"""


def tiny_study(folder: Path) -> dict:
    """Write everything that a study needs into `folder` and return a study's mapping over it."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    _save(model, tokenizer, folder / "base")
    for step in (10, 20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        _save(model, tokenizer, folder / "run" / f"checkpoint-{step}")
    for name, axis, letter in (("domain", "domain", "a"), ("general", "general", "e")):
        documents = [
            {"text": " ".join(letter + word for word in ["one", "two", "three", "four"]) + f" {i}"} for i in range(6)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
        (folder / f"{name}_task.yaml").write_text(TEXT_TASK.format(name=name))
        (folder / "suites").mkdir(exist_ok=True)
        (folder / "suites" / f"{name}.yaml").write_text(
            f"name: {name}\naxis: {axis}\ninclude_path: [..]\ntasks: [{name}_text]\n"
        )
    return {
        "base": str(folder / "base"),
        "checkpoints": str(folder / "run"),
        "space": {
            "method": ["linear", "slerp", "ties", "dare_ties"],
            "checkpoint": "all",
            "weight": {"low": 0.0, "high": 1.0},
            "density": {"low": 0.1, "high": 1.0},
        },
        "objectives": {
            name: {"suite": str(folder / "suites" / f"{name}.yaml"), "metric": "bits_per_byte"}
            for name in ("domain", "general")
        },
        "sampler": {"name": "random", "seed": 3},
        "budget": {"trials": 6},
        "dtype": "float32",
        "output": str(folder / "out"),
    }


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<s>": 0, **{chr(code): code - 31 for code in range(32, 127)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", unk_token="<s>")


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
