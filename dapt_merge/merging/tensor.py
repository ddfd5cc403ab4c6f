"""One tensor merged: the single path that the disk, a live model and the Python API all take.

The method computes in float32; the result is rounded to the output dtype once, and what that rounding swallows of the
update is counted, because a small update can vanish in bfloat16 without anyone noticing. Where tensors are read from
and written to, this module does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from dapt_merge.errors import InputError
from dapt_merge.merging.plan import TensorJob
from dapt_merge.merging.rounding import round_stochastically
from dapt_merge.methods.apply import combine
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.pieces import is_finite

RUN_ELEMENTS = 1 << 18  # of a result that is handed over piece by piece
_PIECE_ELEMENTS = 1 << 18

Place: TypeAlias = Callable[[int, int], Tensor]
"""(begin, end) → where the elements begin…end−1 of the flattened result belong: 1-d, in the output's dtype.

Asked for in order and without gaps, at most `RUN_ELEMENTS` at a time; the caller may have carried the content away by
the time that the next one is asked for.
"""


@dataclass(frozen=True)
class RoundingLoss:
    """How many elements the merge moves away from the base in float32, and how many of those rounding moves back."""

    updated: int = 0
    lost: int = 0

    def __add__(self, other: RoundingLoss) -> RoundingLoss:
        return RoundingLoss(self.updated + other.updated, self.lost + other.lost)

    @property
    def share(self) -> float:
        """Lost elements per updated element; 0 when nothing was updated."""
        return self.lost / self.updated if self.updated else 0.0


@dataclass(frozen=True)
class MergedTensor:
    """A merged tensor in its output dtype, what its method noted, and what rounding lost (None: not measured).

    Where no `out` was given, the tensor may be an input itself, at an exact end point: read it, never write to it.
    """

    tensor: Tensor
    notes: Mapping[str, object]
    rounding: RoundingLoss | None = None


def merge_tensor(
    job: TensorJob,
    read: Callable[[str, str], Tensor],
    seed: int,
    *,
    measure_rounding: bool = True,
    out: Tensor | None = None,
) -> MergedTensor:
    """Merge one tensor.

    Args:
        job: what to merge.
        read: (label of a checkpoint or statistics file, tensor name) → the stored tensor.
        seed: the recipe's.
        measure_rounding: count the elements of the update that rounding to a dtype narrower than float32 loses. It
            changes no bit of the result.
        out: where the result is to be, shaped and typed like the job's output; it then is the tensor that is returned.
            What it holds after an error is undefined.

    Raises:
        InputError: an input holds NaN or infinity, buffers disagree, or the result overflows the output dtype.
    """
    merged = _merge(job, read, seed, measure_rounding)
    if out is None:
        return merged
    out.copy_(merged.tensor)
    return replace(merged, tensor=out)


def merge_tensor_in_runs(
    job: TensorJob,
    read: Callable[[str, str], Tensor],
    seed: int,
    place: Place,
    *,
    measure_rounding: bool = True,
) -> tuple[Mapping[str, object], RoundingLoss | None]:
    """Merge one tensor as `merge_tensor` does, bit for bit, and hand it over in runs: it need not exist as a whole.

    Returns:
        What the method noted, and what rounding lost.
    """
    merged = _merge(job, read, seed, measure_rounding)
    flat = merged.tensor.reshape(-1)
    for begin in range(0, flat.numel(), RUN_ELEMENTS):
        end = min(begin + RUN_ELEMENTS, flat.numel())
        place(begin, end).copy_(flat[begin:end])
    return merged.notes, merged.rounding


def _merge(job: TensorJob, read: Callable[[str, str], Tensor], seed: int, measure_rounding: bool) -> MergedTensor:
    base, models = job.inputs(read)
    context = TensorContext(
        job.name,
        seed=seed,
        base_label=job.base or "the base",
        model_labels=job.models,
        cutoffs=job.cutoffs,
        layer=job.layer,
        num_layers=job.num_layers,
        statistics=tuple(None if place is None else read(*place) for place in job.statistics),
    )
    narrow = job.out_dtype in (torch.bfloat16, torch.float16)
    in_full = narrow and (measure_rounding or job.stochastic or job.target is not None)
    method, values = job.parameters.method, job.parameters.values
    merged = combine(method, base, models, values, context, out_dtype=torch.float32 if in_full else job.out_dtype)
    start = models[0] if base is None else base
    if job.target_read is not None and base is not None:
        start = read(*job.target_read)
        merged = _added_to_target(merged, base, start, job)
    if not merged.is_floating_point() or merged.dtype == job.out_dtype:
        return MergedTensor(merged, context.notes)
    # A copy of an input is no update: it is rounded as loading it in that dtype would.
    if narrow and job.stochastic and not any(merged is tensor for tensor in (start, *models)):
        rounded = round_stochastically(merged, job.out_dtype, seed, job.name)
        _refuse_overflow(rounded, job)
        return MergedTensor(rounded, context.notes)
    if not (narrow and measure_rounding):
        return MergedTensor(_rounded(merged, job), context.notes)
    rounded, loss = _rounded_and_counted(merged, start, job)
    return MergedTensor(rounded, context.notes, loss)


def _added_to_target(merged: Tensor, base: Tensor, target: Tensor, job: TensorJob) -> Tensor:
    """Return θ_target + (merged − θ₀) in float32; the target itself where the merge is the base itself.

    Raises:
        InputError: the target holds NaN or infinity, or disagrees on a buffer.
    """
    if not target.is_floating_point():
        if not torch.equal(target, merged):
            raise InputError(
                f"{job.target} disagrees with {job.base} on a buffer of {target.dtype}, which cannot be merged",
                where=f"tensor {job.name}",
                remedy="Use a target of the same architecture and tokenizer.",
            )
        return target
    if merged is base:
        return target
    moved = merged.float().sub(base.float()).add_(target)
    if not is_finite(moved):
        raise InputError(
            f"the result is not finite: {job.target} holds NaN or infinity, or the sum overflows",
            where=f"tensor {job.name}",
            remedy="Use a target without NaN, or smaller weights.",
        )
    return moved


def _rounded(merged: Tensor, job: TensorJob) -> Tensor:
    rounded = merged.to(job.out_dtype)
    _refuse_overflow(rounded, job)
    return rounded


def _rounded_and_counted(merged: Tensor, start: Tensor, job: TensorJob) -> tuple[Tensor, RoundingLoss]:
    """Round in pieces that stay in the processor's cache, and compare with where the update started from."""
    rounded = torch.empty(merged.shape, dtype=job.out_dtype)
    flat, from_flat, out_flat = merged.reshape(-1), start.reshape(-1), rounded.view(-1)
    updated = lost = 0
    for begin in range(0, merged.numel(), _PIECE_ELEMENTS):
        run = slice(begin, begin + _PIECE_ELEMENTS)
        out_flat[run] = flat[run]
        unmoved_exactly = _equal_elements(flat[run], from_flat[run])
        unmoved_rounded = _equal_elements(out_flat[run], from_flat[run].to(job.out_dtype))
        # Rounding is monotonic: whatever equals the start exactly equals it rounded too.
        updated += flat[run].numel() - unmoved_exactly
        lost += unmoved_rounded - unmoved_exactly
    _refuse_overflow(rounded, job)
    return rounded, RoundingLoss(updated, lost)


def _equal_elements(one: Tensor, other: Tensor) -> int:
    # numpy compares and counts several times faster than torch does on one core.
    return int(np.count_nonzero(one.float().numpy() == other.float().numpy()))


def _refuse_overflow(rounded: Tensor, job: TensorJob) -> None:
    if rounded.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(rounded)):
        raise InputError(
            f"the merged values overflow {rounded.dtype}",
            where=f"tensor {job.name}",
            remedy="Choose bfloat16 or float32 as out_dtype, or smaller weights.",
        )
