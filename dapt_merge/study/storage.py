"""A study's folder and its Optuna storage: made once, locked while a search runs, taken up again after any death.

The idea: Optuna's storage is the only truth. A trial is in it as finished with all its values or not at all, so a
killed search has nothing to repair but the trial that was running; that one is marked and its point is tried again.
What this module does not know: what a trial computes.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dapt_merge.atomic import disk_errors_explained, write_text
from dapt_merge.errors import DaptMergeError, InputError
from dapt_merge.study.results import CONFIG_FILE, LOCK_FILE

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from dapt_merge.study.config import StudyConfig


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the study's folder for this process; the operating system lets go of it when the process dies.

    Raises:
        DaptMergeError: another process searches here.
    """
    with disk_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("a+")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise DaptMergeError(
                f"another search is running here (process {lock.read().strip() or 'unknown'})",
                where=folder,
                remedy="Wait for it, or stop it; or give this search its own output folder.",
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def open_study(config: StudyConfig, identity: Mapping[str, Any]) -> optuna.Study:
    """Create the study, or take up the one that the folder holds.

    Args:
        config: the checked settings.
        identity: plain data of all that decides a trial's values: settings but the budget, and content fingerprints.

    Raises:
        InputError: the folder holds a study with another identity; the first settings that differ are named.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = [objective.direction for objective in config.objectives.values()]
    try:
        study = optuna.create_study(
            study_name=config.name,
            storage=optuna.storages.RDBStorage(config.storage_url()),
            directions=directions,
            load_if_exists=True,
        )
    except Exception as error:
        raise InputError(
            f"the study's storage cannot be opened: {error}",
            where=config.storage_url(),
            remedy="Choose another output folder, or correct `storage`.",
        ) from error
    check_identity(study, "identity", identity, config.folder)
    study.set_metric_names(list(config.objectives))
    settings = config.model_dump(mode="json", exclude_none=True)
    write_text(config.folder / CONFIG_FILE, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    return study


def check_identity(study: optuna.Study, key: str, identity: Mapping[str, Any], folder: Path) -> None:
    """Compare with what the study was made with, or note it in a new study.

    Raises:
        InputError: they differ.
    """
    stored = study.user_attrs.get(key)
    if stored is None:
        study.set_user_attr(key, dict(identity))
        return
    before, now = _leaves(stored), _leaves(identity)
    changed = [name for name in sorted({**before, **now}) if before.get(name) != now.get(name)]
    if changed:
        told = "; ".join(f"{n} was {before.get(n, 'absent')}, is {now.get(n, 'absent')}" for n in changed[:3])
        raise InputError(
            f"the folder holds a study made with other settings: {told}" + ("; …" if len(changed) > 3 else ""),
            where=folder,
            remedy="Choose another output folder, or restore the settings; only the budget may change.",
        )


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {
            name: leaf
            for key, item in value.items()
            for name, leaf in _leaves(item, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    if isinstance(value, list | tuple):
        return {prefix: [_leaves(item) if isinstance(item, Mapping) else item for item in value]}
    return {prefix: value}


def counts(trial: FrozenTrial) -> bool:
    """Say whether a trial counts against the budget: complete, or failed by itself and not one of the two ends."""
    if trial.state.name == "FAIL":
        return not trial.user_attrs.get("interrupted") and "endpoint" not in trial.user_attrs
    return trial.state.name == "COMPLETE"


def take_up_interrupted(study: optuna.Study) -> list[int]:
    """Fail every trial that was running when its process died, and enqueue its point again.

    A trial that died before all of its parameters were proposed is not enqueued: its place, and so its seed and its
    proposal, go to the next trial.

    Returns:
        the numbers of the trials that were interrupted.
    """
    import optuna

    storage = study._storage
    running = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
    waiting = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
    again = {trial.user_attrs.get("repeats") for trial in waiting}
    for trial in running:
        point = trial.params if trial.user_attrs.get("proposed") else trial.system_attrs.get("fixed_params")
        if point and trial.number not in again:
            kept = {key: value for key, value in trial.user_attrs.items() if key == "endpoint"}
            # First enqueue, then fail: a death in between repeats this step and not the trial.
            study.enqueue_trial(dict(point), user_attrs={**kept, "repeats": trial.number})
        storage.set_trial_user_attr(trial._trial_id, "interrupted", True)
        storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.FAIL)
    return [trial.number for trial in running]
