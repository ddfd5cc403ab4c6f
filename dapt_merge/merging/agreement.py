"""Do these checkpoints belong to one merge, and which tensors does it have?

Averaging two models that differ in more than their weights gives numbers and no sense; here such inputs are refused,
with both values named. A head that one checkpoint ties to its embedding, another stores as a copy of it, is reconciled
(one that another has trained on its own: see `tying`); tables that hold no training, and poolers that only some files
keep, are left out and reported.
What this module does not know: recipes and methods.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dapt_merge.checkpoints.checkpoint import Checkpoint, TensorInfo, config_value
from dapt_merge.checkpoints.groups import embedding_and_head
from dapt_merge.checkpoints.tying import same_bytes
from dapt_merge.checkpoints.vocabulary import check_same_vocabulary
from dapt_merge.errors import InputError, nearest

# (name in messages, the keys that model families use for it)
_MUST_AGREE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("model_type", ("model_type",)),
    ("vocab_size", ("vocab_size",)),
    ("hidden_size", ("hidden_size", "n_embd", "d_model")),
    ("num_hidden_layers", ("num_hidden_layers", "n_layer", "n_layers", "num_layers")),
    ("num_decoder_layers", ("num_decoder_layers", "decoder_layers")),
    ("num_attention_heads", ("num_attention_heads", "n_head", "n_heads", "num_heads")),
    ("num_key_value_heads", ("num_key_value_heads", "num_kv_heads")),
    ("head_dim", ("head_dim", "d_kv")),
    ("intermediate_size", ("intermediate_size", "n_inner", "ffn_dim", "d_ff")),
    ("hidden_act", ("hidden_act", "activation_function", "hidden_activation")),
    (
        "norm_eps",
        ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps", "norm_epsilon"),
    ),
    ("num_experts", ("num_local_experts", "num_experts", "n_routed_experts")),
    ("num_experts_per_tok", ("num_experts_per_tok", "moe_topk")),
    ("attn_logit_softcapping", ("attn_logit_softcapping",)),
    ("final_logit_softcapping", ("final_logit_softcapping",)),
    ("partial_rotary_factor", ("partial_rotary_factor", "rotary_pct")),
    ("position_embedding_type", ("position_embedding_type",)),
)
# Position tables and masks that old files store and new ones recompute: they carry no training. The masks of GPT-2 and
# GPT-NeoX are told from a bias by their four dimensions.
_RECOMPUTED = re.compile(
    r"(?:^|\.)(?:rotary_emb\.inv_freq|rotary_emb\.(?:cos|sin)_cached|embeddings\.(?:position_ids|token_type_ids)|"
    r"(?:attn|attention)\.masked_bias)$"
)
_MASK = re.compile(r"(?:^|\.)(?:attn|attention)\.bias$")
# Parts that pre-training used beside the language model; a file from a class without them lacks nothing.
_NAMED = 5
_SIDE_PARTS = re.compile(r"(?:^|\.)(?:pooler|cls\.seq_relationship)\.")


@dataclass(frozen=True)
class Agreement:
    """The tensors that all inputs share, in natural order, and what the report has to say about the others.

    `tied_head` is a head that only some inputs store, as a copy of the embedding: the merge ties it.
    """

    names: tuple[str, ...]
    warnings: tuple[str, ...]
    tied_head: str | None = None


def agree(checkpoints: Sequence[Checkpoint], *, by_layer: bool = False, allow_mismatch: bool = False) -> Agreement:
    """Check that the checkpoints can be merged; the first is the one that the others are held against.

    Args:
        checkpoints: the inputs, one or more.
        by_layer: single layers will be picked from them: they may differ in how many they have, and only the picked
            tensors are compared, by whoever picks them.
        allow_mismatch: report configurations that differ instead of refusing them; tensors still have to fit.

    Raises:
        InputError: configurations, vocabularies, tensor names or shapes differ; both values are named.
    """
    first, others = checkpoints[0], checkpoints[1:]
    warnings: list[str] = []
    for other in others:
        try:
            _check_configs(first, other, () if not by_layer else ("num_hidden_layers",))
        except InputError as error:
            if not allow_mismatch:
                raise
            warnings.append(f"{error.what} (allowed by allow_config_mismatch)")
        warning = check_same_vocabulary(first, other)
        if warning is not None:
            warnings.append(warning)
    tied_head, tie_warnings = _tied_head(checkpoints)
    warnings += tie_warnings
    ignored, more_warnings = _left_out(checkpoints)
    warnings += more_warnings
    if tied_head:
        ignored.add(tied_head)
    names = tuple(name for name in first.tensors if name not in ignored)
    for other in () if by_layer else others:
        _check_tensors(first, other, ignored)
    return Agreement(names, tuple(warnings), tied_head)


def is_side_part(name: str) -> bool:
    """Say whether a tensor belongs to a part that a language model runs without: a pooler, a sentence-pair head."""
    return _SIDE_PARTS.search(name) is not None


def _left_out(checkpoints: Sequence[Checkpoint]) -> tuple[set[str], list[str]]:
    """Return the tensors that the merge does without, and what the report says of them."""
    tables = sorted({name for c in checkpoints for name, info in c.tensors.items() if _is_recomputed(name, info)})
    stored = [{name for name in c.tensors if is_side_part(name)} for c in checkpoints]
    side = sorted(set[str]().union(*stored) - stored[0].intersection(*stored))
    warnings = []
    if tables:
        warnings.append(f"{len(tables)} position tables or masks ({tables[0]}, …) hold no training and are left out")
    if side:
        having = ", ".join(c.label for c, names in zip(checkpoints, stored, strict=True) if names.issuperset(side))
        warnings.append(f"{', '.join(side)}: only in {having or 'some of the checkpoints'}, and left out of the merge")
    return {*tables, *side}, warnings


def _is_recomputed(name: str, info: TensorInfo) -> bool:
    is_mask = _MASK.search(name) is not None and len(info.shape) == 4 and info.shape[:2] == (1, 1)
    return is_mask or _RECOMPUTED.search(name) is not None


def _check_configs(first: Checkpoint, other: Checkpoint, free: Sequence[str]) -> None:
    stated = [(key, keys) for key, keys in _MUST_AGREE if key not in free]
    pairs = [
        (_own_word(first, key, keys), config_value(first.config, *keys), config_value(other.config, *keys))
        for key, keys in stated
    ]
    rope, other_rope = _rope(first.config), _rope(other.config)
    if rope and other_rope:
        pairs += [(key, rope.get(key), other_rope.get(key)) for key in sorted(rope.keys() | other_rope.keys())]
    for key, value, other_value in pairs:
        if value is not None and other_value is not None and value != other_value:
            if key == "vocab_size":
                check_same_vocabulary(first, other)  # where tokens differ, they say more than a number of rows
            raise InputError(
                f"{key} is {value} in {first.label} and {other_value} in {other.label}",
                where=f"config.json of {other.label}",
                remedy="Write 'tokenizer_source: base' (or union) into the recipe: rows are then aligned by token."
                if key == "vocab_size"
                else "Merge checkpoints of one model: the base, and what was trained from it. Where you know that"
                " the difference does not matter, set 'allow_config_mismatch: true' in the recipe.",
            )


def _own_word(checkpoint: Checkpoint, name: str, keys: Sequence[str]) -> str:
    """Return the key that the checkpoint's config.json itself uses for a setting."""
    return next((key for key in keys if config_value(checkpoint.config, key) is not None), name)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings, whichever of the two layouts of config.json states them."""
    stated: dict[str, Any] = {"rope_type": "default"}
    theta = config_value(config, "rope_theta")
    if theta is not None:
        stated["rope_theta"] = float(theta)
    for key in ("rope_scaling", "rope_parameters"):
        block = config_value(config, key)
        if isinstance(block, Mapping):
            stated |= {("rope_type" if k == "type" else k): v for k, v in block.items() if v is not None}
    return stated if len(stated) > 1 else {}


def _tied_head(checkpoints: Sequence[Checkpoint]) -> tuple[str | None, list[str]]:
    """Return the head that some store as a copy and others tie, after looking at the bytes of the stored ones."""
    pairs = [(checkpoint, *embedding_and_head(checkpoint.tensors)) for checkpoint in checkpoints]
    for checkpoint in checkpoints:
        for head, embedding in checkpoint.aliases.items():
            if not same_bytes(checkpoint, head, embedding):
                raise _tie_contradicted(checkpoint, head, embedding)
    stored = [(checkpoint, embedding, head) for checkpoint, embedding, head in pairs if embedding and head]
    if not stored or len(stored) == len(checkpoints):
        return None, []
    copies = [checkpoint for checkpoint, embedding, head in stored if same_bytes(checkpoint, head, embedding)]
    if len(copies) < len(stored):
        return None, []
    head, labels = stored[0][2], ", ".join(checkpoint.label for checkpoint in copies)
    return head, [f"{head} is a copy of the embedding in {labels} and tied in the others; it is merged as tied"]


def _tie_contradicted(checkpoint: Checkpoint, head: str, embedding: str) -> InputError:
    return InputError(
        f"{head} is tied to {embedding} by config.json or by the model's class, but the stored tensors differ",
        where=checkpoint.label,
        remedy="Set tie_word_embeddings to false there if the head was trained on its own, or save the model again.",
    )


def _check_tensors(first: Checkpoint, other: Checkpoint, ignored: set[str]) -> None:
    for one, two in ((first, other), (other, first)):
        missing = [name for name in one.tensors if name not in two.tensors and name not in ignored]
        if missing:
            named = ", ".join(f"'{name}'" for name in missing[:_NAMED]) + ", …" * (len(missing) > _NAMED)
            raise InputError(
                f"{len(missing)} tensors of {one.label} are not in {two.label}: {named}."
                f"{nearest(missing[0], tuple(two.tensors))}",
                where=two.label,
                remedy="Merge checkpoints of one architecture, saved from the same model class.",
            )
    for name, info in first.tensors.items():
        found = other.tensors.get(name)
        if found is None or name in ignored:
            continue
        if found.shape != info.shape or found.dtype.is_floating_point != info.dtype.is_floating_point:
            raise InputError(
                f"'{name}' is {info.dtype} {info.shape} in {first.label}, {found.dtype} {found.shape} in {other.label}",
                where=other.label,
                remedy="Merge checkpoints of one architecture and one vocabulary.",
            )
