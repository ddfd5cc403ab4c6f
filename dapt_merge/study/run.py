"""The search itself: ask, merge, score, tell; until the budget is spent, over as many sessions as it takes.

The idea: the next step depends on the storage alone. The two ends come first, then the enqueued points, then what the
sampler proposes; each trial is written before the next begins. So the same command, after a kill or with a larger
budget, goes on as if it had never stopped. What this module does not know: how models merge and score.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dapt_merge.errors import DaptMergeError, InputError
from dapt_merge.study.config import StudyConfig
from dapt_merge.study.results import ITEMS_FILE, Objective, StudyResult, StudyTrial, read_result
from dapt_merge.study.sampling import check_sampler, sampler_for, suggest, trial_seed
from dapt_merge.study.scoring import LiveModel, Progress, RecipeScorer, RecipeScores
from dapt_merge.study.space import (
    Endpoint,
    Point,
    Space,
    build_space,
    complete_point,
    endpoint,
    endpoint_recipe,
    find_checkpoints,
    grid,
    propose,
    space_warnings,
    to_recipe,
)
from dapt_merge.study.storage import check_identity, counts, locked, open_study, take_up_interrupted

if TYPE_CHECKING:
    import optuna

    from dapt_merge.evaluation.items import TaskItems
    from dapt_merge.evaluation.suites import Suite

# Enough for a standard error to within 2%; intervals that are claimed come from the report's own, larger number.
_RESAMPLES = 1000

OnTrial = Callable[[StudyTrial, StudyResult], None]


@dataclass(frozen=True)
class _Planned:
    """A point that is tried because somebody named it, not because a sampler proposed it."""

    point: Point
    endpoint: Endpoint | None = None


def run_study(
    config: StudyConfig,
    *,
    on_trial: OnTrial | None = None,
    on_progress: Progress | None = None,
    scorer: RecipeScorer | None = None,
) -> StudyResult:
    """Run a study, or go on with one, until its budget is spent.

    Args:
        config: from `load_study_config`; `output` is the study's folder.
        on_trial: called after each finished trial with the trial and the study so far.
        on_progress: called with (done, total) in items scored.
        scorer: what scores the recipes (default: the base model, live in memory).

    Returns:
        the study as plain data. Per trial: values, standard errors, recipe, scores of all tasks.

    Raises:
        InputError: a setting, suite or checkpoint cannot be used; the folder holds another study.
        DaptMergeError: one of the two ends failed, so that nothing could be compared; another search runs here.

    Example:
        >>> config = load_study_config("search/linear_sweep.yaml", ["output=runs/sweep"])  # doctest: +SKIP
        >>> knee(run_study(config)).label  # doctest: +SKIP
        'linear weight 0.6 · checkpoint-160'
    """
    # Everything that can be refused is refused before the folder is touched.
    search = _Search(config, scorer)
    with locked(config.folder), warnings.catch_warnings():
        # Optuna warns of end points outside a narrow space; that they are kept is what we promise.
        warnings.filterwarnings("ignore", message="Fixed parameter", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*is experimental")
        search.open()
        return search.run(on_trial, on_progress)


class _Search:
    """One session of a study."""

    def __init__(self, config: StudyConfig, scorer: RecipeScorer | None) -> None:
        self.config = config
        check_sampler(config.sampler)
        self.suites = _load_suites(config)
        checkpoints = find_checkpoints(config.checkpoints)
        self.space = build_space(config.space, config.base, checkpoints, mask_seed=config.seed)
        self.plan = _plan(config, self.space)
        self.scorer = scorer or _live_model(config, self.space, self.suites)
        self.warnings = space_warnings(self.space)
        self.objectives: tuple[Objective, ...] = ()
        self.base_items: Mapping[str, TaskItems] | None = None

    def open(self) -> None:
        """Create the study or take it up; the folder has to be locked."""
        self.study = open_study(self.config, _identity(self.config, self.space, self.scorer))
        self.study.set_user_attr("warnings", self.warnings)
        take_up_interrupted(self.study)

    def run(self, on_trial: OnTrial | None, on_progress: Progress | None) -> StudyResult:
        """Run trials until the budget is spent."""
        while not self._spent():
            if not self.objectives:
                self.objectives = self._resolve_objectives()
            number = self._one_trial(self._item_progress(on_progress))
            result = self.result()
            trial = result.trial(number)
            if trial.state == "failed" and trial.endpoint:
                raise DaptMergeError(
                    f"the {trial.endpoint} end of the study cannot be scored: {trial.failure}",
                    where=self.config.folder,
                    remedy="Nothing can be compared without it. Remove the cause; the same command tries it again.",
                )
            if on_trial:
                on_trial(trial, result)
        return self.result()

    def result(self) -> StudyResult:
        """Return the study so far."""
        return read_result(self.study, self.config.folder, self.config.model_dump(mode="json", exclude_none=True))

    def _spent(self) -> bool:
        """Say whether the budget is spent; the two ends are scored in any case."""
        done = self._finished()
        if len(done) < 2:
            return False
        seconds = sum(trial.duration.total_seconds() for trial in done if trial.duration)
        limits = [self.config.budget.trials or math.inf]
        if self.config.sampler.name == "grid":
            limits.append(len(self.plan))
        return len(done) >= min(limits) or seconds >= (self.config.budget.seconds or math.inf)

    def _finished(self) -> list[optuna.trial.FrozenTrial]:
        return [trial for trial in self.study.get_trials(deepcopy=False) if counts(trial)]

    def _one_trial(self, on_progress: Progress | None) -> int:
        """Run the next trial to its end and return its number."""
        import optuna

        ordinal = len(self._finished())
        waiting = self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
        if not waiting and ordinal < len(self.plan):
            planned = self.plan[ordinal]
            attrs = {"endpoint": planned.endpoint} if planned.endpoint else {}
            self.study.enqueue_trial(dict(planned.point), user_attrs=attrs)
        fixed = bool(waiting) or ordinal < len(self.plan)
        self.study.sampler = sampler_for(self.config.sampler, ordinal, fixed=fixed)
        trial = self.study.ask()
        # Optuna looks at the history only when a parameter asks for it, but NSGA-II has to count a given point into its
        # generation too.
        _ = trial.relative_params
        point = self._proposal(trial)
        trial.set_user_attr("proposed", True)
        try:
            self._evaluate(trial, point, on_progress)
        except Exception as error:
            # Whatever a recipe meets in merging or in lm-eval: the study has other recipes to try.
            trial.set_user_attr("failure", _reason(error))
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return trial.number

    def _proposal(self, trial: optuna.Trial) -> Point:
        return propose(self.space, lambda knob: suggest(trial, knob.name, knob.setting))

    def _evaluate(self, trial: optuna.Trial, point: Point, on_progress: Progress | None) -> None:
        end = trial.user_attrs.get("endpoint")
        recipe = endpoint_recipe(self.space, end) if end else to_recipe(self.space, point)
        trial.set_user_attr("recipe", recipe.to_yaml())
        scores = self.scorer.score(recipe, on_progress)
        if end == "base":
            self.base_items = scores.items
        for key, value in self._attributes(scores).items():
            trial.set_user_attr(key, value)
        self.study.tell(trial, self._values(scores))

    def _values(self, scores: RecipeScores) -> list[float]:
        from dapt_merge.evaluation.items import pick
        from dapt_merge.evaluation.statistics import suite_score

        for o in self.objectives:
            if pick(scores.items, o.tasks[0], o.metric).higher_is_better == (o.direction == "minimize"):
                raise InputError(
                    f"the direction is {o.direction}, but task {o.tasks[0]} says the opposite of {o.metric}",
                    where=f"objectives.{o.name}.direction",
                    remedy="Correct the direction, in a new output folder.",
                )
        return [suite_score(scores.items, o.tasks, o.metric) for o in self.objectives]

    def _attributes(self, scores: RecipeScores) -> dict[str, Any]:
        """Return what is kept of a trial beside its values."""
        from dapt_merge.evaluation.statistics import suite_standard_error

        items = scores.items.values()
        return {
            "model_key": scores.model_key,
            "standard_errors": {o.name: suite_standard_error(scores.items, o.tasks, o.metric) for o in self.objectives},
            "gain_standard_errors": self._gain_standard_errors(scores),
            "scores": {f"{record.task}/{record.metric}": record.score for record in items},
            "record": {suite.name: _macro_means(scores, self._tasks[suite.name]) for suite in self.suites["record"]},
            "merge": dict(scores.notes),
            "seconds": {"merge": round(scores.merge_seconds, 3), "score": round(scores.score_seconds, 3)},
        }

    def _gain_standard_errors(self, scores: RecipeScores) -> dict[str, float]:
        """Return the standard error of each gain over the base on the same items, in the gain's unit."""
        from dapt_merge.evaluation.statistics import gain

        if self.base_items is None:
            # Of an earlier session: the item store has them, so that nothing is merged or scored for this.
            self.base_items = self.scorer.score(endpoint_recipe(self.space, "base")).items
        return {
            o.name: o.scale
            * gain(scores.items, self.base_items, o.tasks, o.metric, resamples=_RESAMPLES).standard_error
            for o in self.objectives
        }

    def _resolve_objectives(self) -> tuple[Objective, ...]:
        """Ask the scorer for each suite's tasks, and refuse to go on where they are no longer those of the study."""
        suites = {name: dict(tasks) for name, tasks in self.scorer.tasks().items()}
        check_identity(self.study, "suites", suites, self.config.folder)
        self._tasks = {name: tuple(tasks) for name, tasks in suites.items()}
        objectives = []
        for name, objective in self.config.objectives.items():
            suite = self.suites[name][0]
            tasks = self._tasks[suite.name]
            objectives.append(Objective(name, suite.name, suite.axis, objective.metric, objective.direction, tasks))
        plain = [{**vars(objective), "tasks": list(objective.tasks)} for objective in objectives]
        self.study.set_user_attr("objectives", plain)
        return tuple(objectives)

    def _item_progress(self, on_progress: Progress | None) -> Progress | None:
        """Turn progress within a trial into progress of the study, in items, where the number of trials is known."""
        trials = len(self.plan) if self.config.sampler.name == "grid" else self.config.budget.trials
        if on_progress is None or trials is None:
            return None
        finished = len(self._finished())
        return lambda done, total: on_progress(finished * total + done, max(trials, 2) * total)


def _macro_means(scores: RecipeScores, tasks: Sequence[str]) -> dict[str, float]:
    """Average each metric that all of the tasks have."""
    from dapt_merge.evaluation.items import by_task_and_metric

    records = by_task_and_metric(scores.items)
    metrics = dict.fromkeys(metric for task, metric in records if task in tasks)
    return {
        metric: sum(records[task, metric].score for task in tasks) / len(tasks)
        for metric in metrics
        if all((task, metric) in records for task in tasks)
    }


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, DaptMergeError) else f"{type(error).__name__}: {error}"


def _load_suites(config: StudyConfig) -> dict[str, list[Suite]]:
    """Return the suite of each objective in a list of one, and those under `record`."""
    from dapt_merge.evaluation.suites import load_suite

    suites = {name: [load_suite(objective.suite)] for name, objective in config.objectives.items()}
    return {**suites, "record": [load_suite(path) for path in config.record]}


def _live_model(config: StudyConfig, space: Space, suites: Mapping[str, Sequence[Suite]]) -> LiveModel:
    return LiveModel(
        config.base,
        list(space.checkpoints.values()),
        # Two objectives may look at one suite through two metrics.
        list({suite.name: suite for group in suites.values() for suite in group}.values()),
        config.folder / ITEMS_FILE,
        dtype=config.dtype,
        device=config.device,
        batch_size=config.batch_size,
        max_length=config.max_length,
        limit=config.limit,
    )


def _plan(config: StudyConfig, space: Space) -> list[_Planned]:
    """List the points that need no sampler: the two ends, the enqueued ones, and all of a grid."""
    import numpy as np

    planned = [_Planned(endpoint(space, "base"), "base"), _Planned(endpoint(space, "dapt"), "dapt")]
    named = [complete_point(space, point, f"enqueue.{index}") for index, point in enumerate(config.enqueue)]
    if config.sampler.name == "grid":
        points = grid(space)
        order = np.random.default_rng(trial_seed(config.sampler.seed, 0)).permutation(len(points))
        named += [points[index] for index in order]
    recipes = {endpoint_recipe(space, end).to_yaml() for end in ("base", "dapt")}
    for point in named:
        # Many points of a grid are one model: at weight 0 the density changes nothing.
        recipe = to_recipe(space, point).to_yaml()
        if recipe not in recipes:
            recipes.add(recipe)
            planned.append(_Planned(point))
    return planned


def _identity(config: StudyConfig, space: Space, scorer: RecipeScorer) -> dict[str, Any]:
    """Return all that decides the trials of a study, as plain data: content instead of paths, and no budget."""
    settings = config.model_dump(mode="json", include={"space", "record", "enqueue", "sampler", "seed"})
    prints = scorer.fingerprints()
    return {
        **settings,
        "record": len(config.record),
        "objectives": {
            name: {"metric": objective.metric, "direction": objective.direction}
            for name, objective in config.objectives.items()
        },
        "dtype": scorer.dtype_name(),
        "limit": config.limit,
        "max_length": config.max_length,
        "base": prints[config.base],
        "checkpoint": {label: prints[folder] for label, folder in space.checkpoints.items()},
    }
