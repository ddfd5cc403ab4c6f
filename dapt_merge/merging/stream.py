"""A merge from disk to disk: every tensor is mapped, merged in runs, written to its place and forgotten.

Memory holds the runs in flight and nothing else, so the size of the model does not matter. The output appears under
its name only when it is complete, and carries its recipe and its report. The mathematics is in `tensor`.

Complete means that every process reads it whole. Whether the disk has it as well is a matter of `flush`: by default
the kernel writes what is left when the merge is done, as after `cp` or safetensors' own `save_file`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dapt_merge import prefetch
from dapt_merge.atomic import atomic_folder, refuse_existing
from dapt_merge.checkpoints.chat_template import write_template
from dapt_merge.checkpoints.checkpoint import content_fingerprint
from dapt_merge.checkpoints.companions import copy_companions
from dapt_merge.checkpoints.threads import default_threads, map_in_threads
from dapt_merge.checkpoints.tokenizer_files import write_tokenizer
from dapt_merge.checkpoints.writer import DEFAULT_SHARD_BYTES, CheckpointWriter
from dapt_merge.errors import InputError
from dapt_merge.merging.card import CARD_FILE, model_card
from dapt_merge.merging.copying import copy_seconds, merged_in
from dapt_merge.merging.device import Ferry, available_device, brought_by
from dapt_merge.merging.plan import MergePlan, TensorJob
from dapt_merge.merging.rates import remember
from dapt_merge.merging.report import MergeReport, TensorOutcome, build_report, write_report
from dapt_merge.merging.resume import Journal, boot_id, resume_key
from dapt_merge.merging.tensor import Place, RoundingLoss, merge_tensor_in_runs
from dapt_merge.merging.trimming import settle_cutoffs
from dapt_merge.merging.unchanged import Unchanged
from dapt_merge.tensors.lazy_torch import torch

RECIPE_FILE = "recipe.yaml"


def merge_to_disk(
    plan: MergePlan,
    out: str | Path,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
    recipe_text: str | None = None,
    steps: Sequence[dict[str, Any]] = (),
    placed_at: Path | None = None,
    measure_copy: bool = False,
    device: str = "cpu",
    flush: bool = False,
) -> MergeReport:
    """Carry out a plan and write the merged checkpoint: weights, configuration, tokenizer, recipe and report.

    Args:
        plan: from `plan_merge`.
        out: the folder to create.
        overwrite: replace an existing output, once the new one is complete.
        threads: tensors merged at once (default: the CPUs that may be used). The bytes do not depend on it.
        shard_bytes: upper bound of a weight file.
        on_progress: called with (elements merged, elements in all).
        recipe_text: what to keep as the output's `recipe.yaml` (default: the plan's recipe).
        steps: of the recipes that made some of the inputs, for the report (`MergeReport.as_step`).
        placed_at: where the folder will lie in the end, if not at `out`.
        measure_copy: find out from a sample what copying the same bytes would take, and report it.
        device: where to compute: cpu, or cuda, which falls back to the processor with a warning.
        flush: wait until the disk has everything, so that even a power cut cannot take it away. An output that replaces
            another is waited for in any case, and so is one on a system that does not tell its boots apart.

    Raises:
        InputError: `out` exists, is one of the inputs, or cannot be written (full disk included); an input holds NaN.
    """
    refuse_existing(out, overwrite)
    _refuse_input_as_output(plan, Path(out))
    prefetch.stop()
    computing, fallback = available_device(device)
    if fallback is not None:
        plan = replace(plan, warnings=(*plan.warnings, fallback))
    plan = settle_cutoffs(plan)
    threads = threads or default_threads()
    flush = flush or os.path.lexists(out) or boot_id() is None
    key = resume_key(plan, shard_bytes, computing)
    with atomic_folder(out, overwrite=overwrite, key=key, flush=flush) as folder:
        floor = copy_seconds(plan, folder, threads, flush=flush) if measure_copy else None
        started = time.monotonic()
        journal = Journal.read(folder, plan)
        outcomes = _write_weights(plan, folder, journal, threads, shard_bytes, on_progress, computing, flush)
        journal.remove()
        write_companions(plan, folder)
        report = build_report(
            plan,
            outcomes,
            output=_output_fingerprint(outcomes),
            inputs={reference: checkpoint.fingerprint() for reference, checkpoint in plan.checkpoints.items()},
            seconds=time.monotonic() - started,
            out=placed_at or Path(out),
            steps=steps,
        )
        report = replace(report, copy_seconds=floor, resumed_tensors=len(journal.outcomes))
        (folder / RECIPE_FILE).write_text(recipe_text or report.recipe, encoding="utf-8")
        write_report(report, folder)
        (folder / CARD_FILE).write_text(model_card(report, plan.checkpoints), encoding="utf-8")
    if not report.resumed_tensors:
        if floor is not None:
            merged_in(report.seconds, plan, Path(out), threads, flush=flush)
        remember(plan, threads, report.bytes_read + report.bytes_written, time.monotonic() - started, flush=flush)
    return report


def write_companions(plan: MergePlan, folder: Path) -> None:
    """Write what goes with the merged weights into their folder: configuration, tokenizer, generation settings."""
    copy_companions(plan.config_from, folder, plan.main_dtype)
    if plan.alignment is not None:
        write_tokenizer(plan.alignment, plan.checkpoints.values(), folder)
    if plan.chat_template is not None:
        write_template(folder, plan.chat_template)


def _write_weights(
    plan: MergePlan,
    folder: Path,
    journal: Journal,
    threads: int,
    shard_bytes: int,
    on_progress: Callable[[int, int], None] | None,
    device: torch.device | None,
    flush: bool,
) -> list[TensorOutcome]:
    """Merge and write every tensor that is not in a finished file; the outcomes are in the plan's order."""
    outcomes = dict(journal.outcomes)
    checkpoints = plan.checkpoints.values()
    inputs = Unchanged(info.file for c in checkpoints for info in c.tensors.values() if info.file is not None)
    merged_on_device = None if device is None else _on_device(plan, device)

    def note(file: str, names: tuple[str, ...]) -> None:
        journal.add(folder / file, [outcomes[name] for name in names], plan, flushed=flush)

    def work(job: TensorJob) -> None:
        inputs.check()
        with writer.stream(job.name) as stream:
            if merged_on_device is not None:
                notes, rounding = merged_on_device(job, stream.place)
            else:
                notes, rounding = merge_tensor_in_runs(job, plan.read, plan.recipe.seed, stream.place)
        for label, stored in job.reads:
            # Hashed while its pages are warm: the inputs' fingerprints then cost no second reading of the files.
            plan.checkpoints[label].digest(stored)
        outcomes[job.name] = TensorOutcome(job, dict(notes), rounding, stream.digest)
        stream.complete()

    writer = CheckpointWriter(
        folder,
        plan.jobs,
        shard_bytes=shard_bytes,
        threads=threads,
        finished_files=journal.files,
        on_finished=note,
        flush=flush,
    )
    with writer:
        map_in_threads(
            work,
            [job for job in plan.jobs if job.name not in journal.outcomes],
            size=lambda job: job.elements,
            group=lambda job: writer.file_number(job.name),
            threads=threads,
            on_progress=on_progress,
        )
    inputs.check()
    return [outcomes[job.name] for job in plan.jobs]


def _on_device(
    plan: MergePlan, device: torch.device
) -> Callable[[TensorJob, Place], tuple[Mapping[str, object], RoundingLoss | None]]:
    """Return a way to merge a tensor on a device, for any thread."""
    own = threading.local()

    def merged(job: TensorJob, home: Place) -> tuple[Mapping[str, object], RoundingLoss | None]:
        if not hasattr(own, "ferry"):
            own.ferry = Ferry(device)
        with own.ferry.at_work(job.name), own.ferry.returning(home) as place:
            return merge_tensor_in_runs(job, brought_by(own.ferry, plan.read), plan.recipe.seed, place)

    return merged


def _output_fingerprint(outcomes: list[TensorOutcome]) -> str:
    return content_fingerprint((o.job.name, o.job.out_dtype, o.job.shape, o.digest or b"") for o in outcomes)


def _refuse_input_as_output(plan: MergePlan, out: Path) -> None:
    target = out.resolve()
    for reference, checkpoint in plan.checkpoints.items():
        folders = {info.file.parent for info in checkpoint.tensors.values() if info.file is not None}
        if checkpoint.folder is not None:
            folders.add(checkpoint.folder)
        if any(folder.resolve().is_relative_to(target) for folder in folders):
            raise InputError(
                f"the output would replace its own input '{reference}'",
                where=out,
                remedy="Choose another output folder.",
            )
