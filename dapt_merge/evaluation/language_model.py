"""lm-eval's Hugging Face model, with forward passes that compute nothing twice and nothing that is not scored.

The idea: requests, tokenisation, rolling windows and metrics are lm-eval's; only the batching of token sequences is
replaced, because a search scores the same items hundreds of times.

- Options of one question share their context in one row: `context option₁ option₂ …`, with an attention mask that lets
  an option see the context and itself, and with positions that continue the context's. lm-eval runs the context once
  for every option.
- Rows are batched by length over all documents, also for rolling log-likelihood, where lm-eval batches in file order.
- Logits are computed at the scored positions only, where the model's forward knows `logits_to_keep`, and the float32
  log-softmax is taken in blocks that stay in the processor's cache.

Packing needs a model that honours a 4-D attention mask and explicit positions; whether it does is measured on a probe
before the first use, not read from a list of architectures. Otherwise every option is its own row.
What this module does not know: tasks, metrics, stores.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

# Positions whose float32 logits are held at once: 32 × 49,152 × 4 bytes = 6 MB.
_POSITIONS_PER_BLOCK = 32

# What one more forward pass costs beside its tokens, in tokens: reading the weights once on a processor (measured on
# two cores, 135M parameters), launching the kernels on a GPU.
_PASS_COST_CPU = 32
_PASS_COST_GPU = 4096


@dataclass
class Row:
    """One sequence of a batch: a context and the continuations that are scored after it.

    `branches` maps a continuation to the indices of the requests that ask for it.
    """

    context: tuple[int, ...]
    branches: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        """Input tokens: the context, then each continuation without its last token, which predicts nothing."""
        return [*self.context, *(token for branch in self.branches for token in branch[:-1])]

    def __len__(self) -> int:
        return len(self.context) + sum(len(branch) - 1 for branch in self.branches)


class PackedLM(HFLM):
    """`HFLM` over a model in memory, causal, with softmax in float32.

    Args:
        model: a causal language model; its current weights are used at every call.
        tokenizer: its tokenizer; a copy is used, because lm-eval sets its padding token.
        batch_size: rows in one forward pass.
        max_length: longest sequence in tokens; None takes the model's.

    `on_batch(done, total)` is called after every batch with the requests answered so far and in all. `truncated` counts
    the requests that were cut on the left since it was last set to zero, `forward_tokens` the tokens that went through
    the model, padding included.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 8, max_length: int | None = None) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
            softmax_dtype="float32",
        )
        self.on_batch: Callable[[int, int], None] | None = None
        self.truncated = 0
        self.forward_tokens = 0
        self._encodings: dict[tuple[Any, ...], list[int]] = {}
        self._packs: bool | None = None
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokenize as lm-eval does, once for each text: the same requests are scored again and again."""
        key = (string, add_special_tokens, left_truncate_len, *sorted(kwargs.items()))
        if key not in self._encodings:
            self._encodings[key] = super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        return self._encodings[key]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Sum of log-likelihoods (nats) over lm-eval's disjoint windows of each text, all windows batched together."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in rolling:
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += nats
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) and greediness of each request's continuation, in the order of the requests."""
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        rows = sorted(self._rows(requests), key=lambda row: (-len(row), row.context, tuple(row.branches)))
        answered = 0
        pass_cost = _PASS_COST_CPU if self.device.type == "cpu" else _PASS_COST_GPU
        for batch in _batches(rows, int(self.batch_size), pass_cost):
            for row, scores in zip(batch, self._score(batch), strict=True):
                for indices, answer in zip(row.branches.values(), scores, strict=True):
                    answered += len(indices)
                    for index in indices:
                        answers[index] = answer
            if self.on_batch is not None:
                self.on_batch(answered, len(requests))
        return answers

    def _rows(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[Row]:
        """Group the requests by context where the model packs; requests that must be cut are rows of their own."""
        rows: list[Row] = []
        shared: dict[tuple[int, ...], Row] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(f"a continuation has {len(continuation)} tokens, expected 1 to {self.max_length}")
            branch = tuple(continuation)
            excess = len(context) + len(branch) - (self.max_length + 1)
            if excess > 0:
                self.truncated += 1
                context = context[excess:]
            key = tuple(context)
            row = shared.get(key)
            if row is None or (branch not in row.branches and not (self._can_pack(row, branch))):
                row = Row(key)
                rows.append(row)
                shared[key] = row
            row.branches.setdefault(branch, []).append(index)
        return rows

    def _can_pack(self, row: Row, branch: tuple[int, ...]) -> bool:
        # A one-token continuation is read off the context's last position: it needs no mask, on any architecture.
        if sum(len(other) > 1 for other in (*row.branches, branch)) <= 1:
            return True
        # A context shorter than what follows it (the one prefix token of a rolling window) is not worth a longer row.
        if len(branch) > len(row.context) or len(row) + len(branch) > self.max_length:
            return False
        window = getattr(self.config, "sliding_window", None)
        if window is not None and len(row) + len(branch) > window:
            return False
        if self._packs is None:
            self._packs = self._probe_packing()
        return self._packs

    def _probe_packing(self) -> bool:
        """Whether a packed option's logits are those of the lone option rather than those of options run together."""
        if getattr(self.config, "_attn_implementation", None) not in ("sdpa", "eager"):
            return False
        last = int(self.config.get_text_config().vocab_size) - 1
        context, first, second = (
            tuple(token % last for token in tokens) for tokens in ((5, 17, 3), (29, 11, 7), (13, 2))
        )
        packed = Row(context, {first: [0], second: [1]})
        try:
            packed_logits = self._forward([packed])[0, -1].float()
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
            return False
        lone_logits = self._forward([Row(context, {second: [0]})])[0, -1].float()
        leaking_logits = self._forward([Row(context, {(*first[:-1], *second): [0]})])[0, -1].float()
        leak = torch.linalg.vector_norm(leaking_logits - lone_logits)
        return bool(torch.linalg.vector_norm(packed_logits - lone_logits) < 0.25 * leak)

    def _forward(self, batch: Sequence[Row], keep: Tensor | None = None) -> Tensor:
        """Logits of a right-padded batch, shape (rows, kept positions, vocabulary), in the model's dtype.

        Without a mask, padding on the right cannot reach the tokens before it.
        """
        width = max(len(row) for row in batch)
        tokens = torch.tensor([row.tokens + [0] * (width - len(row)) for row in batch], device=self.device)
        arguments: dict[str, Any] = {} if keep is None else {"logits_to_keep": keep}
        if any(len(row) > len(row.context) + max(map(len, row.branches)) - 1 for row in batch):
            mask, positions = _packing(batch, width)
            floor = torch.finfo(self.model.dtype).min
            additive = torch.zeros(mask.shape, dtype=self.model.dtype).masked_fill_(~mask, floor)
            arguments |= {"attention_mask": additive.to(self.device), "position_ids": positions.to(self.device)}
        self.forward_tokens += tokens.numel()
        with torch.no_grad():
            return self.model(tokens, use_cache=False, **arguments).logits

    def _score(self, batch: Sequence[Row]) -> list[list[tuple[float, bool]]]:
        """Answers of each row's branches."""
        wanted = [[_positions(row, number) for number in range(len(row.branches))] for row in batch]
        union = sorted({position for row in wanted for branch in row for position in branch})
        width = max(len(row) for row in batch)
        keep = torch.tensor(union, device=self.device) if self._keeps_logits and len(union) < width else None
        logits = self._forward(batch, keep)
        place = {position: index for index, position in enumerate(union)} if keep is not None else None
        answers: list[list[tuple[float, bool]]] = []
        for row_logits, row, branches in zip(logits, batch, wanted, strict=True):
            flat = [position if place is None else place[position] for branch in branches for position in branch]
            targets = torch.tensor([token for branch in row.branches for token in branch], device=self.device)
            nats, greedy = _target_scores(row_logits, flat, targets)
            lengths = [len(branch) for branch in row.branches]
            answers.append(
                [
                    (float(part.sum()), bool(hit.all()))
                    for part, hit in zip(nats.split(lengths), greedy.split(lengths), strict=True)
                ]
            )
        return answers


def _batches(rows: Sequence[Row], batch_size: int, pass_cost: int) -> Iterator[Sequence[Row]]:
    """Cut rows, longest first, into batches of at most `batch_size` that cost least: padded tokens plus passes.

    Dynamic programming over the cuts; `cost[i]` is the least cost of the rows from i on.
    """
    cost = [0] * (len(rows) + 1)
    stop = [0] * len(rows)
    for start in reversed(range(len(rows))):
        choices = range(start + 1, min(start + batch_size, len(rows)) + 1)
        width = len(rows[start])
        cost[start], stop[start] = min((pass_cost + width * (end - start) + cost[end], end) for end in choices)
    start = 0
    while start < len(rows):
        yield rows[start : stop[start]]
        start = stop[start]


def _positions(row: Row, number: int) -> list[int]:
    """Input positions whose logits predict the tokens of one branch: the context's last, then the branch's own."""
    lengths = [len(branch) for branch in row.branches]
    start = len(row.context) + sum(length - 1 for length in lengths[:number])
    return [len(row.context) - 1, *range(start, start + lengths[number] - 1)]


def _packing(batch: Sequence[Row], width: int) -> tuple[Tensor, Tensor]:
    """Attention mask (rows, 1, width, width; True attends) and position ids (rows, width) of packed rows.

    A token attends to earlier tokens of the context and of its own branch. Padding is a branch of its own.
    """
    branch_of = torch.full((len(batch), width), -1)
    positions = torch.zeros((len(batch), width), dtype=torch.long)
    for index, row in enumerate(batch):
        start = len(row.context)
        branch_of[index, :start] = 0
        positions[index, :start] = torch.arange(start)
        for number, branch in enumerate(row.branches, start=1):
            stop = start + len(branch) - 1
            branch_of[index, start:stop] = number
            positions[index, start:stop] = len(row.context) + torch.arange(stop - start)
            start = stop
    earlier = torch.ones(width, width, dtype=torch.bool).tril()
    same = branch_of[:, :, None] == branch_of[:, None, :]
    from_context = (branch_of == 0)[:, None, :]
    return (earlier & (same | from_context))[:, None], positions


def _target_scores(logits: Tensor, positions: Sequence[int], targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability (float64, nats) of each target at its position, and whether it is the most probable token.

    Args:
        logits: shape (positions, vocabulary), any float dtype.
        positions: row of `logits` for each target.
        targets: token ids, shape (targets,).
    """
    nats: list[Tensor] = []
    greedy: list[Tensor] = []
    for block, wanted in _blocks(positions, targets):
        values = logits[block].float()
        highest = values.amax(-1, keepdim=True)
        chosen = values.gather(-1, wanted[:, None])
        greedy.append((chosen == highest)[:, 0] & (values.argmax(-1) == wanted))
        normaliser = (values - highest).exp_().sum(-1, keepdim=True).log_() + highest
        nats.append((chosen - normaliser)[:, 0].double())
    return torch.cat(nats), torch.cat(greedy)


def _blocks(positions: Sequence[int], targets: Tensor) -> Iterable[tuple[Any, Tensor]]:
    """Cut into blocks of positions; a run of neighbours becomes a slice, which copies nothing."""
    for start in range(0, len(positions), _POSITIONS_PER_BLOCK):
        block = list(positions[start : start + _POSITIONS_PER_BLOCK])
        run = block == list(range(block[0], block[0] + len(block)))
        yield (slice(block[0], block[0] + len(block)) if run else block), targets[start : start + len(block)]
