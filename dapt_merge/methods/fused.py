"""What a method does to each element, as data that the compiled loops of `kernels` carry out in one pass.

The idea: the elementwise methods differ in few ways. Either the inputs are summed with coefficients, or task vectors
are thinned (not at all, at random, to a band of magnitudes, by rank), scaled, and added to the base or elected into it.
A method that is one of these declares so beside its torch function; that function stays what the method *is*, runs
wherever these loops cannot, and every test of the loops compares with it bit by bit.

What this module does not know: which method it serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dapt_merge.methods.masks import keep_limits, mask_keys
from dapt_merge.methods.rounding_loss import RoundingLoss
from dapt_merge.methods.selection import Cutoff
from dapt_merge.tensors.dtypes import Dtype
from dapt_merge.tensors.stored import StoredTensor, loop_place_of

if TYPE_CHECKING:
    from dapt_merge.methods.pieces import Operands


@dataclass(frozen=True)
class AtRandom:
    """Keep each element with one probability, by the mask of this stream, and multiply with `factor`."""

    probability: float
    stream: int
    factor: float


@dataclass(frozen=True)
class ToBand:
    """Keep the elements that `lower` keeps and `upper` does not (None: no border), and multiply with `factor`."""

    lower: Cutoff | None
    upper: Cutoff | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class ByRank:
    """Keep each element with the probability of its rank in its row (the largest magnitude first).

    What stays is multiplied with `factor`, or where that is None divided by its probability.
    """

    probabilities: np.ndarray  # float64 [row_elements]
    stream: int
    factor: float | None


Thinning: TypeAlias = AtRandom | ToBand | ByRank | None


@dataclass(frozen=True)
class InputSum:
    """Σcᵢθᵢ over the base, if there is one, and the models; `affine` as `averaging.affine_combination` does it."""

    coefficients: Sequence[float]
    affine: bool


@dataclass(frozen=True)
class TaskVectorSum:
    """θ₀ + Σsᵢδᵢ over the models at `positions`, or with `elect` what `ties.merge_elected` makes of them."""

    positions: Sequence[int]
    thinnings: Sequence[Thinning]
    scales: Sequence[float]
    elect: str | None = None
    normalize: bool = False
    lambda_: float = 1.0


Fused: TypeAlias = InputSum | TaskVectorSum


class Program:
    """A merge of one tensor, ready for the compiled loops.

    Args:
        fused: what to do.
        operands: the inputs; all of them have a `loop_place`.
    """

    def __init__(self, fused: Fused, operands: Operands) -> None:
        self._inputs = operands.inputs  # the addresses are only good while these live
        places = np.array([loop_place_of(stored) for stored in self._inputs], np.int64)
        self._addresses, self._codes = places[:, 0].copy(), places[:, 1].copy()
        self._packed = _packed(fused, operands)
        in_bfloat16 = all(stored.dtype == Dtype.BFLOAT16 for stored in self._inputs)
        self._two_of_bfloat16 = (
            isinstance(fused, InputSum) and len(self._inputs) == 2 and in_bfloat16 and 0 not in fused.coefficients
        )

    def run_elements(self, at_most: int) -> int:
        """Return how many elements to ask for at a time: `at_most`, or as many as make whole rows."""
        return at_most // self._packed.row * self._packed.row

    def carry_out(self, begin: int, out: StoredTensor) -> RoundingLoss | None:
        """Merge the elements from `begin` on (at the start of a row, where rows matter) into `out`.

        Args:
            begin: index in the flattened tensor.
            out: 1-d, with a `loop_place`; gets the results, rounded to nearest.

        Returns:
            What rounding lost (of a 16-bit output, else zeros); None where an input or a result is NaN or infinite.
        """
        finite, updated, lost = self._merge(begin, out)
        return RoundingLoss(updated, lost) if finite else None

    def _merge(self, begin: int, out: StoredTensor) -> tuple[bool, int, int]:
        from dapt_merge.methods import kernels  # compiled loops are only loaded by merges that use them

        arguments, (address, code), row = self._packed.arguments, loop_place_of(out), self._packed.row
        if code == kernels.BFLOAT16 and self._two_of_bfloat16:
            return kernels.merge_two_of_bfloat16(self._addresses, begin, out.numel, address, *arguments)
        merge = kernels.merge_inputs if self._packed.of_inputs else kernels.merge_task_vectors
        run = row * max(1, kernels.RUN_ELEMENTS // row)
        return merge(self._addresses, self._codes, begin, out.numel, address, code, run, *arguments)


@dataclass(frozen=True)
class _Packed:
    """The arguments of `kernels.merge_inputs` or `merge_task_vectors` from `kind` on, and the elements of a row."""

    of_inputs: bool
    row: int
    arguments: tuple[Any, ...]


def _packed(fused: Fused, operands: Operands) -> _Packed:
    from dapt_merge.methods import kernels

    if isinstance(fused, InputSum):
        anchor = max(range(len(fused.coefficients)), key=lambda position: abs(fused.coefficients[position]))
        kind = kernels.AFFINE if fused.affine else kernels.SUM
        return _Packed(True, 1, (kind, np.array(fused.coefficients, np.float64), anchor))
    voters, context = len(fused.positions), operands.context
    row = next((len(thinning.probabilities) for thinning in fused.thinnings if isinstance(thinning, ByRank)), 1)
    kinds, bands = np.zeros((voters, 3), np.int64), np.zeros((voters, 6), np.int64)
    keys = np.zeros((voters, 1 + (operands.numel - 1 >> 32), 2), np.uint32)
    limits, probabilities = None, None
    if any(isinstance(thinning, ByRank) for thinning in fused.thinnings):
        limits, probabilities = np.zeros((voters, row), np.uint32), np.ones((voters, row), np.float32)
    factors = np.ones(voters, np.float32)
    for place, thinning in enumerate(fused.thinnings):
        if thinning is None:
            continue
        if isinstance(thinning, ToBand):
            kinds[place, 0] = kernels.BAND
            bands[place] = _borders(thinning.lower) + _borders(thinning.upper)
        else:
            keys[place] = mask_keys(context.seed, context.name, thinning.stream, keys.shape[1])
            if isinstance(thinning, AtRandom):
                kinds[place, :2] = kernels.RANDOM, keep_limits(thinning.probability) - 1
            else:
                kinds[place, 0] = kernels.BY_RANK
                kinds[place, 2] = thinning.factor is None
                assert limits is not None
                assert probabilities is not None
                limits[place] = keep_limits(thinning.probabilities) - 1
                probabilities[place] = thinning.probabilities
        if thinning.factor is not None:
            factors[place] = thinning.factor
    arguments = (
        kernels.SCALED if fused.elect is None else kernels.ELECTED,
        np.array(fused.scales, np.float64),
        np.array(fused.positions, np.int64) + 1,
        kinds,
        bands,
        keys,
        row,
        limits,
        probabilities,
        factors,
        ("weighted", "unweighted", "count").index(fused.elect or "weighted"),
        fused.normalize,
        float(fused.lambda_),
    )
    return _Packed(False, row, arguments)


def _borders(cutoff: Cutoff | None) -> list[int]:
    return [0, 0, 0] if cutoff is None else [1, cutoff.magnitude_bits, cutoff.last_tied]
