"""What a merge will cost: bytes, memory, and time at the rate of the last such merge, or of copying here and now.

The idea: the bytes are known from the headers; memory follows from how tensors are kept in flight; the rate is what the
last merge of the same method and dtypes reached on this machine (`rates`). Where there was none, a merge takes as long
as copying its bytes or as its arithmetic, whichever is longer: some megabytes of made-up numbers are copied, and what a
kind of arithmetic takes an element was measured once. Where asked for, made-up tensors are merged by the real engine.
What this module does not know: how fast another disk is.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dapt_merge.checkpoints.checkpoint import Checkpoint, TensorInfo
from dapt_merge.checkpoints.opening import open_checkpoint
from dapt_merge.checkpoints.threads import MINIMUM_BUDGET, default_threads
from dapt_merge.checkpoints.writer import CheckpointWriter
from dapt_merge.merging.copying import copy_seconds_per_byte
from dapt_merge.merging.plan import MergePlan, TensorJob
from dapt_merge.merging.rates import recalled
from dapt_merge.merging.report import bytes_read
from dapt_merge.merging.stream import merge_to_disk
from dapt_merge.methods.pieces import arithmetic_dtype
from dapt_merge.tensors.dtypes import Dtype
from dapt_merge.tensors.stored import StoredTensor

# Python, numba and this package once a merge runs, and torch where it is needed: memory that is no file's, measured.
_PROGRAM_BYTES = 60 * 2**20
_TORCH_BYTES = 130 * 2**20
# The runs that a thread holds while it computes, rounds and hands over to the disk.
_THREAD_BYTES = 16 * 2**20
# A threshold over the whole model is found in three readings before the merge's own.
_READINGS_TO_TRIM = 3
# The processor's nanoseconds for an element of a model beside the base; measured with 1.1B parameters in bfloat16, base
# and one or two models, on two cores.
_NANOSECONDS = {"summed": 1.7, "measured": 2.2, "dropped": 2.1, "counted": 4.2, "ranked": 7.0}
# The same for methods that are not compiled, each for itself.
_NANOSECONDS_IN_TORCH = {
    "multislerp": 7.1,
    "karcher": 9.0,
    "model_stock": 7.1,
    "nuslerp": 7.3,
    "ram": 7.5,
    "ramplus_tl": 7.5,
    "nearswap": 10.2,
    "sce": 28.8,
    "arcee_fusion": 43.7,
}
# What a merge takes beside that: loading the loops, opening and closing files.
_LOADING_SECONDS = 0.25
_MADE_UP_SHAPE = (2048, 2048)
_COPIED_TENSORS, _COPIED_TIMES, _COPIED_AGAIN = 4, 5, 3
_TRIED_TENSORS = 12


@dataclass(frozen=True)
class Cost:
    """What a merge from disk to disk takes.

    Attributes:
        bytes_read: of tensors, over all readings.
        bytes_written: of tensors; as much disk space is needed.
        memory_bytes: the most that is in use at once, beside the page cache; an estimate.
        threads: that memory and throughput are for.
        bytes_per_second: read and written, the throughput behind `seconds`; None when it is not known.
        source: where the throughput is from: "given", "last merge", "copying" or "trial"; None when it is not known.
        grows: whether the method's work for an element grows with the matrix, so that a trial gives a lower bound.
    """

    bytes_read: int
    bytes_written: int
    memory_bytes: int
    threads: int
    bytes_per_second: float | None
    source: str | None
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
            "throughput_from": self.source,
            "seconds": self.seconds,
            "seconds_are_a_lower_bound": self.grows and self.source == "trial",
        }


def estimate_cost(
    plan: MergePlan, *, threads: int | None = None, bytes_per_second: float | None = None, trial: bool = False
) -> Cost:
    """Estimate what `merge_to_disk` of a plan takes; no weight is read.

    Args:
        plan: from `plan_merge`.
        threads: tensors merged at once (default: the CPUs that may be used).
        bytes_per_second: the throughput, read and written together; None takes that of the last such merge here, or
            goes by how fast bytes are copied here.
        trial: try the throughput out instead, by merging a few made-up tensors; takes about a second.
    """
    threads = threads or default_threads()
    rate, source = bytes_per_second, "given"
    if rate is None and trial:
        rate, source = _tried_out(plan, threads), "trial"
    if rate is None:
        rate, source = recalled(plan, threads), "last merge"
    read = sum(_bytes_read(plan, job) for job in plan.jobs)
    if rate is None:
        rate, source = _by_copying(plan, threads), "copying"
        if rate is not None:
            moved = read + plan.nbytes
            rate = moved / (moved / rate + _LOADING_SECONDS)
    return Cost(
        bytes_read=read,
        bytes_written=plan.nbytes,
        memory_bytes=_memory_bytes(plan, threads),
        threads=threads,
        bytes_per_second=rate,
        source=None if rate is None else source,
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
    once = bytes_read(plan, job)
    return once * (1 + _READINGS_TO_TRIM) if job.parameters.values.get("trim_scope") == "model" else once


def _reads(job: TensorJob) -> tuple[tuple[str, str], ...]:
    return job.reads if job.target_read is None else (*job.reads, job.target_read)


def _memory_bytes(plan: MergePlan, threads: int) -> int:
    """The program, the threads' runs, and the largest tensors that are held whole, within the budget of elements."""
    largest_first = sorted(plan.jobs, key=lambda job: -job.elements)
    room = max(2 * largest_first[0].elements, MINIMUM_BUDGET) if largest_first else 0
    total = _PROGRAM_BYTES + (_TORCH_BYTES if any(_needs_torch(job) for job in plan.jobs) else 0)
    for job in largest_first[:threads]:
        if job.elements > room:
            break
        room -= job.elements
        total += _THREAD_BYTES + job.elements * _bytes_per_element(plan, job)
    return total


def _needs_torch(job: TensorJob) -> bool:
    return job.parameters.method.kernel is None or job.stochastic or job.target is not None


def _bytes_per_element(plan: MergePlan, job: TensorJob) -> int:
    """Nothing for a tensor that goes through in runs; else its exact value and what methods of whole tensors hold."""
    method = job.parameters.method
    dtypes = [plan.checkpoints[label].tensors[stored].dtype for label, stored in job.reads]
    arithmetic = job.arithmetic or arithmetic_dtype(dtypes, job.out_dtype)
    width = arithmetic.itemsize
    if method.elementwise:
        return width if job.stochastic or job.target is not None else 0
    widened = sum(dtype != arithmetic for dtype in dtypes)
    return width * (1 + widened + len(dtypes))  # the last: what such a method holds while it works, roughly


def _by_copying(plan: MergePlan, threads: int) -> float | None:
    """Copy some made-up megabytes, and say what the longer of copying and arithmetic gives; None if not known."""
    job = _typical(plan.jobs)
    nanoseconds = None if job is None or job.stochastic else _nanoseconds(job)
    if job is None or nanoseconds is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        sample = _made_up(plan, job, None, _COPIED_TENSORS)
        sample = replace(sample, jobs=sample.jobs * _COPIED_TIMES)
        # The first of a process is slower than what follows, which is what a merge mostly is.
        tries = [copy_seconds_per_byte(sample, Path(folder), threads, sample.nbytes) for _ in range(_COPIED_AGAIN)]
    for_a_byte = min((seconds for seconds in tries if seconds), default=None)
    if not for_a_byte:
        return None
    copying = for_a_byte * sample.nbytes
    computed = sum(job.elements * max(1, len(job.reads) - 1) for job in sample.jobs)
    computing = computed * nanoseconds * 1e-9 / threads
    return sum(_bytes_read(sample, job) + job.nbytes for job in sample.jobs) / max(copying, computing)


def _nanoseconds(job: TensorJob) -> float | None:
    """Return what a job's arithmetic takes a processor for an element of a model beside the base; None if not known."""
    method = job.parameters.method
    values: Mapping[str, Any] = job.parameters.values
    if method.kernel is None:
        return _NANOSECONDS_IN_TORCH.get(method.name)
    if method.measure is None:
        return _NANOSECONDS["summed"]
    if "density" not in values:
        return _NANOSECONDS["measured"]
    if all(density == 1 for density in values["density"]) and "gamma" not in values:
        return _NANOSECONDS["summed"]
    if method.random:
        return _NANOSECONDS["ranked" if method.whole_rows else "dropped"]
    return _NANOSECONDS["counted"]


def _tried_out(plan: MergePlan, threads: int) -> float | None:
    """Merge a few made-up tensors, with the settings that most of the model has, from files to files."""
    job = _typical(plan.jobs)
    if job is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        trial = _made_up(plan, job, Path(folder), _TRIED_TENSORS)
        # The first merge also loads code.
        merge_to_disk(replace(trial, jobs=trial.jobs[:1]), Path(folder) / "first", threads=threads)
        started = time.perf_counter()
        merge_to_disk(trial, Path(folder) / "second", threads=threads)
        seconds = time.perf_counter() - started
    return sum(_bytes_read(trial, job) + job.nbytes for job in trial.jobs) / seconds


def _made_up(plan: MergePlan, job: TensorJob, folder: Path | None, tensors: int) -> MergePlan:
    """Return a plan of tensors like the job's, whose inputs are random numbers, in small files or in memory.

    Writing files leaves the kernel with something to carry to the disk, which is in the way of copying to it.
    """
    rows, columns = _MADE_UP_SHAPE
    noise = np.tile(np.random.default_rng(0).standard_normal((rows // 8, columns), np.float32), (8, 1))
    opened = {}
    for position, (label, stored) in enumerate(_reads(job)):
        dtype = plan.checkpoints[label].tensors[stored].dtype
        values = 0.02 * noise + 1e-3 * np.roll(noise, position, 1) if position else 0.02 * noise
        content = {f"{number}.weight": _in_dtype(values, dtype) for number in range(tensors)}
        infos = [TensorInfo(name, dtype, tensor.shape, tensor.nbytes) for name, tensor in content.items()]
        if folder is None:
            opened[label] = Checkpoint(label, content.__getitem__, infos)
            continue
        place = folder / str(position)
        place.mkdir()
        with CheckpointWriter(place, infos) as writer:
            for name, tensor in content.items():
                writer.write(name, tensor)
        opened[label] = open_checkpoint(place, label)
    names = list(content)
    jobs = tuple(replace(job, name=name, shape=_MADE_UP_SHAPE, stored=()) for name in names)
    giver = next(iter(opened.values()))
    return replace(
        plan, checkpoints=opened, jobs=jobs, statistics={}, config_from=giver, alignment=None, chat_template=None
    )


def _in_dtype(values: np.ndarray, dtype: Dtype) -> StoredTensor:
    """Return float32 numbers in another dtype; those for bfloat16 are cut and not rounded, which will do here."""
    if dtype == Dtype.BFLOAT16:
        stored = (values.view(np.uint32) >> 16).astype(np.uint16)
    else:
        stored = np.array(values, dtype.value)
    return StoredTensor(dtype, values.shape, memoryview(bytearray(stored.tobytes())))


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
