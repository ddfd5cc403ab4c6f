"""The language-modelling loss without the full table of logits.

A vocabulary of 49,152 and 2,048 tokens make 400 MB of float32 logits, which `transformers` holds several times over;
writing and reading them costs more time than the head's arithmetic. Here the head and the loss go through the tokens a
few hundred at a time and leave only the gradients behind: the same numbers, a quarter faster on a 135M model.
Models are not known here: `has_plain_head` says of one whether its logits are hidden states times a matrix at all.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

TOKENS_AT_ONCE = 1024
# Rows of the table that are turned into gradients together: few enough to stay in a CPU's cache.
_ROWS_AT_ONCE = 32
IGNORED = -100


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, count: Tensor | int) -> Tensor:
    """Return Σ −log softmax(hidden · weightᵀ)[target] / count, in float32, over the targets that are not −100.

    Args:
        hidden: [tokens, width], bfloat16 or float32.
        weight: [vocabulary, width], the matrix of the head.
        targets: [tokens], int64.
        count: what the sum is divided by, normally the number of targets in the whole batch.

    Example:
        >>> head_loss(torch.zeros(3, 2), torch.zeros(4, 2), torch.tensor([0, 3, -100]), 2).exp()
        tensor(4.)
    """
    return _HeadLoss.apply(hidden, weight, targets, count)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, count: Tensor | int) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        matrix = weight.to(dtype)
        hidden_gradient = torch.empty_like(hidden)
        # A head that is frozen (an adapter is trained) needs no gradient, which is half of the work here.
        trained = ctx.needs_input_grad[1]
        weight_gradient = None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            inputs = hidden[part].to(dtype)
            table = inputs @ matrix.T
            total += _turn_into_gradient(table, targets[part], count)
            hidden_gradient[part] = table @ matrix
            if trained:
                weight_gradient = _added(weight_gradient, table.T @ inputs, last=part.stop >= len(hidden))
        ctx.trained = trained
        ctx.save_for_backward(hidden_gradient, None if weight_gradient is None else weight_gradient.to(weight.dtype))
        return total / count

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[override]
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * upstream[0], weight_gradient * upstream[0] if ctx.trained else None, None, None


def _added(sum_so_far: Tensor | None, part: Tensor, *, last: bool) -> Tensor:
    """Return a sum in float32; where there is but one part, the part itself, which is the largest thing held here."""
    if sum_so_far is None:
        return part if last else part.float()
    return sum_so_far.add_(part)


def _turn_into_gradient(table: Tensor, targets: Tensor, count: Tensor | int) -> Tensor:
    """Overwrite [tokens, vocabulary] logits by (softmax − one-hot) / count, and return the summed loss, float32."""
    total = torch.zeros((), dtype=torch.float32, device=table.device)
    for start in range(0, len(table), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        counted = (targets[rows] != IGNORED).unsqueeze(-1).float()
        index = targets[rows].clamp(min=0).unsqueeze(-1)
        values = table[rows].float()
        highest = values.amax(dim=-1, keepdim=True)
        wanted = values.gather(1, index)
        sums = values.sub_(highest).exp_().sum(dim=-1, keepdim=True)
        total += ((sums.log() + highest - wanted) * counted).sum()
        values.mul_(counted / (sums * count)).scatter_add_(1, index, -counted / count)
        table[rows] = values
    return total


def use_head_loss(model: Any) -> None:
    """Let a causal model with a plain head compute its loss by `head_loss`; call it before the model is wrapped.

    The loss is computed where the head is called, so whoever shards or wraps the model sees the calls that it expects.
    """
    head = model.get_output_embeddings()
    whole, logits_of = model.forward, head.forward
    pending: list[tuple[Tensor, Tensor | int]] = []

    def head_forward(hidden: Tensor) -> Tensor:
        if not pending:
            return logits_of(hidden)
        return head_loss(hidden.flatten(0, 1), head.weight, *pending.pop())

    @functools.wraps(whole)
    def forward(*args: Any, labels: Any = None, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        if labels is None or num_items_in_batch is None:
            return whole(*args, labels=labels, **kwargs)
        given = {key: value for key, value in kwargs.items() if value is not None}
        hidden = model.base_model(*args, **{**given, "use_cache": False}).last_hidden_state
        # Token n predicts token n + 1.
        targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].reshape(-1)
        pending.append((targets, num_items_in_batch))
        return {"loss": head(hidden)}

    model.forward, head.forward = forward, head_forward


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Say whether a causal model's logits are exactly its last hidden states times its head's matrix.

    Models that add a bias, scale or cap their logits, or train a router beside, must keep their own loss.
    """
    head, body = model.get_output_embeddings(), model.base_model
    if not isinstance(head, nn.Linear) or body is model or getattr(model.config, "output_router_logits", False):
        return False
    ids = torch.arange(8, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    hidden = getattr(body(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hidden is None:
        return False
    return torch.equal(model(input_ids=ids, use_cache=False).logits, nn.functional.linear(hidden, head.weight))


@torch.no_grad()
def keeps_documents_apart(model: Any, rows: int = 1) -> bool:
    """Say whether restarting `position_ids` keep a model's attention within documents, by trying it on eight tokens.

    Args:
        model: a causal model.
        rows: how many rows it is given at a time; flash attention keeps documents apart in one row alone.
    """
    size = model.config.get_text_config().vocab_size
    positions = torch.arange(4, device=model.device).repeat(2).expand(rows, 8)
    first = torch.arange(rows * 8, device=model.device).view(rows, 8) % size
    second = first.clone()
    second[:, :4] = (first[:, :4] + size // 2) % size
    one, other = (
        model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 4:] for ids in (first, second)
    )
    return torch.equal(one, other)
