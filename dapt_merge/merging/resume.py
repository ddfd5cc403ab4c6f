"""What a killed merge has finished, so that the same command goes on from there.

The idea: a merge's partial folder is named after everything that its bytes depend on, and a journal in it lists the
weight files that are whole on the disk, with what the report needs of their tensors. Another recipe, another input or a
changed one gives another name, so nothing stale can be taken over. What this module does not know: how files are
written, and how a tensor is merged.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from dapt_merge.merging.plan import MergePlan, TensorJob
from dapt_merge.merging.report import TensorOutcome, versions
from dapt_merge.merging.tensor import RoundingLoss
from dapt_merge.merging.unchanged import identity

JOURNAL_FILE = ".finished.jsonl"


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
            if not weights.is_file() or weights.stat().st_size != entry["nbytes"]:
                continue
            files.append(entry["file"])
            for name, row in entry["tensors"].items():
                outcomes[name] = _outcome(jobs[name], row)
                for (label, stored), digest in zip(jobs[name].reads, row["inputs"], strict=True):
                    plan.checkpoints[label].remember_digest(stored, bytes.fromhex(digest))
        return cls(path, tuple(files), outcomes)

    def add(self, file: Path, outcomes: Iterable[TensorOutcome], plan: MergePlan) -> None:
        """Note that a file is whole on the disk."""
        entry = {
            "file": file.name,
            "nbytes": file.stat().st_size,
            "tensors": {outcome.job.name: _row(outcome, plan) for outcome in outcomes},
        }
        with self._lock, open(self.path, "ab") as journal:
            journal.write(json.dumps(entry).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())

    def remove(self) -> None:
        """Remove the journal: the output is complete."""
        self.path.unlink(missing_ok=True)


def _entries(path: Path) -> list[dict[str, Any]]:
    """Return the journal's lines; the last is cut away where a kill cut it short: its file is made again."""
    if not path.is_file():
        return []
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        path.write_bytes(whole + b"\n" if whole else b"")
    return [json.loads(line) for line in whole.splitlines()]


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
