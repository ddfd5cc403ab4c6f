"""Which part of a language model a tensor belongs to, read off its name: the stack, the layer, attention, MLP, …

Works from the naming habits of decoders (Llama, Mistral, Qwen, Gemma, Phi, GPT-2, GPT-NeoX, OPT, Falcon, BLOOM), of
encoders (BERT, RoBERTa, CamemBERT, DistilBERT, DeBERTa, ELECTRA, ModernBERT) and of encoder–decoders (T5, BART). It
knows no shapes and no model classes; a name it cannot place is "other".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Kind = Literal["attention", "mlp", "embedding", "norm", "head", "other"]
# The kinds that recipes and studies can name; they do not overlap, and "other" is what they leave.
GROUPS: tuple[Kind, ...] = ("attention", "mlp", "embedding", "norm", "head")
Stack = Literal["encoder", "decoder"]

# The first number is the layer: T5 numbers the parts of a block too (`block.3.layer.1`).
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h)\.(\d+)\.")
_STACK = re.compile(r"(?:^|\.)(encoder|decoder)\.(?!weight$|bias$)")
# Norms come first: `post_attention_layernorm` is a norm, whatever it follows. Embeddings come before attention, but
# only by their own names: the word is also in `embed_out`, a head.
_KINDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("norm", re.compile(r"norm|(?:^|\.)ln_|(?:^|\.)ln\d|\.ln\.", re.IGNORECASE)),
    (
        "head",
        re.compile(
            r"(?:^|\.)(?:lm_head|embed_out|output_projection|score|cls|classifier|pre_classifier|qa_outputs|pooler|"
            r"vocab_transform|vocab_projector|vocab_layer_norm|generator_lm_head|generator_predictions|"
            r"discriminator_predictions|predictions|entity_predictions|pred_layer)\.|^(?:head|decoder)\.(?:dense\.)?(?:weight|bias)$|final_logits_bias$"
        ),
    ),
    ("embedding", re.compile(r"embed|(?:^|\.)(?:wte|wpe|shared)\.")),
    ("attention", re.compile(r"att(?:n|ention)|(?:^|\.)(?:[qkvo]_proj|query_key_value|qkv_proj)\.", re.IGNORECASE)),
    (
        "mlp",
        re.compile(
            r"mlp|feed_forward|ffn|experts|moe|DenseReluDense|"
            r"(?:^|\.)(?:fc\d?|fc_in|fc_out|w[123]|dense_\w+|intermediate\.dense|\d+\.output\.dense)\."
        ),
    ),
)


@dataclass(frozen=True)
class TensorGroup:
    """Where a tensor sits: its layer (0-based, None outside the stack), its kind, and which stack its name states.

    `stack` keeps the two halves of an encoder–decoder apart, whose layers are both counted from 0; most decoders do not
    name theirs, and then it is None.
    """

    layer: int | None
    kind: Kind
    stack: Stack | None = None


@lru_cache(maxsize=1 << 16)  # a plan asks for the same few hundred names again and again
def tensor_group(name: str) -> TensorGroup:
    """Return the layer, kind and stack that a tensor's name states.

    Example:
        >>> tensor_group("model.layers.11.self_attn.q_proj.weight")
        TensorGroup(layer=11, kind='attention', stack=None)
        >>> tensor_group("decoder.block.3.layer.1.EncDecAttention.q.weight")
        TensorGroup(layer=3, kind='attention', stack='decoder')
    """
    layer = _LAYER.search(name)
    stack = _STACK.search(name)
    kind: Kind = next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")
    return TensorGroup(int(layer.group(1)) if layer else None, kind, stack.group(1) if stack else None)  # type: ignore[arg-type]


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


# In order of preference: where an encoder–decoder shares one table, `shared` is the name that files store it under.
_INPUT_EMBEDDINGS = (
    "shared.weight",
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
    "embeddings.weight",
    "word_embedding.weight",
    "tokens_embed.weight",
    "input_embedding.weight",
)
_OUTPUT_HEADS = (
    "lm_head.weight",
    "embed_out.weight",
    "predictions.decoder.weight",
    "lm_head.decoder.weight",
    "vocab_projector.weight",
    "pred_layer.proj.weight",
)
# Second names of one parameter, whatever the configuration says of the head: (second name, name in files).
_ALWAYS_ONE = (
    ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ("lm_head.decoder.bias", "lm_head.bias"),
    ("encoder.embed_tokens.weight", "shared.weight"),
    ("decoder.embed_tokens.weight", "shared.weight"),
)


def embedding_and_head(names: Iterable[str]) -> tuple[str | None, str | None]:
    """Return the names of the input embedding and of the output head, the pair that a model may tie.

    Example:
        >>> embedding_and_head(["model.embed_tokens.weight", "model.norm.weight"])
        ('model.embed_tokens.weight', None)
    """
    ordered = sorted(names)
    embedding = next((name for ending in _INPUT_EMBEDDINGS for name in ordered if _ends_with(name, ending)), None)
    head = next(
        (name for name in ordered if name == "decoder.weight" or any(_ends_with(name, end) for end in _OUTPUT_HEADS)),
        None,
    )
    return embedding, head


def _ends_with(name: str, ending: str) -> bool:
    """Say whether a name ends with these parts, and not only with these letters."""
    return name == ending or name.endswith("." + ending)


# Beside embedding and head these have an entry for each token; of BART's the tokens are the second dimension.
_VOCABULARY_BIASES = (
    "predictions.bias",
    "predictions.decoder.bias",
    "pred_layer.proj.bias",
    "generator_lm_head.bias",
    "lm_head.bias",
    "lm_head.decoder.bias",
    "embed_out.bias",
    "vocab_projector.bias",
)


def vocabulary_axis(name: str) -> int | None:
    """Return the dimension of a tensor that counts the tokens, or None for one that has no place for each token.

    Example:
        >>> vocabulary_axis("model.embed_tokens.weight"), vocabulary_axis("final_logits_bias"), vocabulary_axis("norm")
        (0, 1, None)
    """
    if name.endswith("final_logits_bias"):
        return 1
    per_token = (*_INPUT_EMBEDDINGS, *_OUTPUT_HEADS, *_VOCABULARY_BIASES)
    found = name in ("decoder.weight", "decoder.bias") or any(_ends_with(name, end) for end in per_token)
    return 0 if found else None


def second_names(names: Iterable[str]) -> dict[str, str]:
    """Return second name → first, for the pairs among `names` that every model class keeps as one parameter.

    Example:
        >>> second_names(["shared.weight", "encoder.embed_tokens.weight"])
        {'encoder.embed_tokens.weight': 'shared.weight'}
    """
    given = set(names)
    found = {}
    for name in sorted(given):
        for second, first in _ALWAYS_ONE:
            owner = name.removesuffix(second) + first
            if name.endswith(second) and owner in given:
                found[name] = owner
    return found
