"""A folder of tiny models that the recipes in `dialect/` merge: a base, what was trained from it, a T5 and its own."""

from __future__ import annotations

from pathlib import Path

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def build_zoo(folder: Path) -> Path:
    """Write base, medical, legal, code (each a little off the base), chat (two tokens more), adapter, t5-base, …"""
    torch.manual_seed(0)
    base = _llama(len(_tokenizer()))
    _save(base, folder / "base", _tokenizer())
    for seed, name in enumerate(("medical", "legal", "code"), start=1):
        tokenizer = _tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE if name == "medical" else None
        _save(_moved(base, seed), folder / name, tokenizer)
    chat = _moved(base, 4)
    tokenizer = _tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHAT_TOKENS)})
    chat.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    _save(chat, folder / "chat", tokenizer)
    _save_adapter(base, folder)
    t5 = _t5(len(_tokenizer()))
    _save(t5, folder / "t5-base", _tokenizer())
    _save(_moved(t5, 5), folder / "t5-medical", _tokenizer())
    return folder


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate(LETTERS)}
    model = models.BPE(vocab={**letters, "th": 29, "the": 30, "</s>": 31}, merges=[("t", "h"), ("th", "e")])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="</s>")


def _llama(tokens: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=tokens, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return _spread(LlamaForCausalLM(config))


def _t5(tokens: int):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=tokens, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return _spread(T5ForConditionalGeneration(config))


def _spread(model):
    """Fresh norms are all ones, which no weight could tell apart."""
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def _moved(model, seed: int):
    """Half of what training changes is every model's alike, half its own."""
    import copy

    moved = copy.deepcopy(model)
    for half in (99, seed):
        torch.manual_seed(half)
        for parameter in moved.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    return moved


def _save(model, folder: Path, tokenizer) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_adapter(base, folder: Path) -> None:
    import copy

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(6)
    model = get_peft_model(copy.deepcopy(base), config)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
