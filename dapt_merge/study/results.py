"""A study as plain data: read from its folder, without torch, for tables, plots and picks.

The study's folder holds `study.yaml` (the checked settings), `study.db` (Optuna's storage: any Optuna tool reads it),
`items.sqlite` (per-item scores) and `study.lock`. What this module does not know: how a trial is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from dapt_merge.errors import InputError
from dapt_merge.evaluation.items import gain_scale, gain_unit

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

State = Literal["complete", "failed", "interrupted", "running", "waiting"]

CONFIG_FILE = "study.yaml"
STORAGE_FILE = "study.db"
ITEMS_FILE = "items.sqlite"
LOCK_FILE = "study.lock"


@dataclass(frozen=True)
class Objective:
    """One axis of the study. `side` is the suite's axis, `tasks` those whose macro mean is the value."""

    name: str
    suite: str
    side: Literal["domain", "general"]
    metric: str
    direction: Literal["minimize", "maximize"]
    tasks: tuple[str, ...]

    @property
    def unit(self) -> str:
        """Unit of a gain: points (hundredths) for shares, the metric's own for bits per byte."""
        return gain_unit(self.metric)

    @property
    def scale(self) -> float:
        """Factor from the metric to the unit of a gain."""
        return gain_scale(self.metric)

    def gain(self, value: float, base: float) -> float:
        """Return the signed difference from the base in `unit`, positive when better.

        Example:
            >>> Objective("d", "s", "domain", "bits_per_byte", "minimize", ("t",)).gain(1.5, 2.0)
            0.5
        """
        return self.scale * (base - value if self.direction == "minimize" else value - base)


@dataclass(frozen=True)
class StudyTrial:
    """One trial. `values` and `standard_errors` are by objective, in the metric's unit; empty unless complete.

    `gain_standard_errors` are those of the paired differences from the base, in the objectives' units. `recipe` is the
    recipe's YAML, `model_key` the name of its items in the item store, `record` the scores of the recorded suites
    (suite → metric → macro mean), `scores` those of single tasks (`task/metric`), `failure` the reason of a failed
    trial, `endpoint` which end it is. `attrs` holds what else was noted (`merge`, `seconds`, `repeats`).
    """

    number: int
    state: State
    params: Mapping[str, Any]
    values: Mapping[str, float]
    standard_errors: Mapping[str, float]
    gain_standard_errors: Mapping[str, float] = field(default_factory=dict)
    recipe: str | None = None
    model_key: str | None = None
    endpoint: Literal["base", "dapt"] | None = None
    failure: str | None = None
    record: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The recipe in a few words; the ends are called base and DAPT."""
        from dapt_merge.study.space import describe

        if self.endpoint == "base":
            return "base"
        if self.endpoint == "dapt":
            return f"DAPT {self.params.get('checkpoint', '')}".strip()
        return describe(self.params)


@dataclass(frozen=True)
class StudyResult:
    """A study: its objectives, its trials by number, and the numbers of the two ends (None until scored).

    Example:
        >>> result = load_study("runs/sweep")  # doctest: +SKIP
        >>> [trial.label for trial in result.complete]  # doctest: +SKIP
        ['base', 'DAPT checkpoint-160', 'linear weight 0.5 · checkpoint-160']
    """

    folder: Path
    name: str
    objectives: tuple[Objective, ...]
    trials: tuple[StudyTrial, ...]
    base: int | None
    dapt: int | None
    config: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    @cached_property
    def complete(self) -> tuple[StudyTrial, ...]:
        """The trials that have values."""
        return tuple(trial for trial in self.trials if trial.state == "complete")

    @cached_property
    def finished(self) -> tuple[StudyTrial, ...]:
        """The trials that count against the budget: complete, or failed by themselves."""
        return tuple(trial for trial in self.trials if trial.state in ("complete", "failed"))

    def trial(self, number: int) -> StudyTrial:
        """Return a trial by its number."""
        return next(trial for trial in self.trials if trial.number == number)

    def objective(self, name: str) -> Objective:
        """Return an objective by its name."""
        return next(objective for objective in self.objectives if objective.name == name)

    def gains(self, trial: StudyTrial) -> dict[str, float]:
        """Return a trial's signed differences from the base by objective, positive when better, in `Objective.unit`."""
        if self.base is None or trial.state != "complete":
            return {}
        base = self.trial(self.base)
        return {o.name: o.gain(trial.values[o.name], base.values[o.name]) for o in self.objectives}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        content = {key: value for key, value in asdict(self).items() if key not in ("folder", "trials")}
        trials = [{**asdict(trial), "label": trial.label, "gains": self.gains(trial)} for trial in self.trials]
        return {"folder": str(self.folder), **content, "trials": trials}


def load_study(folder: str | Path) -> StudyResult:
    """Read a study from its folder; neither torch nor the models are needed.

    Raises:
        InputError: there is no study in the folder, or it has no trial yet.
    """
    import optuna

    folder = Path(folder)
    path = folder / CONFIG_FILE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"there is no study here ({error.strerror})", where=path, remedy="Give the folder that a search wrote to."
        ) from error
    if not isinstance(config, dict):
        raise InputError("this is not a study's file", where=path, remedy="Give the folder that a search wrote to.")
    if config.get("storage") is None and not (folder / STORAGE_FILE).is_file():
        raise InputError("the study's storage is missing", where=folder / STORAGE_FILE, remedy="Run the search again.")
    name = config.get("name", "study")
    try:
        storage = optuna.storages.RDBStorage(
            config.get("storage") or f"sqlite:///{folder.absolute() / STORAGE_FILE}", skip_table_creation=True
        )
        study = optuna.load_study(study_name=name, storage=storage)
    except Exception as error:
        raise InputError(
            f"the study's storage cannot be read: {error}", where=folder, remedy="Run the search again."
        ) from error
    return read_result(study, folder, config)


def read_result(study: optuna.Study, folder: Path, config: Mapping[str, Any]) -> StudyResult:
    """Turn an Optuna study that a search made into plain data."""
    attrs = study.user_attrs
    objectives = tuple(
        Objective(**{**objective, "tasks": tuple(objective["tasks"])}) for objective in attrs.get("objectives", [])
    )
    trials = tuple(_read_trial(trial, objectives) for trial in study.get_trials(deepcopy=False))
    ends = {trial.endpoint: trial.number for trial in trials if trial.state == "complete" and trial.endpoint}
    return StudyResult(
        folder=folder,
        name=study.study_name,
        objectives=objectives,
        trials=trials,
        base=ends.get("base"),
        dapt=ends.get("dapt"),
        config=config,
        warnings=tuple(attrs.get("warnings", [])),
    )


def _read_trial(trial: FrozenTrial, objectives: tuple[Objective, ...]) -> StudyTrial:
    attrs = dict(trial.user_attrs)
    state: State = trial.state.name.lower()
    if trial.state.name == "FAIL":
        state = "interrupted" if attrs.get("interrupted") else "failed"
    values = dict(zip((o.name for o in objectives), trial.values or (), strict=False))
    return StudyTrial(
        number=trial.number,
        state=state,
        params=dict(trial.params),
        values=values,
        standard_errors=attrs.pop("standard_errors", {}),
        gain_standard_errors=attrs.pop("gain_standard_errors", {}),
        recipe=attrs.pop("recipe", None),
        model_key=attrs.pop("model_key", None),
        endpoint=attrs.pop("endpoint", None),
        failure=attrs.pop("failure", None),
        record=attrs.pop("record", {}),
        scores=attrs.pop("scores", {}),
        seconds=trial.duration.total_seconds() if trial.duration else None,
        attrs=attrs,
    )
