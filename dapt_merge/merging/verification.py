"""Is this output what its report says: recomputed from the recorded recipes and inputs, and compared bit for bit.

Every tensor goes through the path that a merge takes, and is compared and forgotten, so memory stays as small. The
outputs of earlier recipes in a file are made again in a folder that is removed afterwards; what mergekit computed,
mergekit computes again. The configuration and the tokenizer's files are compared too. What this module does not know:
how the report came to be, beyond what stands in it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dapt_merge.checkpoints.checkpoint import Checkpoint, tensor_digest
from dapt_merge.checkpoints.companions import COMPANIONS
from dapt_merge.checkpoints.hub import looks_like_hub_id
from dapt_merge.checkpoints.opening import open_checkpoint
from dapt_merge.checkpoints.threads import map_in_threads
from dapt_merge.errors import InputError
from dapt_merge.merging.plan import MergePlan, TensorJob, plan_merge
from dapt_merge.merging.report import REPORT_FILE, versions
from dapt_merge.merging.stream import merge_to_disk, write_companions
from dapt_merge.merging.tensor import merge_tensor
from dapt_merge.merging.trimming import settle_cutoffs
from dapt_merge.recipe import Recipe, load_recipe, recipe_fingerprint
from dapt_merge.recipe.reading import relocated
from dapt_merge.tensors.dtypes import Dtype

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None] | None


@dataclass(frozen=True)
class Verification:
    """What a recomputation found.

    Attributes:
        tensors: how many were recomputed.
        differing: tensor → how what is stored differs from what was computed; empty when nothing does.
        files: the same for the configuration and the files of the tokenizer.
        changed_afterwards: whether the stored tensors are others than the merge wrote, by the report's fingerprint. If
            not, and something differs, this machine computes otherwise than the one that merged.
        other_versions: package → (version then, version now), where they differ.
        engine: what computed the tensors again: native, or mergekit.
    """

    tensors: int
    differing: dict[str, str]
    changed_afterwards: bool
    other_versions: dict[str, tuple[str, str]]
    files: dict[str, str] = field(default_factory=dict)
    engine: str = "native"

    @property
    def same(self) -> bool:
        """Whether every tensor and file is stored bit for bit as it was made again."""
        return not self.differing and not self.files

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON-ready data."""
        return {"same": self.same, **asdict(self)}


def verify_merge(
    out: str | Path,
    *,
    located: Mapping[str, str] | None = None,
    threads: int | None = None,
    on_progress: Progress = None,
) -> Verification:
    """Recompute a merged checkpoint and compare it with what is stored.

    Inputs with relative paths are looked for from where the merge was run, then from the current folder, then from the
    folders above the output.

    Args:
        out: the output folder of a merge.
        located: path in the recipe → where that checkpoint or file is now, for inputs that have moved.
        threads, on_progress: see `merge_to_disk`; progress counts anew for each recipe of a file.

    Raises:
        InputError: `out` is no output of a merge; an input is gone, or is not the checkpoint that was merged.
    """
    out = Path(out)
    report = _read_report(out)
    inputs = _Inputs(out, report, located or {})
    stored = open_checkpoint(out)
    if report.get("engine") == "mergekit":
        with _steps_made_again(inputs, report, out, threads, on_progress) as made:
            differing, files = _differences_from_mergekit(inputs, report, stored, out, made)
    else:
        with _steps_made_again(inputs, report, out, threads, on_progress) as made:
            plan = settle_cutoffs(inputs.plan(report["recipe"], made))
            differing = _differences(plan, stored, threads, on_progress)
            inputs.check(plan.checkpoints, report["inputs"])
            if differing:
                _check_statistics(plan, report, out)
            with tempfile.TemporaryDirectory() as folder:
                write_companions(plan, Path(folder))
                files = _differing_files(out, Path(folder))
    now = versions()
    return Verification(
        tensors=len(stored.tensors.keys() | differing.keys()),
        differing=differing,
        files=files,
        changed_afterwards=stored.fingerprint() != report["output"],
        other_versions={
            package: (then, now[package])
            for package, then in report.get("versions", {}).items()
            if package in now and now[package] != then
        },
        engine=report.get("engine", "native"),
    )


class _Inputs:
    """Where the inputs of a merge are now, and whether they are what they were."""

    def __init__(self, out: Path, report: Mapping[str, Any], located: Mapping[str, str]) -> None:
        self._out, self._located = out, located
        self._steps = {step["name"] for step in report.get("steps", ())}
        self._recorded: dict[str, str] = {}  # reference now → as it stands in the recipe
        start = report.get("working_folder")
        above = [*out.resolve().parents]
        self._starts = [*([out.resolve() / start] if isinstance(start, str) else []), Path.cwd(), *above]
        known: list[str] = []
        for text in (*(step["recipe"] for step in report.get("steps", ())), report["recipe"]):
            relocated(_recipe(text), lambda reference: known.append(reference) or reference)  # type: ignore[func-returns-value]
        for reference in located:
            if reference not in known:
                raise InputError(
                    f"the merge has no input '{reference}'",
                    where="arguments",
                    remedy=f"Its inputs are: {', '.join(dict.fromkeys(known))}.",
                )

    def recipe(self, text: str) -> Recipe:
        """Return a recorded recipe with paths that lead to the inputs from here."""
        recorded = _recipe(text)
        found = relocated(recorded, self._find)
        self._recorded |= dict(zip(found.references(), recorded.references(), strict=True))
        return found

    def plan(self, text: str, made: Mapping[str, Checkpoint]) -> MergePlan:
        """Plan a recorded recipe anew; `made` are the outputs of earlier recipes."""
        return plan_merge(self.recipe(text), made)

    def check(self, checkpoints: Mapping[str, Checkpoint], recorded: Mapping[str, str]) -> None:
        """Refuse inputs whose content is not what it was."""
        for reference, checkpoint in checkpoints.items():
            name = self._recorded[reference]
            then, now = recorded.get(name), checkpoint.fingerprint()
            if then != now:
                raise InputError(
                    f"'{name}' is not the checkpoint that was merged: its content is {now}, the report says {then}",
                    where=self._out / REPORT_FILE,
                    remedy=f"Give the one that was: dapt-merge merge --verify OUT '{name}=PATH'.",
                )

    def _find(self, reference: str) -> str:
        if reference in self._steps:
            return reference
        if reference in self._located:
            return self._opened(self._located[reference], reference)
        path = Path(reference).expanduser()
        place = next((start / path for start in self._starts if os.path.exists(start / path)), None)
        if place is not None:
            return os.path.normpath(place)
        if "+" in reference:  # its two parts are asked for next
            return reference
        return self._opened(reference, reference)  # a hub id; or gone, and said to be

    def _opened(self, place: str, reference: str) -> str:
        """Return the place once it is known that something is there."""
        try:
            if looks_like_hub_id(place) or not os.path.exists(place):
                open_checkpoint(place, reference)
        except InputError as error:
            raise InputError(
                f"the input '{reference}' is gone or cannot be read: {error.what}",
                where=error.where,
                remedy=f"Put it back, or say where it is now: dapt-merge merge --verify OUT '{reference}=PATH'.",
            ) from error
        return place


def _recipe(text: str) -> Recipe:
    return load_recipe(yaml.safe_load(text))


@contextmanager
def _steps_made_again(
    inputs: _Inputs, report: Mapping[str, Any], out: Path, threads: int | None, on_progress: Progress
) -> Iterator[dict[str, Checkpoint]]:
    """Yield the outputs that the last recipe used, by name, as they lie on the disk for as long as they are needed."""
    made: dict[str, Checkpoint] = {}
    if not report.get("steps"):
        yield made
        return
    beside = out.resolve().parent
    room = beside if os.access(beside, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.verify-", dir=room) as folder:
        for number, step in enumerate(report["steps"]):
            place = Path(folder) / f"{number}"
            if report.get("engine") == "mergekit":
                _merged_by_mergekit(inputs, step["recipe"], step["inputs"], place, made)
            else:
                plan = inputs.plan(step["recipe"], made)
                merge_to_disk(plan, place, threads=threads, on_progress=on_progress)
                inputs.check(plan.checkpoints, step["inputs"])
            made[step["name"]] = open_checkpoint(place, step["name"])
        yield made


def _check_statistics(plan: MergePlan, report: Mapping[str, Any], out: Path) -> None:
    """Refuse statistics files that are not what they were: the fingerprint of a merge counts their content in."""
    checkpoints = {reference: checkpoint.fingerprint() for reference, checkpoint in plan.checkpoints.items()}
    if plan.statistics and recipe_fingerprint(plan.recipe, checkpoints) != report.get("fingerprint"):
        raise InputError(
            f"the statistics are not those of the merge: {', '.join(plan.statistics)}",
            where=out / REPORT_FILE,
            remedy="Give those that were: dapt-merge merge --verify OUT 'FILE=PATH'.",
        )


def _differences(plan: MergePlan, stored: Checkpoint, threads: int | None, on_progress: Progress) -> dict[str, str]:
    faults = map_in_threads(
        lambda job: _fault(plan, job, stored),
        plan.jobs,
        size=lambda job: job.elements,
        threads=threads,
        on_progress=on_progress,
    )
    differing = {job.name: fault for job, fault in zip(plan.jobs, faults, strict=True) if fault is not None}
    computed = {job.name for job in plan.jobs}
    return differing | {name: "not part of the merge" for name in stored.tensors if name not in computed}


def _differences_from_mergekit(
    inputs: _Inputs, report: Mapping[str, Any], stored: Checkpoint, out: Path, made: Mapping[str, Checkpoint]
) -> tuple[dict[str, str], dict[str, str]]:
    """Let mergekit merge again, with the seed that it had, and compare."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.verify-", dir=out.resolve().parent) as folder:
        _merged_by_mergekit(inputs, report["recipe"], report["inputs"], Path(folder) / "again", made)
        again = open_checkpoint(Path(folder) / "again")
        names = again.tensors.keys()
        found = {name: _difference(again.read(name), name, stored) for name in names}
        differing = {name: fault for name, fault in found.items() if fault is not None}
        differing |= {name: "not part of the merge" for name in stored.tensors if name not in names}
        return differing, _differing_files(out, Path(folder) / "again")


def _merged_by_mergekit(
    inputs: _Inputs, text: str, recorded: Mapping[str, str], place: Path, made: Mapping[str, Checkpoint]
) -> None:
    """Check a recipe's inputs and let mergekit merge them into a folder."""
    from dapt_merge.merging.mergekit_engine import merge_with_mergekit

    recipe = inputs.recipe(text)
    opened = {reference: made.get(reference) or open_checkpoint(reference) for reference in recipe.references()}
    inputs.check(opened, recorded)
    folders = {name: checkpoint.folder for name, checkpoint in made.items() if checkpoint.folder is not None}
    merge_with_mergekit(recipe, place, given=folders)


def _differing_files(out: Path, expected: Path) -> dict[str, str]:
    """Compare the files that go with the weights; what somebody added, such as a card of their own, is theirs."""
    found = {}
    for name in ("config.json", *COMPANIONS):
        wanted, given = expected / name, out / name
        if wanted.is_file() != given.is_file():
            found[name] = "missing" if wanted.is_file() else "not part of the merge"
        elif wanted.is_file() and wanted.read_bytes() != given.read_bytes():
            found[name] = "differs from the inputs' own"
    return found


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


def _fault(plan: MergePlan, job: TensorJob, stored: Checkpoint) -> str | None:
    """Merge one tensor, and say how what is stored differs; None when it does not."""
    merged = merge_tensor(job, plan.read, plan.recipe.seed, measure_rounding=False).tensor
    for label, name in job.reads:
        if label in plan.checkpoints:
            plan.checkpoints[label].digest(name)  # while the pages are warm, as in a merge
    return _difference(merged, job.name, stored)


def _difference(expected: Tensor, name: str, stored: Checkpoint) -> str | None:
    info = stored.tensors.get(name)
    if info is None:
        return "missing"
    if info.shape != tuple(expected.shape) or info.dtype != Dtype.of(expected.dtype):
        wanted = f"{Dtype.of(expected.dtype)} {tuple(expected.shape)}"
        return f"stored as {info.dtype} {info.shape}, not {wanted}"
    if stored.digest(name) == tensor_digest(expected):
        return None
    found = stored.read(name)
    unequal = int((found != expected).sum())
    if not unequal:
        return "other bits of the same numbers"
    furthest = float((found.double() - expected.double()).abs().max())
    return f"{unequal:,} of {expected.numel():,} elements differ, by up to {furthest:.2g}"
