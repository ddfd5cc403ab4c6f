"""Tiny Llama checkpoints, as weights and as folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
TOKENS = {f"token{index}": index for index in range(96)}


def llama_shapes(config=CONFIG):
    hidden, inner, kv = config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"] * 8
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}"
        shapes |= {
            f"{start}.self_attn.q_proj.weight": (hidden, hidden),
            f"{start}.self_attn.k_proj.weight": (kv, hidden),
            f"{start}.self_attn.v_proj.weight": (kv, hidden),
            f"{start}.self_attn.o_proj.weight": (hidden, hidden),
            f"{start}.mlp.gate_proj.weight": (inner, hidden),
            f"{start}.mlp.up_proj.weight": (inner, hidden),
            f"{start}.mlp.down_proj.weight": (hidden, inner),
            f"{start}.input_layernorm.weight": (hidden,),
            f"{start}.post_attention_layernorm.weight": (hidden,),
        }
    return shapes


def random_weights(seed, near=None, scale=1e-3):
    """Return base-like weights (rms 0.02), or some at a distance `scale` from those given."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (0.02 if near is None else scale) * torch.randn(shape, generator=generator)
        + (0.0 if near is None else near[name])
        for name, shape in llama_shapes().items()
    }


def save_model(folder: Path, weights, config=CONFIG, tokens=TOKENS):
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if tokens is not None:
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}))
    return folder


def load_weights(folder: Path):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
