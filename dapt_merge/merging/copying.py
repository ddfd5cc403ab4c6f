"""What copying the same bytes would take here: the floor that a merge is held against, from a small sample.

The idea: a sixteenth of what the merge will read and write is read from the same inputs and written beside the same
output, in as many threads and through the same buffers, without any arithmetic, and the time is scaled up. So caches,
disks and neighbours count as they are now. A sample counts for a day (`rates`): the next merges from as many inputs
with as many threads to the same disk are held against it, and one that is faster puts it right, since a merge does more
than copying.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from dapt_merge.checkpoints.page_cache import page_cache_room
from dapt_merge.checkpoints.staging import OutputFile, Staging
from dapt_merge.checkpoints.threads import map_in_threads
from dapt_merge.merging.plan import MergePlan
from dapt_merge.merging.rates import recalled_copying, remember_copying, waiting
from dapt_merge.merging.report import bytes_read

_SHARE = 16
_SMALLEST_SAMPLE_BYTES = 48 * 2**20
_LARGEST_SAMPLE_BYTES = 256 * 2**20
_WORTH_A_SAMPLE_BYTES = 200 * 10**6


def copy_seconds(plan: MergePlan, folder: Path, threads: int, *, flush: bool = False) -> float | None:
    """Estimate how long reading all inputs of a plan and writing as much as its output takes, without arithmetic.

    Args:
        plan: what will be merged.
        folder: where the output will be written; a file is made there and removed.
        threads: how many will merge.
        flush: whether the disk will be waited for.

    Returns:
        Seconds, by a sample of now or of the last day; None where inputs are computed when they are read, or the output
        is too small for a sample to tell.
    """
    if plan.nbytes < _WORTH_A_SAMPLE_BYTES or not all(c.files for c in plan.checkpoints.values()):
        return None
    kind = _kind(plan, folder, threads, flush)
    found = recalled_copying(kind)
    if found is None:
        sample = min(max(plan.nbytes // _SHARE, _SMALLEST_SAMPLE_BYTES), _LARGEST_SAMPLE_BYTES)
        found = copy_seconds_per_byte(plan, folder, threads, sample, flush=flush)
        if found is None:
            return None
        remember_copying(kind, found)
    return found * plan.nbytes


def merged_in(seconds: float, plan: MergePlan, folder: Path, threads: int, *, flush: bool = False) -> None:
    """Take the time of a merge for that of copying the same bytes, where it is less than what a sample said."""
    kind = _kind(plan, folder, threads, flush)
    sampled = recalled_copying(kind)
    if sampled is not None and seconds < sampled * plan.nbytes:
        remember_copying(kind, seconds / plan.nbytes)


def _kind(plan: MergePlan, folder: Path, threads: int, flush: bool) -> str:
    read_for_each = sum(bytes_read(plan, job) for job in plan.jobs) / plan.nbytes
    return f"{read_for_each:.1f} to 1, device {folder.stat().st_dev}, {threads} threads, {waiting(flush)}"


def copy_seconds_per_byte(
    plan: MergePlan, folder: Path, threads: int, sample: int, *, flush: bool = False
) -> float | None:
    """Return the seconds that each byte of the output takes to be copied, from a sample of so many bytes.

    Arguments as for `copy_seconds`. None when no tensor is large enough to take a sample from.
    """
    staging = Staging(threads, cached_bytes=0 if flush else page_cache_room())
    pieces = list(_pieces(plan, staging.buffer_bytes, sample))
    if not pieces:
        return None
    for buffer in [staging.take() for _ in range(2 * threads)]:
        buffer[:] = bytes(len(buffer))  # memory that is there, as after the first moments of a merge
        staging.give(buffer)
    path = folder / ".copy-sample"
    file = OutputFile(path, len(pieces) * staging.buffer_bytes)
    started = time.perf_counter()
    try:
        writes = map_in_threads(
            lambda number: _copy(pieces[number], number, file, staging),
            range(len(pieces)),
            lambda _: 1,
            threads=threads,
        )
        for write in writes:
            if write is not None:
                write.result()
        file.finish(flush=flush)
    finally:
        staging.close()
        file.close()
        path.unlink()
    return (time.perf_counter() - started) / (len(pieces) * staging.buffer_bytes)


def _pieces(plan: MergePlan, piece_bytes: int, sample: int) -> Iterator[list[np.ndarray]]:
    """Yield for pieces of the output the bytes of the inputs that they are made from, until the sample is full."""
    taken = 0
    for job in sorted(plan.jobs, key=lambda job: -job.elements):
        inputs = [np.frombuffer(plan.read(label, stored).memory, np.uint8) for label, stored in job.reads]
        for begin in range(0, job.nbytes - piece_bytes + 1, piece_bytes):
            if taken >= sample:
                return
            taken += piece_bytes
            end = begin + piece_bytes
            parts = [slice(begin * len(i) // job.nbytes, end * len(i) // job.nbytes) for i in inputs]
            yield [content[part] for content, part in zip(inputs, parts, strict=True)]


def _copy(inputs: list[np.ndarray], number: int, file: OutputFile, staging: Staging) -> Future[None] | None:
    buffer = staging.take()
    size = staging.buffer_bytes
    view = memoryview(buffer)
    whole = np.frombuffer(buffer, np.uint8)
    for content in inputs:
        for begin in range(0, len(content), size):
            part = content[begin : begin + size]
            whole[: len(part)] = part  # numpy lets other threads copy meanwhile

    def carry(cached: bool) -> None:
        try:
            file.write(view, number * size, cached=cached)
        finally:
            staging.give(buffer)

    return staging.carry(carry, size)
