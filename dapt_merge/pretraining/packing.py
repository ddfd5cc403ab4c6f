"""Packing: documents of any length, laid end to end into blocks of one length, none of their tokens lost.

A role's documents form an endless stream: every epoch in another seeded order, the end of one epoch joined to the
start of the next, so no tail is dropped and no padding is trained on. Block i of a run is a function of the seed and i
alone, which is what makes a killed run go on exactly. Roles are mixed by whole blocks, as evenly as the share allows.
Files and tokenizers are not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dapt_merge.pretraining.corpus import TokenisedCorpus

_ROLES = ("domain", "replay")


class DocumentStream:
    """The documents of one role as an endless stream of tokens, in a seeded order that changes every epoch."""

    def __init__(self, corpora: Sequence[TokenisedCorpus], role: str, seed: int) -> None:
        self._corpora = list(corpora)
        self._lengths = np.concatenate([corpus.lengths for corpus in corpora])
        self._first = np.cumsum([0, *(corpus.documents for corpus in corpora)])
        self._key = (seed, _ROLES.index(role))
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None
        self.documents = len(self._lengths)
        self.tokens_per_epoch = int(self._lengths.sum())

    def window(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `length` tokens of the stream from position `start` on.

        Returns:
            The token ids, int64, and each one's position within its document, counted from the start of the window
            for a document that began before it.
        """
        ids = np.empty(length, dtype=np.int64)
        positions = np.empty(length, dtype=np.int64)
        filled = 0
        while filled < length:
            epoch, offset = divmod(start + filled, self.tokens_per_epoch)
            order, ends = self._epoch(epoch)
            place = int(np.searchsorted(ends, offset, side="right"))
            document = self._document(int(order[place]))
            rest = document[len(document) - (int(ends[place]) - offset) :][: length - filled]
            ids[filled : filled + len(rest)] = rest
            positions[filled : filled + len(rest)] = np.arange(len(rest))
            filled += len(rest)
        return ids, positions

    def _document(self, index: int) -> np.ndarray:
        corpus = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._corpora[corpus].document(index - int(self._first[corpus]))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an epoch's order of documents, and where each of them ends."""
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([*self._key, epoch]).permutation(self.documents)
            self._order = (epoch, order, np.cumsum(self._lengths[order]))
        return self._order[1:]


@dataclass(frozen=True)
class MixReport:
    """What a run reads: counts of tokens and documents by role, in the words of the run's report."""

    steps: int
    tokens: int
    domain_tokens: int
    replay_tokens: int
    domain_epochs: float
    replay_epochs: float
    domain_tokens_never_read: int
    replay_tokens_never_read: int
    domain_documents: int
    replay_documents: int
    documents_longer_than_a_block: int
    empty_documents_skipped: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


class PackedBlocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The blocks of a run, in training order; `blocks[i]` holds `input_ids` and `labels`, int64 [sequence_length].

    With `keep_documents_apart` there are `position_ids` too, which start again at 0 in every document: transformers
    keeps attention within a document by them, and the first token of a document is no target, for nothing before it
    could tell it.

    Args:
        domain: the stream of domain documents.
        replay: the stream of replay documents, or None.
        replay_share: the share of blocks that are replay, 0 ≤ share < 1.
        sequence_length: tokens in a block.
        count: how many blocks the run has.
        keep_documents_apart: see above.
    """

    def __init__(
        self,
        domain: DocumentStream,
        replay: DocumentStream | None,
        *,
        replay_share: float,
        sequence_length: int,
        count: int,
        keep_documents_apart: bool = True,
    ) -> None:
        self._streams = {"domain": domain, "replay": replay}
        self._share = as_fraction(replay_share)
        self._length = sequence_length
        self._count = count
        self._apart = keep_documents_apart

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        role, place = self.role(index)
        stream = self._streams[role]
        assert stream is not None
        ids, positions = stream.window(place * self._length, self._length)
        if not self._apart:
            return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(ids.copy())}
        labels = np.where(positions == 0, -100, ids)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
        }

    def role(self, index: int) -> tuple[str, int]:
        """Return the role of a block, and its number among the blocks of that role."""
        before, after = self.replay_blocks(index), self.replay_blocks(index + 1)
        return ("replay", before) if after > before else ("domain", index - before)

    def tokens_by_role(self, blocks: int) -> dict[str, int]:
        """Return how many tokens of the first `blocks` blocks are domain and how many are replay."""
        replay = self.replay_blocks(blocks) * self._length
        return {"domain": blocks * self._length - replay, "replay": replay}

    def replay_blocks(self, count: int) -> int:
        """Return how many of the first `count` blocks are replay: ⌊count · share⌋."""
        return int(count * self._share)


def as_fraction(share: float) -> Fraction:
    """Return the decimal number that was written, exactly: 0.1 is one tenth here."""
    return Fraction(repr(share))


def plan_steps(
    *, tokens: int | None, epochs: float | None, domain_tokens: int, replay_share: float, tokens_per_step: int
) -> int:
    """Return the number of optimizer steps of a budget, rounded up to whole steps.

    `epochs` counts passes over the domain tokens, to which replay comes on top: tokens = epochs · domain / (1 − share).

    Example:
        >>> plan_steps(tokens=80_000, epochs=None, domain_tokens=1, replay_share=0.0, tokens_per_step=2048)
        40
    """
    if tokens is None:
        assert epochs is not None
        return ceil(as_fraction(epochs) * domain_tokens / (1 - as_fraction(replay_share)) / tokens_per_step)
    return ceil(tokens / tokens_per_step)


def report_mix(
    domain: Sequence[TokenisedCorpus],
    replay: Sequence[TokenisedCorpus],
    *,
    replay_share: float,
    steps: int,
    batch_sequences: int,
    sequence_length: int,
) -> MixReport:
    """Count what a run of `steps` steps reads of each role, and what it leaves unread."""
    blocks = steps * batch_sequences
    replay_read = int(blocks * as_fraction(replay_share)) * sequence_length
    domain_read = blocks * sequence_length - replay_read
    held = {"domain": sum(c.tokens for c in domain), "replay": sum(c.tokens for c in replay)}
    return MixReport(
        steps=steps,
        tokens=blocks * sequence_length,
        domain_tokens=domain_read,
        replay_tokens=replay_read,
        domain_epochs=domain_read / held["domain"],
        replay_epochs=replay_read / held["replay"] if replay else 0.0,
        domain_tokens_never_read=max(0, held["domain"] - domain_read),
        replay_tokens_never_read=max(0, held["replay"] - replay_read),
        domain_documents=sum(c.documents for c in domain),
        replay_documents=sum(c.documents for c in replay),
        documents_longer_than_a_block=sum(int((c.lengths > sequence_length).sum()) for c in [*domain, *replay]),
        empty_documents_skipped=sum(c.empty_documents for c in [*domain, *replay]),
    )
