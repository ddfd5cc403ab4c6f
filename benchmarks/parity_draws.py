"""Methods that draw at random, compared with what their formulas expect: how many elements move, and how far.

The idea: with two task vectors an element has four outcomes, each with a known probability and result, so that mean and
variance are sums of four terms and nothing has to be simulated. Two statistics of the whole model are compared with
them, in standard errors: the number of elements that move, and the sum of the moves along their expected directions.
The rescaling that restores the L1 norm enters with its expectation; it ties the draws of a tensor together and makes
the true standard errors smaller than these.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from parity_cases import Case
from torch import Tensor


class Draws(NamedTuple):
    """How far a merge is from its formula's expectation, in standard errors, and how many elements moved.

    Attributes:
        rate: share of the elements that moved.
        rate_error: that share against its expectation.
        move_error: the sum of the moves, each times its expectation, against the expectation of that sum.
    """

    rate: float
    rate_error: float
    move_error: float


def draws(
    case: Case, inputs: Sequence[Mapping[str, Tensor]], merged: Mapping[str, Tensor], rounded: torch.dtype
) -> Draws:
    """Compare the matrices of a merged model (small vectors say little) with the formula of the method."""
    moved = expected_moved = moved_variance = 0.0
    sum_moves = expected_moves = moves_variance = 0.0
    elements = 0
    for name, result in merged.items():
        if result.dim() < 2:
            continue
        base, *models = (tensors[name].double() for tensors in inputs)
        moves = result.to(rounded).double() - base
        share = mean = square = torch.zeros_like(base)
        for probability, outcome in _outcomes(case, base, models):
            move = (base + outcome).to(rounded).double() - base
            share = share + probability * (move != 0)
            mean = mean + probability * move
            square = square + probability * move.square()
        moved += float((moves != 0).sum())
        expected_moved += float(share.sum())
        moved_variance += float((share * (1 - share)).sum())
        sum_moves += float((moves * mean).sum())
        expected_moves += float(mean.square().sum())
        moves_variance += float(((square - mean.square()) * mean.square()).sum())
        elements += base.numel()
    return Draws(
        moved / elements,
        (moved - expected_moved) / math.sqrt(moved_variance),
        (sum_moves - expected_moves) / math.sqrt(moves_variance),
    )


def _outcomes(case: Case, base: Tensor, models: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each combination of kept task vectors: its probability and the move, element by element."""
    deltas = [model - base for model in models]
    chances = [_keep_probabilities(case, delta) for delta in deltas]
    factors = [
        float(delta.abs().sum() / (chance * delta.abs()).sum()) for delta, chance in zip(deltas, chances, strict=True)
    ]
    for kept in itertools.product((0, 1), repeat=len(deltas)):
        probability = torch.ones_like(base)
        for keep, chance in zip(kept, chances, strict=True):
            probability = probability * (chance if keep else 1 - chance)
        parts = torch.stack(
            [w * keep * f * d for w, keep, f, d in zip(case.weights, kept, factors, deltas, strict=True)]
        )
        if case.method in ("dare_ties", "della"):
            sign = torch.where(parts.sum(dim=0) >= 0, 1.0, -1.0)
            parts = parts * (parts.sign() == sign)
        yield probability, parts.sum(dim=0)


def _keep_probabilities(case: Case, delta: Tensor) -> Tensor:
    """DARE: the density. DELLA: from density − ε for the smallest of a row to density + ε for the largest."""
    density = case.parameters["density"]
    if not case.method.startswith("della"):
        return torch.full_like(delta, density)
    epsilon, length = case.parameters["epsilon"], delta.shape[-1]
    ranks = delta.abs().argsort(dim=-1).argsort(dim=-1)
    return density - epsilon + 2 * epsilon * ranks / (length - 1)
