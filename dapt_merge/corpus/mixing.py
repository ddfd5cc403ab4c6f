"""How many tokens each source gives: shares of tokens, never of documents, resolved to whole numbers.

Documents of one source can be a hundred times longer than those of another, so a share of documents says nothing about
what a model reads. Here the budget is split first between domain and replay, then among the sources of a role by
weight or share, down to the token; how often that reads each source follows. Token ids are not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import numpy as np

from dapt_merge.corpus.config import ROLES, CorpusConfig, CorpusSource, Role


@dataclass(frozen=True)
class Mix:
    """A budget, resolved.

    Attributes:
        rows: rows in all.
        tokens: of each source, in the order of the configuration; together rows × sequence_length.
        held: the tokens that each source has.
    """

    rows: int
    tokens: tuple[int, ...]
    held: tuple[int, ...]

    @property
    def epochs(self) -> tuple[float, ...]:
        """How often each source is read."""
        return tuple(read / held for read, held in zip(self.tokens, self.held, strict=True))


def as_fraction(share: float) -> Fraction:
    """Return the decimal number that was written, exactly: 0.1 is one tenth here."""
    return Fraction(repr(share))


def resolve_mix(config: CorpusConfig, held: Sequence[int], rows_multiple: int = 1) -> Mix:
    """Split a budget among the sources.

    Args:
        config: sources, shares and the budget; without `tokens` and `epochs` it is one pass over the domain.
        held: the tokens that each source has.
        rows_multiple: rows are rounded up to a multiple of this.

    Example:
        >>> config = CorpusConfig(
        ...     sources=["notes.jsonl", {"path": "web.jsonl", "role": "replay"}],
        ...     replay_share=0.25, sequence_length=100, epochs=2,
        ... )
        >>> resolve_mix(config, [1500, 800]).tokens
        (3000, 1000)
    """
    replay_share = as_fraction(config.replay_share)
    if config.tokens is not None:
        budget = Fraction(config.tokens)
    else:
        weighted = (as_fraction(s.weight) * n for s, n in zip(config.sources, held, strict=True) if s.role == "domain")
        budget = as_fraction(config.epochs or 1.0) * sum(weighted) / (1 - replay_share)
    rows = rows_multiple * max(1, ceil(budget / (config.sequence_length * rows_multiple)))
    total = rows * config.sequence_length
    replay = round(total * replay_share)
    of_role: dict[Role, int] = {"domain": total - replay, "replay": replay}
    tokens = [0] * len(config.sources)
    for role in ROLES:
        numbers = [number for number, source in enumerate(config.sources) if source.role == role]
        wanted = _shares([config.sources[n] for n in numbers], [held[n] for n in numbers])
        for number, count in zip(numbers, _whole_numbers(of_role[role], wanted), strict=True):
            tokens[number] = count
    return Mix(rows, tuple(tokens), tuple(held))


def _shares(sources: Sequence[CorpusSource], held: Sequence[int]) -> list[Fraction]:
    """Return each source's share of its role: as declared, and the rest by weight times size."""
    declared = [as_fraction(source.share) if source.share is not None else None for source in sources]
    rest = 1 - sum((share for share in declared if share is not None), Fraction(0))
    sizes = [
        as_fraction(source.weight) * count if share is None else Fraction(0)
        for source, count, share in zip(sources, held, declared, strict=True)
    ]
    total = sum(sizes, Fraction(0))
    return [share if share is not None else rest * size / total for share, size in zip(declared, sizes, strict=True)]


def _whole_numbers(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Split a whole number by shares; what rounding leaves goes to the largest remainders."""
    exact = [total * share for share in shares]
    counts = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda n: counts[n] - exact[n])
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts


def reading_order(lengths: np.ndarray, tokens: int, key: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return which documents of a source are read, and how much of each, until `tokens` are read.

    Every epoch has its own seeded order and reads each document once; only the very last document may be cut.

    Args:
        lengths: tokens of each document, int64 [documents].
        tokens: how many to read.
        key: of the order.

    Returns:
        indices into `lengths`, and the tokens read of each, int64 both.
    """
    total = int(lengths.sum())
    orders = [
        np.random.default_rng([*key, epoch]).permutation(len(lengths)) for epoch in range(ceil(tokens / max(total, 1)))
    ]
    order = np.concatenate([*orders, np.empty(0, dtype=np.int64)])
    read = lengths[order]
    ends = np.cumsum(read)
    count = int(np.searchsorted(ends, tokens)) + 1 if tokens else 0
    order, read = order[:count], read[:count].copy()
    if count:
        read[-1] -= ends[count - 1] - tokens
    return order, read


def interleaved(reads: Sequence[np.ndarray]) -> np.ndarray:
    """Return the order that spreads several sources' documents evenly over the whole.

    A document stands where its middle lies in its own source, as a share of it; so every stretch of the result holds
    the sources in the proportions of the whole, to within a document of each.

    Args:
        reads: for each source the tokens read of its documents, in reading order.

    Returns:
        indices into the concatenation of `reads`, int64.
    """
    places = [(np.cumsum(read) - read / 2) / max(int(read.sum()), 1) for read in reads]
    return np.argsort(np.concatenate(places), kind="stable")
