"""What a killed merge has finished, so that the same command goes on from there.

The idea: a merge's partial folder is named after everything that its bytes depend on, and a journal in it lists the
weight files that are whole, with what the report needs of their tensors. Another recipe, another input or a changed one
gives another name, so nothing stale can be taken over. A file that nobody has waited for is whole only until the power
is cut, so its line names the boot of the machine, and counts in that boot alone. What this module does not know: how
files are written, and how a tensor is merged.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from dapt_merge.merging.plan import MergePlan, TensorJob
from dapt_merge.merging.report import TensorOutcome, versions
from dapt_merge.merging.tensor import RoundingLoss
from dapt_merge.merging.unchanged import identity
from dapt_merge.tensors.lazy_torch import torch

JOURNAL_FILE = ".finished.jsonl"
_BOOT_FILE = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str | None:
    """Return what tells this boot of the machine from every other; None where the system does not say."""
    try:
        return _BOOT_FILE.read_text(encoding="ascii").strip() or None
    except OSError:
        return None


def resume_key(plan: MergePlan, shard_bytes: int, device: torch.device | None) -> str | None:
    """Return a name for everything that the output's bytes depend on; None where that cannot be told without reading.

    Inputs are told apart by path, size, inode and times of their files, so a merge of tensors in memory, or of ones
    that are computed from several files, has no name and starts anew.
    """
    if plan.alignment is not None or not all(checkpoint.files for checkpoint in plan.checkpoints.values()):
        return None
    files = [file for checkpoint in plan.checkpoints.values() for file in checkpoint.files]
    files += [Path(path) for path in plan.statistics]
    content = {
        "recipe": plan.recipe.to_yaml(),
        "jobs": [_described(job) for job in plan.jobs],
        "labels": [(label, [str(file) for file in c.files]) for label, c in plan.checkpoints.items()],
        "files": [(str(file.resolve()), *identity(file)) for file in files],
        "shard_bytes": shard_bytes,
        "device": str(device),
        "versions": versions(),
    }
    return xxhash.xxh3_128(json.dumps(content).encode()).hexdigest()


def _described(job: TensorJob) -> list[str]:
    places = (job.shape, job.out_dtype, job.reads, job.target_read, job.layer, job.num_layers, job.statistics)
    return [job.name, *map(str, places), job.parameters.method.name, repr(job.parameters.values)]


@dataclass
class Journal:
    """The finished weight files of one output folder.

    Attributes:
        files: names of those that an earlier process finished.
        outcomes: tensor → what is kept of it, for the tensors in them.
    """

    path: Path
    files: tuple[str, ...] = ()
    outcomes: Mapping[str, TensorOutcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    @classmethod
    def read(cls, folder: Path, plan: MergePlan) -> Journal:
        """Read the journal in a folder of this plan (see `resume_key`); hand the inputs' digests to the checkpoints."""
        path = folder / JOURNAL_FILE
        jobs = {job.name: job for job in plan.jobs}
        files: list[str] = []
        outcomes: dict[str, TensorOutcome] = {}
        for entry in _entries(path):
            weights = folder / entry["file"]
            if entry.get("boot") not in (None, boot_id()):
                continue  # the disk may not have got what the page cache held
            if not weights.is_file() or weights.stat().st_size != entry["nbytes"]:
                continue
            files.append(entry["file"])
            for name, row in entry["tensors"].items():
                outcomes[name] = _outcome(jobs[name], row)
                for (label, stored), digest in zip(jobs[name].reads, row["inputs"], strict=True):
                    plan.checkpoints[label].remember_digest(stored, bytes.fromhex(digest))
        return cls(path, tuple(files), outcomes)

    def add(self, file: Path, outcomes: Iterable[TensorOutcome], plan: MergePlan, *, flushed: bool = True) -> None:
        """Note that a file is whole: on the disk, or, if not flushed, as long as the machine stays up."""
        entry = {
            "file": file.name,
            "boot": None if flushed else boot_id(),
            "nbytes": file.stat().st_size,
            "tensors": {outcome.job.name: _row(outcome, plan) for outcome in outcomes},
        }
        with self._lock, open(self.path, "ab") as journal:
            journal.write(json.dumps(entry).encode() + b"\n")
            if flushed:
                journal.flush()
                os.fsync(journal.fileno())

    def remove(self) -> None:
        """Remove the journal: the output is complete."""
        self.path.unlink(missing_ok=True)


def _entries(path: Path) -> list[dict[str, Any]]:
    """Return the journal's lines; from one on that a kill or a power cut has spoilt they are cut away.

    The files that those name are made again.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    entries, whole = [], 0
    for line in content.splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            break
        entries.append(entry)
        whole += len(line)
    if whole < len(content):
        path.write_bytes(content[:whole])
    return entries


def _row(outcome: TensorOutcome, plan: MergePlan) -> dict[str, Any]:
    loss = outcome.rounding
    return {
        "digest": (outcome.digest or b"").hex(),
        "inputs": [plan.checkpoints[label].digest(stored).hex() for label, stored in outcome.job.reads],
        "notes": dict(outcome.notes),
        "rounding": None if loss is None else [loss.updated, loss.lost],
    }


def _outcome(job: TensorJob, row: Mapping[str, Any]) -> TensorOutcome:
    loss: Sequence[int] | None = row["rounding"]
    return TensorOutcome(job, row["notes"], None if loss is None else RoundingLoss(*loss), bytes.fromhex(row["digest"]))
