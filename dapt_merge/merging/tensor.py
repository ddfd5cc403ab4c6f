"""One tensor merged: the single path that the disk, a live model and the Python API all take.

The method computes in float32, or in float64 where that is asked for or stored; the result is rounded to the output
dtype once, and what that rounding swallows of the update is counted, because a small update can vanish in bfloat16
without anyone noticing. Where tensors are read from and written to, this module does not know.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dapt_merge.errors import InputError
from dapt_merge.merging.plan import Reader, TensorJob
from dapt_merge.merging.rounding import round_stochastically
from dapt_merge.methods.apply import Place, combine, combine_in_runs
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.pieces import arithmetic_dtype, dtypes_of, is_finite
from dapt_merge.methods.rounding_loss import RoundingLoss, is_lossy, rounded_and_counted
from dapt_merge.tensors.dtypes import Dtype
from dapt_merge.tensors.lazy_torch import torch
from dapt_merge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

RUN_ELEMENTS = 1 << 18  # of a result that is handed over piece by piece


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
    read: Reader,
    seed: int,
    *,
    measure_rounding: bool = True,
    out: Tensor | None = None,
    memories: tuple[MutableMapping[Hashable, Any], ...] = (),
) -> MergedTensor:
    """Merge one tensor.

    Args:
        job: what to merge.
        read: see `plan.Reader`.
        seed: the recipe's.
        measure_rounding: count the elements of the update that rounding to a dtype narrower than the arithmetic's
            loses. It changes no bit of the result.
        out: where the result is to be, shaped and typed like the job's output; it then is the tensor that is returned.
            What it holds after an error is undefined.
        memories: see `TensorContext.memories`.

    Raises:
        InputError: an input holds NaN or infinity, buffers disagree, or the result overflows the output dtype.
    """
    inputs = job.inputs(read)
    made = _Output(job, out, inputs[1][0])
    ready, notes, loss = _merge(job, inputs, read, seed, made.place, job.elements, measure_rounding, memories)
    if ready is not None:
        if out is None and ready.merged.dtype == job.out_dtype:
            return MergedTensor(ready.merged.tensor, notes)
        loss = _hand_over(ready, job, made.place, max(1, job.elements), measure_rounding)
    return MergedTensor(made.finished(), notes, loss)


def merge_tensor_in_runs(
    job: TensorJob,
    read: Reader,
    seed: int,
    place: Place,
    *,
    measure_rounding: bool = True,
) -> tuple[Mapping[str, object], RoundingLoss | None]:
    """Merge one tensor as `merge_tensor` does, bit for bit, and hand it over in runs: it need not exist as a whole.

    Runs hold `RUN_ELEMENTS` at most.

    Returns:
        What the method noted, and what rounding lost.
    """
    ready, notes, loss = _merge(job, job.inputs(read), read, seed, place, RUN_ELEMENTS, measure_rounding)
    if ready is not None:
        loss = _hand_over(ready, job, place, RUN_ELEMENTS, measure_rounding)
    return notes, loss


class _Output:
    """The whole of a result, given by the caller or made when the first place in it is asked for."""

    def __init__(self, job: TensorJob, given: Tensor | None, model: StoredTensor) -> None:
        self._job, self._given, self._model = job, given, model
        fits = given is not None and given.is_contiguous() and given.device == model.device
        self._whole = given.detach() if given is not None and fits else None
        self._copied = given is not None and not fits

    def place(self, begin: int, end: int) -> StoredTensor:
        flat = self._made().view(-1)
        return StoredTensor.of(flat if end - begin == len(flat) else flat[begin:end])

    def finished(self) -> Tensor:
        made = self._made()
        if self._given is None:
            return made
        if self._copied:
            self._given.detach().copy_(made)
        return self._given

    def _made(self) -> Tensor:
        if self._whole is None:
            dtype = self._job.out_dtype.torch_dtype
            self._whole = torch.empty(self._job.shape, dtype=dtype, device=self._model.device)
        return self._whole


@dataclass(frozen=True)
class _Ready:
    """A result that is there as a whole, perhaps an input itself, and the tensor that its update starts from."""

    merged: StoredTensor
    start: StoredTensor


def _merge(
    job: TensorJob,
    inputs: tuple[StoredTensor | None, list[StoredTensor]],
    read: Reader,
    seed: int,
    place: Place,
    run_elements: int,
    measure_rounding: bool,
    memories: tuple[MutableMapping[Hashable, Any], ...] = (),
) -> tuple[_Ready | None, Mapping[str, object], RoundingLoss | None]:
    """Merge into the places, or return what is still to be put there; with the method's notes and the loss so far."""
    base, models = inputs
    context = TensorContext(
        job.name,
        seed=seed,
        base_label=job.base or "the base",
        model_labels=job.models,
        cutoffs=job.cutoffs,
        layer=job.layer,
        num_layers=job.num_layers,
        statistics=tuple(
            None if stored is None else StoredTensor.of(read(*stored)).tensor for stored in job.statistics
        ),
        memories=memories,
    )
    method, values = job.parameters.method, job.parameters.values
    start = models[0] if base is None else base
    target = None if job.target_read is None else StoredTensor.of(read(*job.target_read))
    arithmetic = job.arithmetic or arithmetic_dtype(dtypes_of(base, target, *models), job.out_dtype)
    stochastic = job.stochastic and is_lossy(arithmetic, job.out_dtype)
    if not stochastic and target is None:
        result = combine_in_runs(
            method,
            base,
            models,
            values,
            context,
            place,
            out_dtype=job.out_dtype,
            arithmetic=arithmetic,
            counted=measure_rounding,
            run_elements=run_elements,
        )
        ready = _Ready(result, start) if isinstance(result, StoredTensor) else None
        return ready, context.notes, result if isinstance(result, RoundingLoss) else None
    whole = combine(method, base, models, values, context, out_dtype=arithmetic, arithmetic=arithmetic)
    # An end point is an input itself, and is known as that.
    merged = next((stored for stored in (start, *models) if stored.tensor is whole), StoredTensor.of(whole))
    if target is not None and base is not None:
        start = target
        merged = _added_to_target(merged, base, target, job, arithmetic)
    # A copy of an input is no update: it is rounded as loading it in that dtype would.
    if stochastic and merged.dtype.is_floating_point and not any(merged is stored for stored in (start, *models)):
        merged = StoredTensor.of(round_stochastically(merged.tensor, job.out_dtype.torch_dtype, seed, job.name))
        _refuse_overflow(merged.tensor, job)
    return _Ready(merged, start), context.notes, None


def _hand_over(
    ready: _Ready, job: TensorJob, place: Place, run_elements: int, measure_rounding: bool
) -> RoundingLoss | None:
    """Put a whole result into its places, rounded to the output dtype, and count what that loses."""
    if ready.merged.dtype == job.out_dtype and ready.merged.is_on_cpu:
        _copy_out(ready.merged, place, run_elements)
        return None
    flat, from_flat, exact = ready.merged.tensor.reshape(-1), ready.start.tensor.reshape(-1), ready.merged.dtype
    rounds = exact.is_floating_point and exact != job.out_dtype
    counted = rounds and measure_rounding and is_lossy(exact, job.out_dtype)
    loss = RoundingLoss()
    for begin in range(0, flat.numel(), run_elements):
        run = slice(begin, min(begin + run_elements, flat.numel()))
        placed = place(run.start, run.stop).tensor
        if counted:
            loss += rounded_and_counted(flat[run], from_flat[run], placed)
        else:
            placed.copy_(flat[run])
        if rounds:
            _refuse_overflow(placed, job)
    return loss if counted else None


def _copy_out(merged: StoredTensor, place: Place, run_elements: int) -> None:
    """Put a result that needs no rounding into its places, byte by byte."""
    content, size = np.frombuffer(merged.memory, np.uint8), merged.dtype.itemsize
    for begin in range(0, merged.numel, run_elements):
        end = min(begin + run_elements, merged.numel)
        np.frombuffer(place(begin, end).memory, np.uint8)[:] = content[begin * size : end * size]


def _added_to_target(
    merged: StoredTensor, base: StoredTensor, target: StoredTensor, job: TensorJob, arithmetic: Dtype
) -> StoredTensor:
    """Return θ_target + (merged − θ₀) in the arithmetic's dtype; the target itself where the merge is the base itself.

    Raises:
        InputError: the target holds NaN or infinity, or disagrees on a buffer.
    """
    if not target.dtype.is_floating_point:
        if not target.is_same_as(merged):
            raise InputError(
                f"{job.target} disagrees with {job.base} on a buffer of {target.dtype}, which cannot be merged",
                where=f"tensor {job.name}",
                remedy="Use a target of the same architecture and tokenizer.",
            )
        return target
    if merged is base:
        return target
    exact = arithmetic.torch_dtype
    moved = merged.tensor.to(exact).sub(base.tensor.to(exact)).add_(target.tensor)
    if not is_finite(moved):
        raise InputError(
            f"the result is not finite: {job.target} holds NaN or infinity, or the sum overflows",
            where=f"tensor {job.name}",
            remedy="Use a target without NaN, or smaller weights.",
        )
    return StoredTensor.of(moved)


def _refuse_overflow(rounded: Tensor, job: TensorJob) -> None:
    if rounded.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(rounded)):
        raise InputError(
            f"the merged values overflow {rounded.dtype}",
            where=f"tensor {job.name}",
            remedy="Choose bfloat16 or float32 as out_dtype, or smaller weights.",
        )
