"""A tokenizer of a few hundred tokens, and texts of French words, all made on the spot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

# A vocabulary with a long tail, as texts have: the sequences of a few words are hardly ever repeated by chance.
_SYLLABLES = "ba cé di for gué hô jau lin mè nœ pour qué ré san té vou xo za œd ïa"
SYLLABLES = _SYLLABLES.split()
WORDS = [a + b for a in SYLLABLES for b in SYLLABLES] + [a + b + c for a in SYLLABLES for b in SYLLABLES for c in "nsx"]


def text_of(words: int, generator: np.random.Generator) -> list[str]:
    places = np.minimum(generator.zipf(1.3, words), len(WORDS)) - 1
    return [WORDS[place] for place in places]


def texts(count: int, seed: int, words: int = 60) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(text_of(words, generator)).capitalize() + "." for _ in range(count)]


def write_jsonl(path: Path, found: Iterable[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in found), encoding="utf-8")
    return path


def small_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts(50, 0), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
