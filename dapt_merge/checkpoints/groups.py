"""Which part of a language model a tensor belongs to, read off its name: the layer, and attention, MLP, embedding, …

Works from the naming habits of decoder families (Llama, Mistral, Qwen, Gemma, Phi, GPT-2, GPT-NeoX, OPT, Falcon). It
knows no shapes and no model classes; a name it cannot place is "other".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["attention", "mlp", "embedding", "norm", "head", "other"]

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h)\.(\d+)\.")
# Norms come first: `post_attention_layernorm` is a norm, whatever it follows.
_KINDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("norm", re.compile(r"norm|(?:^|\.)ln_|(?:^|\.)ln\d|\.ln\.", re.IGNORECASE)),
    ("head", re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_projection|score)\.")),
    ("embedding", re.compile(r"embed|(?:^|\.)(?:wte|wpe)\.")),
    ("attention", re.compile(r"att(?:n|ention)|(?:^|\.)(?:[qkvo]_proj|query_key_value|qkv_proj)\.")),
    ("mlp", re.compile(r"mlp|feed_forward|ffn|experts|moe|(?:^|\.)(?:fc\d?|fc_in|fc_out|w[123]|dense_\w+)\.")),
)


@dataclass(frozen=True)
class TensorGroup:
    """Where a tensor sits: its layer (0-based, None outside the stack) and its kind."""

    layer: int | None
    kind: Kind


def tensor_group(name: str) -> TensorGroup:
    """Return the layer and kind that a tensor's name states.

    Example:
        >>> tensor_group("model.layers.11.self_attn.q_proj.weight")
        TensorGroup(layer=11, kind='attention')
    """
    found = _LAYER.search(name)
    kind: Kind = next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")
    return TensorGroup(layer=int(found.group(1)) if found else None, kind=kind)


def with_layer(name: str, layer: int) -> str:
    """Return the name that a layer's tensor has in another layer.

    Example:
        >>> with_layer("model.layers.3.mlp.up_proj.weight", 12)
        'model.layers.12.mlp.up_proj.weight'
    """
    found = _LAYER.search(name)
    return name if found is None else f"{name[: found.start(1)]}{layer}{name[found.end(1) :]}"


def natural_order(names: Iterable[str]) -> list[str]:
    """Sort names with their numbers as numbers, so that layer 2 comes before layer 10.

    Example:
        >>> natural_order(["h.10.w", "h.2.w"])
        ['h.2.w', 'h.10.w']
    """
    return sorted(names, key=lambda name: ([(int(p), "") if p.isdecimal() else (-1, p) for p in name.split(".")], name))


_INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_OUTPUT_HEADS = ("lm_head.weight", "embed_out.weight")


def embedding_and_head(names: Iterable[str]) -> tuple[str | None, str | None]:
    """Return the names of the input embedding and of the output head, the pair that a model may tie.

    Example:
        >>> embedding_and_head(["model.embed_tokens.weight", "model.norm.weight"])
        ('model.embed_tokens.weight', None)
    """
    ordered = sorted(names)
    embedding = next((name for name in ordered if name.endswith(_INPUT_EMBEDDINGS)), None)
    head = next((name for name in ordered if name.endswith(_OUTPUT_HEADS)), None)
    return embedding, head
