"""Attention document by document, where a row holds several of them.

A packed row's mask hides most of what attention would look at: ten documents of fifty tokens need a tenth of the
products that five hundred tokens in a row do. torch's attention on a CPU computes all of them and throws most away;
here each document is attended to by itself. It computes in float32, which at this size is faster on a CPU than
bfloat16, and no less exact. Which tokens belong together is read off the mask that transformers made, so any other mask
(a sliding window, padding) is left to transformers; so are accelerators, whose kernels want one large call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_by_document"
_LENGTHS = "document_lengths"


def use_document_attention(model: Any) -> None:
    """Let a model that calls torch's attention (`sdpa`) call it for each document; other models stay as they are."""
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)


def document_lengths(mask: Tensor) -> list[int] | None:
    """Return the lengths of the documents in all rows, one row after the other, or None for any other mask.

    Args:
        mask: [rows, 1, tokens, tokens], bool: which token (third) attends to which (fourth).

    Example:
        >>> apart = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).tril().bool()
        >>> document_lengths(apart.view(1, 1, 5, 5))
        [2, 3]
        >>> document_lengths(apart.roll(1, 0).view(1, 1, 5, 5)) is None
        True
    """
    rows, _, tokens, seen = mask.shape
    if mask.dtype != torch.bool or tokens != seen:
        return None
    place = torch.arange(tokens, device=mask.device)
    # The first token that each one attends to: where its document starts, if these are documents.
    first = mask[:, 0].int().argmax(-1)
    starts = first == place
    starting_at = torch.where(starts, place, 0).cummax(-1).values
    causal = (place[:, None] >= place) & (place >= first[..., None])
    if not (torch.equal(first, starting_at) and torch.equal(mask[:, 0], causal)):
        return None
    edges = torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([rows * tokens], device=mask.device)])
    return edges.diff().tolist()


def by_document(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float | None) -> Tensor:
    """Return softmax(q·kᵀ · scale)·v, each token attending to its own document up to itself.

    Args:
        query: [rows, heads, tokens, width].
        key: [rows, key heads, tokens, width]; the key heads divide the heads.
        value: as `key`.
        lengths: what `document_lengths` returned; all rows' tokens together.
        scale: None is 1/√width.

    Returns:
        [rows, tokens, heads, width] in the values' dtype.
    """
    rows, heads, tokens, _ = query.shape
    grouped = key.shape[1] != heads
    # Split in one go: a slice for each document would cost a whole tensor of zeros for its gradient.
    queries, keys, values = (_by_token(part).split(lengths) for part in (query, key, value))
    attended = []
    with torch.autocast(query.device.type, enabled=False):
        for parts in zip(queries, keys, values, strict=True):
            q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in parts)
            found = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
            attended.append(found[0].transpose(0, 1))
    return torch.cat(attended).view(rows, tokens, heads, -1).to(value.dtype)


def _by_token(part: Tensor) -> Tensor:
    """Return [rows, heads, tokens, width] as [all tokens, heads, width], float32."""
    return part.transpose(1, 2).flatten(0, 1).float()


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    mask = sdpa_mask(*args, **kwargs)
    if mask is not None and mask.device.type == "cpu":
        setattr(mask, _LENGTHS, document_lengths(mask))
    return mask


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    lengths = getattr(attention_mask, _LENGTHS, None)
    special = dropout > 0 or any(kwargs.get(key) is not None for key in ("position_bias", "softcap", "cache"))
    if lengths is None or special:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return by_document(query, key, value, lengths, scaling), None
