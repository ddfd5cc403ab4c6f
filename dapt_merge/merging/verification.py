"""Is this output what its report says: recomputed from the recorded recipe and inputs, and compared bit for bit.

Every tensor goes through the path that a merge takes, and is compared and forgotten, so memory stays as small. What
this module does not know: how the report came to be, beyond what stands in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dapt_merge.checkpoints.checkpoint import Checkpoint, tensor_digest
from dapt_merge.checkpoints.dtypes import dtype_name
from dapt_merge.checkpoints.opening import open_checkpoint
from dapt_merge.checkpoints.threads import map_in_threads
from dapt_merge.errors import InputError
from dapt_merge.merging.plan import MergePlan, TensorJob, plan_merge
from dapt_merge.merging.report import versions
from dapt_merge.merging.stream import REPORT_FILE
from dapt_merge.merging.tensor import merge_tensor
from dapt_merge.merging.trimming import settle_cutoffs
from dapt_merge.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Verification:
    """What a recomputation found.

    Attributes:
        tensors: how many were recomputed.
        differing: tensor → how what is stored differs from what was computed; empty when nothing does.
        changed_afterwards: whether the stored tensors are others than the merge wrote, by the report's fingerprint. If
            not, and something differs, this machine computes otherwise than the one that merged.
        other_versions: package → (version then, version now), where they differ.
    """

    tensors: int
    differing: dict[str, str]
    changed_afterwards: bool
    other_versions: dict[str, tuple[str, str]]

    @property
    def same(self) -> bool:
        """Whether every tensor is stored bit for bit as it was computed again."""
        return not self.differing

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON-ready data."""
        return {"same": self.same, **asdict(self)}


def verify_merge(
    out: str | Path,
    *,
    located: Mapping[str, str] | None = None,
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Recompute a merged checkpoint and compare it with what is stored.

    Args:
        out: the output folder of a merge.
        located: reference in the recipe → where that checkpoint is now, for inputs that have moved.
        threads, on_progress: see `merge_to_disk`.

    Raises:
        InputError: `out` is no output of a merge; an input is gone, or is not the checkpoint that was merged.
    """
    report = _read_report(Path(out))
    stored = open_checkpoint(out)
    recipe = load_recipe(yaml.safe_load(report["recipe"]))
    plan = settle_cutoffs(plan_merge(recipe, _open_inputs(recipe, report, located or {})))
    faults = map_in_threads(
        lambda job: _fault(plan, job, stored),
        plan.jobs,
        size=lambda job: job.elements,
        threads=threads,
        on_progress=on_progress,
    )
    _check_inputs(plan, report, out)
    differing = {job.name: fault for job, fault in zip(plan.jobs, faults, strict=True) if fault is not None}
    computed = {job.name for job in plan.jobs}
    differing |= {name: "not part of the merge" for name in stored.tensors if name not in computed}
    now = versions()
    return Verification(
        tensors=len(faults),
        differing=differing,
        changed_afterwards=stored.fingerprint() != report["output"],
        other_versions={
            package: (then, now[package])
            for package, then in report.get("versions", {}).items()
            if package in now and now[package] != then
        },
    )


def _read_report(out: Path) -> dict[str, Any]:
    path = out / REPORT_FILE
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"there is no readable merge report ({type(error).__name__})",
            where=path,
            remedy="Give a folder that dapt-merge merge wrote.",
        ) from error
    wanted = {"recipe": str, "inputs": dict, "output": str}
    for key, kind in wanted.items():
        if not isinstance(report, dict) or not isinstance(report.get(key), kind):
            raise InputError(
                f"the report has no usable '{key}'", where=path, remedy="Merge again; this report is not whole."
            )
    return report


def _open_inputs(recipe: Recipe, report: Mapping[str, Any], located: Mapping[str, str]) -> dict[str, Checkpoint]:
    """Open the inputs that lie somewhere else than their references say from here."""
    for reference in located:
        if reference not in report["inputs"]:
            raise InputError(
                f"the merge has no input '{reference}'",
                where="arguments",
                remedy=f"Its inputs are: {', '.join(report['inputs'])}.",
            )
    opened = {}
    for reference in recipe.references():
        place = located.get(reference) or _recorded_place(reference, report)
        if place is not None:
            opened[reference] = _open_input(place, reference)
        elif not os.path.exists(os.path.expanduser(reference)):
            opened[reference] = _open_input(reference, reference)  # a hub id; or gone, and said to be
    return opened


def _recorded_place(reference: str, report: Mapping[str, Any]) -> str | None:
    """Return where the reference led from the folder that the merge was run in, if that exists."""
    start = report.get("working_folder")
    if not isinstance(start, str) or os.path.isabs(os.path.expanduser(reference)):
        return None
    place = os.path.normpath(os.path.join(start, reference))
    return place if os.path.exists(place) else None


def _open_input(place: str, reference: str) -> Checkpoint:
    try:
        return open_checkpoint(place, reference)
    except InputError as error:
        raise InputError(
            f"the input '{reference}' is gone or cannot be read: {error.what}",
            where=error.where,
            remedy=f"Put it back, or say where it is now: dapt-merge merge --verify OUT '{reference}=PATH'.",
        ) from error


def _fault(plan: MergePlan, job: TensorJob, stored: Checkpoint) -> str | None:
    """Merge one tensor, and say how what is stored differs; None when it does not."""
    merged = merge_tensor(job, plan.read, plan.recipe.seed, measure_rounding=False).tensor
    for label, name in job.reads:
        plan.checkpoints[label].digest(name)  # while the pages are warm, as in a merge
    digest = tensor_digest(merged)
    info = stored.tensors.get(job.name)
    if info is None:
        return "missing"
    if info.shape != tuple(merged.shape) or info.dtype != merged.dtype:
        return f"stored as {dtype_name(info.dtype)} {info.shape}, not {dtype_name(merged.dtype)} {job.shape}"
    if stored.digest(job.name) == digest:
        return None
    unequal = int((stored.read(job.name) != merged).sum())
    return f"{unequal:,} of {job.elements:,} elements differ"


def _check_inputs(plan: MergePlan, report: Mapping[str, Any], out: str | Path) -> None:
    for reference, checkpoint in plan.checkpoints.items():
        then, now = report["inputs"].get(reference), checkpoint.fingerprint()
        if then != now:
            raise InputError(
                f"'{reference}' is not the checkpoint that was merged: its content is {now}, the report says {then}",
                where=Path(out) / REPORT_FILE,
                remedy=f"Give the one that was: dapt-merge merge --verify OUT '{reference}=PATH'.",
            )
