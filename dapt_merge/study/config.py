"""A study's file: what to search, what to score it on, how long; checked before anything heavy starts.

The YAML names a base, the checkpoints of one DAPT run, a space of recipes, two or more objectives and a budget. Every
key that is not understood is refused, every path is made absolute, so that what runs is what was written. What this
module does not know: what the settings of the space mean (`space`), and how anything is scored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dapt_merge.errors import InputError, nearest
from dapt_merge.yaml_files import explained, located, overridden, read_mapping

SAMPLERS = ("tpe", "nsgaii", "nsgaiii", "gp", "qmc", "random", "grid")
MINIMISED_METRICS = ("bits_per_byte", "brier_score")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ObjectiveConfig(_Section):
    """One axis of the trade: the macro mean of `metric` over the tasks of a suite.

    `direction` defaults to minimize for bits per byte and the Brier score, and to maximize for everything else.
    """

    suite: str
    metric: str
    direction: Literal["minimize", "maximize"] = None  # type: ignore[assignment]

    @model_validator(mode="before")
    @classmethod
    def _default_direction(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("direction") is None and "metric" in given:
            return {**given, "direction": "minimize" if given["metric"] in MINIMISED_METRICS else "maximize"}
        return given


class SamplerConfig(_Section):
    """Which Optuna sampler proposes the trials; `options` are its constructor's own arguments.

    `grid` takes every point of a finite space once, in a seeded order (it knows conditional parameters, which Optuna's
    GridSampler does not).
    """

    name: Literal["tpe", "nsgaii", "nsgaiii", "gp", "qmc", "random", "grid"] = "tpe"
    seed: int = Field(0, ge=0)
    options: dict[str, Any] = {}


class BudgetConfig(_Section):
    """When the study ends: after so many finished trials, or so many seconds spent in trials, whichever comes first."""

    trials: int | None = Field(None, ge=2)
    seconds: float | None = Field(None, gt=0)


class ReportConfig(_Section):
    """Suites of items that the search never sees: one for each objective, and others to show beside them."""

    objectives: dict[str, str]
    record: list[str] = []


class StudyConfig(_Section):
    """A checked study. Paths are absolute; `space` holds the raw settings that `space.build_space` reads.

    Fields:
        base: the model that DAPT started from, a folder or a hub id.
        checkpoints: a run's folder (all its `checkpoint-*/`), one model folder, or a list of model folders.
        space: `method`, `weight`, `density`, … `checkpoint`: a value, a list of choices, or `{low, high, step, log}`.
        objectives: two or more named objectives, in the order of the study's values.
        record: suites that are scored beside the objectives and steer nothing.
        report: suites that judge the front, on items disjoint from those of the search.
        enqueue: points to try right after the base and the DAPT model, before the sampler proposes any.
        seed: of the random masks (dare) that recipes draw.
        dtype: what the live model is evaluated in; `auto` is bfloat16 where it is fast, else float32.
    """

    name: str = "study"
    base: str
    checkpoints: str | list[str]
    space: dict[str, Any]
    objectives: dict[str, ObjectiveConfig]
    record: list[str] = []
    report: ReportConfig | None = None
    enqueue: list[dict[str, Any]] = []
    sampler: SamplerConfig = Field(default_factory=lambda: SamplerConfig.model_validate({}))
    budget: BudgetConfig = Field(default_factory=lambda: BudgetConfig.model_validate({}))
    seed: int = Field(0, ge=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    batch_size: int = Field(8, ge=1)
    max_length: int | None = Field(None, ge=2)
    limit: int | None = Field(None, ge=1)
    output: str | None = None
    storage: str | None = None

    @property
    def folder(self) -> Path:
        """The study's folder (`output`).

        Raises:
            InputError: none was given.
        """
        if self.output is None:
            raise InputError(
                "the study has no output folder",
                where="output",
                remedy="Pass -o OUT, or add `output: OUT` to the study.",
            )
        return Path(self.output)

    def storage_url(self) -> str:
        """Return Optuna's storage URL: as given, else SQLite inside the study's folder."""
        return self.storage or f"sqlite:///{self.folder / 'study.db'}"


_ONE_VOCABULARY = (
    "Leave it out: a study scores every recipe on one live model with the base's tokenizer, so all of them have the"
    " base's vocabulary. Checkpoints with another one are aligned to it first, each once, by a recipe"
    " 'merge_method: passthrough, models: [{model: CHECKPOINT}], tokenizer_source: BASE'; give the study the outputs."
)
# What a recipe may say and a study may not, and what to do instead.
_NOT_IN_STUDIES = {
    "tokenizer_source": _ONE_VOCABULARY,
    "tokenizer": _ONE_VOCABULARY,
    "chat_template": "Leave it out: it changes no weight, and so no score. Add it to the recipe of the exported trial.",
}


def load_study_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study from a YAML file (or a mapping), apply `key=value` overrides and check it.

    Relative paths are those of the current directory, or, where nothing is found there, of the file's own folder.

    Raises:
        InputError: missing file, malformed YAML, unknown key (with the nearest known one), value of the wrong kind,
            fewer than two objectives, a path that does not exist, no budget.

    Example:
        >>> load_study_config("search/linear_sweep.yaml", ["base=models/base", "budget.trials=11"])  # doctest: +SKIP
    """
    raw, where, beside = _read(source)
    try:
        config = StudyConfig.model_validate(overridden(raw, overrides))
    except ValidationError as error:
        raise explained(error, where, _known_keys, lambda location: _NOT_IN_STUDIES.get(str(location[-1]))) from error
    _check(config, where)
    for key in (key for key in config.space if key in _NOT_IN_STUDIES):
        raise InputError(f"'{key}' is no knob of a study", where=f"{where}: space.{key}", remedy=_NOT_IN_STUDIES[key])
    return _with_absolute_paths(config, beside, where)


def _read(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str, Path]:
    if isinstance(source, Mapping):
        return dict(source), "the study", Path.cwd()
    path = Path(source)
    raw = read_mapping(path, noun="study", remedy="See the examples in search/.")
    return raw, str(path), path.resolve().parent


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    section: dict[str, type[BaseModel]] = {
        "objectives": ObjectiveConfig,
        "sampler": SamplerConfig,
        "budget": BudgetConfig,
        "report": ReportConfig,
    }
    model: type[BaseModel] = section.get(str(location[0]), StudyConfig) if location else StudyConfig
    return list(model.model_fields)


def _check(config: StudyConfig, where: str) -> None:
    if len(config.objectives) < 2:
        raise InputError(
            f"a trade-off needs two or more objectives, found {len(config.objectives)}",
            where=f"{where}: objectives",
            remedy="Give at least a domain and a general objective.",
        )
    for name in config.objectives:
        if not re.fullmatch(r"[A-Za-z_][\w-]*", name):
            raise InputError(
                f"'{name}' cannot name an objective",
                where=f"{where}: objectives",
                remedy="Use letters, digits, _ and -.",
            )
    if config.report is not None and set(config.report.objectives) != set(config.objectives):
        raise InputError(
            f"the report has suites for {', '.join(sorted(config.report.objectives))}, "
            f"the objectives are {', '.join(sorted(config.objectives))}",
            where=f"{where}: report.objectives",
            remedy="Give each objective its report suite, under the same name.",
        )
    if config.budget.trials is None and config.budget.seconds is None and config.sampler.name != "grid":
        raise InputError(
            "the study has no budget",
            where=f"{where}: budget",
            remedy="Give budget: {trials: 40}, or seconds, or both.",
        )


def _with_absolute_paths(config: StudyConfig, beside: Path, where: str) -> StudyConfig:
    def found(path: str, key: str) -> str:
        return str(_find(path, beside, f"{where}: {key}"))

    checkpoints = config.checkpoints
    return config.model_copy(
        update={
            "base": _base(config.base, beside, where),
            "checkpoints": (
                found(checkpoints, "checkpoints")
                if isinstance(checkpoints, str)
                else [found(path, "checkpoints") for path in checkpoints]
            ),
            "objectives": {
                name: objective.model_copy(update={"suite": found(objective.suite, f"objectives.{name}.suite")})
                for name, objective in config.objectives.items()
            },
            "record": [found(path, "record") for path in config.record],
            "report": config.report and _report_paths(config.report, found),
            "output": None if config.output is None else str(Path(config.output).absolute()),
        }
    )


def _report_paths(report: ReportConfig, found: Callable[[str, str], str]) -> ReportConfig:
    return ReportConfig(
        objectives={name: found(path, f"report.objectives.{name}") for name, path in report.objectives.items()},
        record=[found(path, "report.record") for path in report.record],
    )


def _base(base: str, beside: Path, where: str) -> str:
    """Return the base's absolute path, or the hub id that it seems to be."""
    try:
        return str(_find(base, beside, f"{where}: base"))
    except InputError:
        from dapt_merge.checkpoints.hub import is_cached, looks_like_hub_id

        # A name alone is rather a folder's: it counts as the hub's when the model was downloaded before.
        if looks_like_hub_id(base) and ("/" in base or is_cached(base)):
            return base
        raise


def _find(path: str, beside: Path, where: str) -> Path:
    found = Path(located(path, beside))
    if found.exists():
        return found.absolute()
    parent = found.parent if found.parent.is_dir() else beside
    hint = nearest(found.name, [entry.name for entry in parent.iterdir()]) if parent.is_dir() else ""
    raise InputError(f"'{path}' does not exist.{hint}", where=where, remedy="Give an existing path.")
