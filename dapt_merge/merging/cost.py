"""What a merge will cost: bytes, memory, and time at a throughput that is given, or measured on made-up tensors.

The idea: the bytes are known from the headers; memory follows from how tensors are kept in flight; speed is tried for a
fraction of a second on small random tensors that go through the merge's own path. So the time is that of arithmetic and
hashing: where the disk is slower, the disk sets it. What this module does not know: the disk.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dapt_merge.checkpoints.checkpoint import tensor_digest
from dapt_merge.checkpoints.threads import MINIMUM_BUDGET, default_threads, map_in_threads
from dapt_merge.merging.plan import MergePlan, TensorJob
from dapt_merge.merging.tensor import merge_tensor

# Python, torch and this package once a merge runs, measured as memory that is no file's.
_PROGRAM_BYTES = 160 * 2**20
# The pieces that a thread holds while it computes and rounds.
_THREAD_BYTES = 16 * 2**20
# A threshold over the whole model is found in three readings before the merge's own.
_READINGS_TO_TRIM = 3
_TRIAL_ELEMENTS = 1 << 19
_TRIAL_ROWS = 512
_TRIAL_SECONDS = 0.1


@dataclass(frozen=True)
class Cost:
    """What a merge from disk to disk takes.

    Attributes:
        bytes_read: of tensors, over all readings.
        bytes_written: of tensors; as much disk space is needed.
        memory_bytes: the most that is in use at once, beside the page cache; an estimate.
        threads: that memory and throughput are for.
        bytes_per_second: read and written, the throughput behind `seconds`; None when it is neither given nor could be
            measured.
        measured: whether the throughput was measured here, and not given.
        grows: whether the method's work for an element grows with the matrix, so that `seconds` is a lower bound.
    """

    bytes_read: int
    bytes_written: int
    memory_bytes: int
    threads: int
    bytes_per_second: float | None
    measured: bool
    grows: bool

    @property
    def seconds(self) -> float | None:
        """The time at that throughput."""
        moved = self.bytes_read + self.bytes_written
        return None if self.bytes_per_second is None else moved / self.bytes_per_second

    def to_dict(self) -> dict[str, Any]:
        """Return the cost as JSON-ready data."""
        return {
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "memory_bytes": self.memory_bytes,
            "threads": self.threads,
            "bytes_per_second": self.bytes_per_second,
            "throughput_measured": self.measured,
            "seconds": self.seconds,
            "seconds_are_a_lower_bound": self.grows,
        }


def estimate_cost(plan: MergePlan, *, threads: int | None = None, bytes_per_second: float | None = None) -> Cost:
    """Estimate what `merge_to_disk` of a plan takes; no weight is read.

    Args:
        plan: from `plan_merge`.
        threads: tensors merged at once (default: the CPUs that may be used).
        bytes_per_second: the throughput, read and written together; None measures it for a fraction of a second.
    """
    threads = threads or default_threads()
    measured = bytes_per_second is None
    return Cost(
        bytes_read=sum(_bytes_read(plan, job) for job in plan.jobs),
        bytes_written=plan.nbytes,
        memory_bytes=_memory_bytes(plan, threads),
        threads=threads,
        bytes_per_second=_measured_throughput(plan, threads) if measured else bytes_per_second,
        measured=measured,
        grows=any(not job.parameters.method.elementwise for job in plan.jobs),
    )


def total_cost(costs: Sequence[Cost]) -> Cost:
    """Return the cost of merges that run one after another and whose outputs all stay until the last is done."""
    seconds = [cost.seconds for cost in costs]
    read, written = sum(cost.bytes_read for cost in costs), sum(cost.bytes_written for cost in costs)
    known = [value for value in seconds if value is not None]
    return replace(
        costs[-1],
        bytes_read=read,
        bytes_written=written,
        memory_bytes=max(cost.memory_bytes for cost in costs),
        bytes_per_second=(read + written) / sum(known) if len(known) == len(costs) else None,
        grows=any(cost.grows for cost in costs),
    )


def _bytes_read(plan: MergePlan, job: TensorJob) -> int:
    once = sum(plan.checkpoints[label].tensors[stored].nbytes for label, stored in _reads(job))
    return once * (1 + _READINGS_TO_TRIM) if job.parameters.values.get("trim_scope") == "model" else once


def _reads(job: TensorJob) -> tuple[tuple[str, str], ...]:
    return job.reads if job.target_read is None else (*job.reads, job.target_read)


def _memory_bytes(plan: MergePlan, threads: int) -> int:
    """The program, and the largest tensors in flight: as many as there are threads, within the budget of elements."""
    largest_first = sorted(plan.jobs, key=lambda job: -job.elements)
    room = max(2 * largest_first[0].elements, MINIMUM_BUDGET) if largest_first else 0
    total = _PROGRAM_BYTES
    for job in largest_first[:threads]:
        if job.elements > room:
            break
        room -= job.elements
        total += _THREAD_BYTES + job.elements * _bytes_per_element(plan, job)
    return total


def _bytes_per_element(plan: MergePlan, job: TensorJob) -> int:
    """The merged value in float32, its rounded copy, and, for a method that wants whole tensors, every input again."""
    merged = 4 if job.out_dtype.itemsize >= 4 else 4 + job.out_dtype.itemsize
    if job.parameters.method.elementwise:
        return merged
    widened = sum(plan.checkpoints[label].tensors[stored].dtype != torch.float32 for label, stored in job.reads)
    return merged + 4 * widened + 4 * len(job.reads)  # the last: what such a method holds while it works, roughly


def _measured_throughput(plan: MergePlan, threads: int) -> float | None:
    """Merge small random tensors with the settings that most of the model has, for `_TRIAL_SECONDS`."""
    job = _typical(plan.jobs)
    if job is None:
        return None
    inputs = {read: _made_up(plan, read, position) for position, read in enumerate(_reads(job))}
    trial = replace(job, shape=(_TRIAL_ROWS, _TRIAL_ELEMENTS // _TRIAL_ROWS))

    def merge_one(_: int) -> None:
        merged = merge_tensor(trial, lambda label, name: inputs[label, name], plan.recipe.seed)
        for tensor in (*inputs.values(), merged.tensor):  # a merge hashes what it reads and writes
            tensor_digest(tensor)

    moved = sum(tensor.nbytes for tensor in inputs.values()) + trial.nbytes
    merge_one(0)  # the first call also loads code
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < _TRIAL_SECONDS:
        map_in_threads(merge_one, range(2 * threads), lambda _: _TRIAL_ELEMENTS, threads=threads)
        done += 2 * threads
    return done * moved / (time.perf_counter() - started)


def _typical(jobs: Sequence[TensorJob]) -> TensorJob | None:
    """Return the job whose settings cover most elements; None where it needs more than tensors to be tried."""
    elements: dict[str, int] = {}
    chosen: dict[str, TensorJob] = {}
    for job in jobs:
        if job.out_dtype.is_floating_point:
            key = repr(job.parameters.values)
            elements[key] = elements.get(key, 0) + job.elements
            chosen.setdefault(key, job)
    if not elements:
        return None
    job = chosen[max(elements, key=lambda key: elements[key])]
    method, values = job.parameters.method, job.parameters.values
    if any(parameter.kind == "file" for parameter in method.parameters):
        return None
    if values.get("trim_scope") == "model":
        values = {**values, "trim_scope": "tensor"}
    return replace(job, parameters=replace(job.parameters, values=values), cutoffs=None)


def _made_up(plan: MergePlan, read: tuple[str, str], position: int) -> Tensor:
    label, stored = read
    generator = torch.Generator().manual_seed(position)
    values = 0.02 * torch.randn(_TRIAL_ROWS, _TRIAL_ELEMENTS // _TRIAL_ROWS, generator=generator)
    return values.to(plan.checkpoints[label].tensors[stored].dtype)
