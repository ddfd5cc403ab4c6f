"""The folder of a run: who may write it, whether it is the same run, and where a killed one goes on.

    run.json           what the run is (configuration, fingerprints, counts) and whether it is complete
    log.jsonl          a line a step
    tensorboard/       the same for TensorBoard
    checkpoint-STEP/   ordinary Hugging Face folders
    heldout/           the lm-eval tasks made of held-out files, if there are any
    resume/step-STEP/  what going on needs beside the newest checkpoint, or without one; gone when the run is complete

Everything appears under its name only when it is whole. What training is, this module does not know.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dapt_merge.atomic import disk_errors_explained, write_text
from dapt_merge.errors import InputError

DETAILS_FILE = "dapt_checkpoint.json"


class RunFolder:
    """One run on the disk. `identity` is everything that, if it changed, would make it another run."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = json.loads(json.dumps(identity, default=str))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder, and keep other processes from writing to it.

        Raises:
            InputError: another process trains here; the place cannot be written to.
        """
        with disk_errors_explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    "another process is training in this folder",
                    where=self.path,
                    remedy="Wait for it or stop it, or choose another output.",
                ) from None
            yield
        finally:
            os.close(descriptor)

    def refuse_foreign(self) -> None:
        """Raise InputError when the path is a file, or a folder that holds something but no run."""
        if self.path.is_dir():
            # What is there before the record is: a run that was refused, or killed at once, may start again.
            ours = {".lock", "run.json", "heldout"}
            holds = [entry.name for entry in self.path.iterdir() if not entry.name.startswith(".run.json.partial-")]
            foreign = holds and "run.json" not in holds and not set(holds) <= ours
        else:
            foreign = os.path.lexists(self.path)
        if foreign:
            raise InputError(
                "the output exists already, and it is no DAPT run",
                where=self.path,
                remedy="Choose another name; a folder that is no run is not replaced.",
            )

    def record(self) -> dict[str, Any] | None:
        """Return what `run.json` holds, or None for a new run; another one that was refused before a step is no run.

        Raises:
            InputError: the file is damaged, or of another run; it names what differs.
        """
        file = self.path / "run.json"
        if not file.is_file():
            return None
        remedy = "Choose another output, or pass --overwrite to start again in this one."
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            identity = record["identity"]
        except (ValueError, KeyError, TypeError):
            raise InputError("the record of the run is damaged", where=file, remedy=remedy) from None
        if identity == self.identity:
            return record  # type: ignore[no-any-return]
        if self.log() or self.checkpoints():
            raise InputError(
                f"the folder holds another run; it differs in {_difference(identity, self.identity)}",
                where=self.path,
                remedy=remedy,
            )
        return None

    def write_record(self, **content: Any) -> None:
        """Write `run.json`, whole or not at all."""
        record = {"identity": self.identity, **content}
        write_text(self.path / "run.json", json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")

    def clear(self) -> None:
        """Remove what an earlier run left here."""
        for entry in self.path.iterdir():
            if entry.name != ".lock":
                _remove(entry)

    def checkpoints(self) -> dict[int, Path]:
        """Return step → folder of the complete checkpoints, in order."""
        found = {_step(entry): entry for entry in self.path.glob("checkpoint-*") if (entry / DETAILS_FILE).is_file()}
        return dict(sorted(found.items()))

    def resume_point(self) -> int | None:
        """Return the newest step with the optimizer's state and the weights that belong to it, or None."""
        states = {_step(entry) for entry in (self.path / "resume").glob("step-*")}
        return max((step for step in states if self.weights_of(step) is not None), default=None)

    def weights_of(self, step: int) -> Path | None:
        """Return where the weights of a step's state are: beside it, or else in the checkpoint of that step."""
        beside = self.state_folder(step) / "weights"
        return beside if beside.is_dir() else self.checkpoints().get(step)

    def state_folder(self, step: int) -> Path:
        """Return where the optimizer's state of a step belongs."""
        return self.path / "resume" / f"step-{step}"

    def forget_states(self, keep: int | None = None) -> None:
        """Remove the optimizer's states, but for one step's."""
        resume = self.path / "resume"
        for entry in list(resume.iterdir()) if resume.is_dir() else []:
            if keep is None or entry.name != f"step-{keep}":
                _remove(entry)
        if keep is None and resume.is_dir():
            resume.rmdir()

    def log(self) -> list[dict[str, Any]]:
        """Return the lines of the log."""
        file = self.path / "log.jsonl"
        return [json.loads(line) for line in _lines_until(file, math.inf)] if file.is_file() else []

    def go_back_to(self, step: int) -> None:
        """Remove what was written after a step: its checkpoints and log lines will be made again."""
        states = {_step(entry): entry for entry in (self.path / "resume").glob("step-*")}
        for later, folder in [*self.checkpoints().items(), *states.items()]:
            if later > step:
                _remove(folder)
        for stale in [*self.path.glob(".checkpoint-*"), *self.path.glob(".removed-*")]:
            _remove(stale)
        log = self.path / "log.jsonl"
        if log.is_file():
            write_text(log, "".join(f"{line}\n" for line in _lines_until(log, step)))


def _lines_until(log: Path, step: float) -> Iterator[str]:
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                yield line
        except (ValueError, KeyError, TypeError):
            # The last line of a killed process may be cut short.
            continue


def _remove(entry: Path) -> None:
    """Remove a file, or a folder in such a way that no half of it is ever seen under its name."""
    if entry.is_dir() and not entry.is_symlink():
        hidden = entry.parent / f".removed-{entry.name.lstrip('.')}-{os.getpid()}"
        os.rename(entry, hidden)
        shutil.rmtree(hidden)
    else:
        entry.unlink()


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Name the keys that differ, with both values where they are short."""
    parts = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before != after:
            shown = f" ({before} there, {after} now)" if len(str(before)) + len(str(after)) < 120 else ""
            parts.append(f"'{key}'{shown}")
    return ", ".join(parts)
