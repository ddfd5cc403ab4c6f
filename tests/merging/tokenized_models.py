"""Tiny models with real tokenizers, whose vocabularies differ as those of DAPT runs do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CHARACTERS = "abcdefghijklmnop"


def byte_pairs(letters: str = CHARACTERS, merges: tuple[tuple[str, str], ...] = (("a", "b"), ("c", "d"))) -> Any:
    """Return a tokenizer of letters and pairs of them, with <s> and </s>."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens = [*letters, *(one + other for one, other in merges)]
    made = Tokenizer(BPE(vocab={token: row for row, token in enumerate(tokens)}, merges=list(merges)))
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def with_added(tokenizer: Any, *plain: str, pad: str | None = None) -> Any:
    """Add tokens, and a pad token, as a DAPT script would; return the tokenizer."""
    tokenizer.add_tokens(list(plain))
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    return tokenizer


def save_tokenized(folder: Path, tokenizer: Any, seed: int, *, rows: int | None = None, **settings: Any) -> Path:
    """Save a random two-layer model with as many rows as the tokenizer has tokens, or more, and the tokenizer.

    `family` in the settings is "Llama" or "Qwen2".
    """
    import transformers

    family = settings.pop("family", "Llama")
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": rows or len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "bos_token_id": tokenizer.convert_tokens_to_ids("<s>"),
            "eos_token_id": tokenizer.convert_tokens_to_ids("</s>"),
            **settings,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
