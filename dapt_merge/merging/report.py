"""What a merge did, kept beside its result: inputs by content, what each tensor got, rounding, warnings, versions.

The report is plain data; it decides nothing and prints nothing. It goes where the model goes, so it says how to get
from the output's folder to the inputs, and not where on this machine all of that lies.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dapt_merge.merging.explanation import explain
from dapt_merge.merging.plan import MergePlan, TensorJob
from dapt_merge.merging.tensor import MergedTensor, RoundingLoss
from dapt_merge.recipe import recipe_fingerprint
from dapt_merge.tensors.dtypes import Dtype

REPORT_FILE = "merge_report.json"
# Above this share the update that is written is visibly not the one that was asked for.
_LOSS_WORTH_A_WARNING = 0.05


@dataclass(frozen=True)
class TensorOutcome:
    """What is kept of one merged tensor once its values are written; `digest` is of the output's bytes."""

    job: TensorJob
    notes: Mapping[str, object]
    rounding: RoundingLoss | None
    digest: bytes | None = None

    @classmethod
    def of(cls, job: TensorJob, merged: MergedTensor, digest: bytes | None = None) -> TensorOutcome:
        """Keep everything but the values."""
        return cls(job, dict(merged.notes), merged.rounding, digest)


@dataclass(frozen=True)
class MergeReport:
    """The account of one merge.

    Attributes:
        recipe: the recipe as YAML.
        fingerprint: of recipe and inputs: equal fingerprints give equal weights.
        inputs: reference → content fingerprint.
        output: content fingerprint of the merged tensors; None when they went into a live model.
        tensors: how many were merged.
        fallbacks: how many of them a method merged in another way than its own (SLERP of near-parallel tensors); None
            when the engine does not tell.
        notes: tensor → what its method noted, for the tensors where it noted something.
        updated_elements, lost_elements: elements that the merge moved as computed, and those that rounding to the
            output dtype moved back; None when no tensor was rounded.
        lost_share: lost per updated element, or None.
        warnings: sentences for the user.
        bytes_read, bytes_written: sizes of the tensors read and produced.
        seconds: wall time of reading, merging and writing.
        copy_seconds: what copying the same bytes would have taken there, by a sample of that day (`copying`); None: not
            measured.
        resumed_tensors: how many of the tensors an interrupted run of the same merge had written.
        versions: package → version.
        tokens: where embeddings were aligned: reference → how many of its tokens moved, are dropped, or came to it.
        vocabulary: there too: whose tokens the output has, how many, and a fingerprint of where every row comes from.
        engine: what computed it: native, or mergekit.
        working_folder: where the relative paths of the recipe start from, as a path from the output's folder; None
            when the merge was not written, or when the two folders share nothing but the root.
        lines: what each tensor got: for tensors that were merged alike, their names, method, parameters and dtype, as
            `dapt-merge explain --json` says it; empty when the merge was not written.
        rounding: tensor → [elements updated, elements lost], for those that were rounded; empty likewise.
        steps: the recipes before this one in its file, in their order: name, recipe, inputs and output of each.
    """

    recipe: str
    fingerprint: str
    inputs: dict[str, str]
    output: str | None
    tensors: int
    fallbacks: int | None
    notes: dict[str, dict[str, object]]
    updated_elements: int | None
    lost_elements: int | None
    lost_share: float | None
    warnings: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    seconds: float
    versions: dict[str, str]
    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)
    vocabulary: dict[str, Any] = field(default_factory=dict)
    engine: str = "native"
    working_folder: str | None = None
    lines: tuple[dict[str, Any], ...] = ()
    rounding: dict[str, list[int]] = field(default_factory=dict)
    steps: tuple[dict[str, Any], ...] = ()
    copy_seconds: float | None = None
    resumed_tensors: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        listed = ("warnings", "lines", "steps")
        return {**asdict(self), **{name: list(getattr(self, name)) for name in listed}}

    def as_step(self, name: str) -> dict[str, Any]:
        """Return what a later recipe's report keeps of this merge, whose output goes by `name` there."""
        return {"name": name, "recipe": self.recipe, "inputs": dict(self.inputs), "output": self.output}


def write_report(report: MergeReport, folder: Path) -> None:
    """Write the report into an output's folder."""
    text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
    (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")


def way_to_inputs(out: Path) -> str | None:
    """Return the current folder as seen from an output's folder, or None when only the root is above both."""
    here, there = os.path.realpath(os.getcwd()), os.path.realpath(out)
    try:
        shared = os.path.commonpath([here, there])
    except ValueError:  # on two drives
        return None
    return None if Path(shared) == Path(shared).parent else Path(os.path.relpath(here, there)).as_posix()


def build_report(
    plan: MergePlan,
    outcomes: Sequence[TensorOutcome],
    *,
    output: str | None,
    inputs: dict[str, str],
    seconds: float,
    out: Path | None = None,
    steps: Sequence[dict[str, Any]] = (),
) -> MergeReport:
    """Sum up the outcomes of a plan's jobs.

    Args:
        plan, outcomes: what was to be done, and what came of it.
        output: the content fingerprint of the result, where it has one.
        inputs: reference → content fingerprint.
        seconds: what it took.
        out: the folder that the result will lie in; None for one in memory.
        steps: of the recipes before this one (`MergeReport.as_step`).
    """
    measured = [outcome.rounding for outcome in outcomes if outcome.rounding is not None]
    loss = sum(measured, RoundingLoss())
    return MergeReport(
        recipe=plan.recipe.to_yaml(),
        fingerprint=recipe_fingerprint(plan.recipe, inputs, plan.alignment.fingerprint() if plan.alignment else None),
        inputs=inputs,
        output=output,
        tensors=len(outcomes),
        fallbacks=sum("fallback" in outcome.notes for outcome in outcomes),
        notes={outcome.job.name: dict(outcome.notes) for outcome in outcomes if outcome.notes},
        updated_elements=loss.updated if measured else None,
        lost_elements=loss.lost if measured else None,
        lost_share=loss.share if measured else None,
        warnings=(*plan.warnings, *_rounding_warnings(plan, loss), *_statistics_warnings(plan, inputs)),
        bytes_read=sum(bytes_read(plan, outcome.job) for outcome in outcomes),
        bytes_written=sum(outcome.job.nbytes for outcome in outcomes),
        seconds=seconds,
        versions=versions(),
        tokens={} if plan.alignment is None else {label: dict(row) for label, row in plan.alignment.report.items()},
        vocabulary={} if plan.alignment is None else plan.alignment.to_dict(),
        working_folder=None if out is None else way_to_inputs(out),
        lines=() if out is None else tuple(line.to_dict() for line in explain(plan)),
        rounding={}
        if out is None
        else {o.job.name: [o.rounding.updated, o.rounding.lost] for o in outcomes if o.rounding is not None},
        steps=tuple(steps),
    )


def versions(*more: str) -> dict[str, str]:
    """Return the versions of what computes and writes a merge, and of `more` packages."""
    packages = ("dapt-merge", "torch", "safetensors", "transformers", *more)
    return {"python": platform.python_version()} | {package: _version_of(package) for package in packages}


@cache  # a search writes hundreds of reports, and finding a version means reading files
def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def bytes_read(plan: MergePlan, job: TensorJob) -> int:
    """Return how many bytes of checkpoints and statistics one merged tensor is made from."""
    reads = job.reads if job.target_read is None else (*job.reads, job.target_read)
    tensors = sum(plan.checkpoints[label].tensors[stored].nbytes for label, stored in reads)
    numbers = [math.prod(plan.statistics[place[0]].shapes[place[1]]) for place in job.statistics if place is not None]
    return tensors + 4 * sum(numbers)


def _statistics_warnings(plan: MergePlan, inputs: Mapping[str, str]) -> list[str]:
    """Name the statistics that were collected from other weights than those they were used for."""
    used = {
        (place[0], label)
        for job in plan.jobs
        for place, label in zip(job.statistics or (None,) * len(job.models), job.models, strict=True)
        if place
    }
    return [
        f"the statistics {path} were collected from other weights than {label}"
        for path, label in sorted(used)
        if plan.statistics[path].model != inputs.get(label)
    ]


def _rounding_warnings(plan: MergePlan, loss: RoundingLoss) -> list[str]:
    if loss.share <= _LOSS_WORTH_A_WARNING:
        return []
    keeps = "float64" if any(job.out_dtype == Dtype.FLOAT32 for job in plan.jobs) else "float32"
    return [
        f"rounding to the output dtype lost {loss.share:.0%} of the updated elements (they fell back to the base's"
        f" value); out_dtype: {keeps} keeps them."
    ]
