"""A model of two layers, a tokenizer of a few hundred tokens and a corpus of short notes, all made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TEXT = "le la patient fièvre douleur aiguë de du foie coeur traite par dose faible forte chronique sans avec"
WORDS = TEXT.split()


def notes(count: int, seed: int, words: int = 12) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(WORDS), (count, words), generator=generator)
    return [" ".join(WORDS[i] for i in row) + "." for row in picks.tolist()]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def make_base(folder: Path, **settings: Any) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(notes(50, 0), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 128, "eos_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**{**shape, "tie_word_embeddings": True, **settings})).save_pretrained(folder)
    return folder
