"""A tiny random model of each family that people merge, built with transformers."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 96
_BODY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_GROUPED = {**_BODY, "num_key_value_heads": 2}
_HEADED = {**_GROUPED, "head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}

# family → (model class, configuration class, its settings)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", "BertConfig", _BODY),
    "bert_bare": ("BertModel", "BertConfig", _BODY),
    "bert_classifier": ("BertForSequenceClassification", "BertConfig", _BODY),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _BODY),
    "camembert": ("CamembertForMaskedLM", "CamembertConfig", _BODY),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "vocab_size": VOCABULARY},
    ),
    "deberta": ("DebertaV2ForMaskedLM", "DebertaV2Config", _BODY),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**_BODY, **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**_T5, "vocab_size": VOCABULARY}),
    "t5_gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, "vocab_size": VOCABULARY, "feed_forward_proj": "gated-gelu"},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {**_BART, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": VOCABULARY},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _BODY),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _HEADED),
    "mistral": ("MistralForCausalLM", "MistralConfig", _HEADED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _HEADED),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _HEADED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _HEADED),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _HEADED),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_HEADED, **_EXPERTS, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 24},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_HEADED, **_EXPERTS}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**_GROUPED, **_EXPERTS}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **_BODY,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 12,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
    ),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**_HEADED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite_moe": (
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", _BODY),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_BODY, "pad_token_id": 0}),
}


def tiny_model(family: str, seed: int = 0, **settings: Any) -> Any:
    """Build one; the same seed gives the same weights."""
    import transformers

    class_name, config_name, body = FAMILIES[family]
    config = getattr(transformers, config_name)(**{**body, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, class_name)(config).eval()


def moved(model: Any, seed: int, scale: float = 1e-2) -> Any:
    """Move every parameter of a model at random, in place, as further training would; return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model
