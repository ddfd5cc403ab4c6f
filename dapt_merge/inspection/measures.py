"""What lies between a base's tensor and a DAPT checkpoint's, as sums that add up over tensors.

The idea: one pass gives counts and sums of squares; shares, norms, cosines and errors of a tensor, a layer or a whole
model are ratios of such sums, so groups need no second pass. The pass itself is in `loops`. What this module does not
know: files, names, layers; the spectrum of a matrix is in `rank`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.pieces import Operands
from dapt_merge.tensors.stored import StoredTensor

# The weights at which the rounding of an update is measured, unless others are given.
WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class UpdateRounding:
    """What rounding to bfloat16 leaves of the update w·δ at one weight w.

    Attributes:
        updated: elements that θ₀ + w·δ moves away from θ₀ in float32.
        lost: those of them that are θ₀'s value again once both are rounded.
        squared_error: Σ (applied − w·δ)², where applied is the difference of the two rounded tensors.
        squared_update: Σ (w·δ)².
    """

    updated: int = 0
    lost: int = 0
    squared_error: float = 0.0
    squared_update: float = 0.0

    def __add__(self, other: UpdateRounding) -> UpdateRounding:
        return UpdateRounding(
            self.updated + other.updated,
            self.lost + other.lost,
            self.squared_error + other.squared_error,
            self.squared_update + other.squared_update,
        )

    @property
    def lost_share(self) -> float | None:
        """Lost elements per updated element; None when nothing is updated."""
        return self.lost / self.updated if self.updated else None

    @property
    def relative_error(self) -> float | None:
        """Norm of (applied − w·δ) per norm of w·δ: 0 is exact, 1 as wrong as no update; None when δ is zero."""
        return math.sqrt(self.squared_error / self.squared_update) if self.squared_update else None


@dataclass(frozen=True)
class Difference:
    """A task vector δ = θ₁ − θ₀ and its two ends, over the elements of one tensor or of several (`+`).

    Attributes:
        elements: how many.
        changed: how many differ.
        base_squares, model_squares, products, delta_squares: Σθ₀², Σθ₁², Σθ₀θ₁, Σδ².
        rounding: one `UpdateRounding` for each weight that was asked for.
    """

    elements: int
    changed: int
    base_squares: float
    model_squares: float
    products: float
    delta_squares: float
    rounding: tuple[UpdateRounding, ...]

    def __add__(self, other: Difference) -> Difference:
        return Difference(
            self.elements + other.elements,
            self.changed + other.changed,
            self.base_squares + other.base_squares,
            self.model_squares + other.model_squares,
            self.products + other.products,
            self.delta_squares + other.delta_squares,
            tuple(one + two for one, two in zip(self.rounding, other.rounding, strict=True)),
        )

    @property
    def relative_norm(self) -> float | None:
        """‖δ‖ / ‖θ₀‖; None when the base is all zeros."""
        return math.sqrt(self.delta_squares / self.base_squares) if self.base_squares else None

    @property
    def cosine(self) -> float | None:
        """Cosine of θ₁ to θ₀ as flat vectors; None when one of them is all zeros."""
        norms = math.sqrt(self.base_squares) * math.sqrt(self.model_squares)
        return max(-1.0, min(1.0, self.products / norms)) if norms else None

    @property
    def changed_share(self) -> float | None:
        """Changed elements per element; None when there are no elements."""
        return self.changed / self.elements if self.elements else None


@dataclass(frozen=True)
class SignAgreement:
    """Do several task vectors pull the same way?

    Attributes:
        shared: elements that at least two task vectors move.
        agreeing: those of them that all who move them move in the same direction.
    """

    shared: int = 0
    agreeing: int = 0

    def __add__(self, other: SignAgreement) -> SignAgreement:
        return SignAgreement(self.shared + other.shared, self.agreeing + other.agreeing)

    @property
    def share(self) -> float | None:
        """Agreeing per shared element (0.5 is what two unrelated task vectors have); None when none is shared."""
        return self.agreeing / self.shared if self.shared else None


@torch.no_grad()
def measure_difference(
    base: Tensor, model: Tensor, context: TensorContext, weights: Sequence[float] = WEIGHTS
) -> Difference:
    """Measure one tensor of two checkpoints.

    Args:
        base: θ₀, of any floating dtype.
        model: θ₁, of the same shape.
        context: the tensor's name and the checkpoints' labels, for errors.
        weights: at which to measure what bfloat16 leaves of the update.

    Raises:
        InputError: an input holds NaN or infinity.

    Example:
        >>> found = measure_difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]), TensorContext("w"))
        >>> found.changed, found.relative_norm
        (1, 0.1)
    """
    from dapt_merge.inspection import loops

    changed = 0
    sums, scales = np.zeros(4), np.array(weights, np.float32)
    counts, squares = np.zeros((len(weights), 2), np.int64), np.zeros((len(weights), 2))
    inputs = Operands(StoredTensor.of(base), (StoredTensor.of(model),), context)
    for _, start, (end,) in inputs.pieces():
        assert start is not None
        changed += loops.measure(start.numpy(), end.numpy(), scales, sums, counts, squares)
    rounding = (UpdateRounding(*map(int, c), *map(float, s)) for c, s in zip(counts, squares, strict=True))
    base_squares, model_squares, products, delta_squares = map(float, sums)
    return Difference(base.numel(), changed, base_squares, model_squares, products, delta_squares, tuple(rounding))


@torch.no_grad()
def measure_sign_agreement(base: Tensor, models: Sequence[Tensor], context: TensorContext) -> SignAgreement:
    """Count where the task vectors of two or more models of one base share an element, and where they agree on it.

    Example:
        >>> models = [torch.tensor([1.0, 1.0, 0.0]), torch.tensor([2.0, -1.0, 1.0])]
        >>> measure_sign_agreement(torch.zeros(3), models, TensorContext("w"))
        SignAgreement(shared=2, agreeing=1)
    """
    from dapt_merge.inspection import loops

    total = SignAgreement()
    inputs = Operands(StoredTensor.of(base), tuple(map(StoredTensor.of, models)), context)
    for _, start, ends in inputs.pieces():
        assert start is not None
        up, down = np.zeros(start.numel(), np.int16), np.zeros(start.numel(), np.int16)
        for end in ends:
            loops.count_moves(start.numpy(), end.numpy(), up, down)
        total += SignAgreement(*loops.count_agreement(up, down))
    return total


def no_difference(weights: Sequence[float] = WEIGHTS) -> Difference:
    """Return the sums over no elements: where adding up starts."""
    return Difference(0, 0, 0.0, 0.0, 0.0, 0.0, (UpdateRounding(),) * len(weights))
