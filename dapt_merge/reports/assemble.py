"""From a study's folder to its report: which suites judge it, what they scored, and what is said of it.

A study that names report suites is judged on them; one that does not can only be shown on the items that chose its
merges, and the report says so. What this module does not know: how the report is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dapt_merge.reports.report import REPORT_JSON, Report, build_report, load_report, save_report
from dapt_merge.reports.rows import Axis

if TYPE_CHECKING:
    from dapt_merge.evaluation.statistics import Scores
    from dapt_merge.evaluation.suites import Suite
    from dapt_merge.study.config import StudyConfig
    from dapt_merge.study.results import StudyResult

# What a recorded suite is reported by: the first of these that all of its tasks have.
_RECORDED_METRICS = ("acc_norm", "acc", "bits_per_byte")


def report_study(
    folder: str | Path, *, title: str | None = None, on_progress: Callable[[int, int], None] | None = None
) -> Report:
    """Return a study's report; make it first when the study has none, or has gone on since.

    The front and both ends are scored on the study's report suites; what was scored before comes from its item store.
    `report.json` and `report.md` are written into its folder.

    Args:
        folder: the study's folder.
        title: of the picture; default the study's name.
        on_progress: called with (done, total) items.

    Raises:
        InputError: there is no study, or a suite cannot be used.
        DaptMergeError: the study has not scored its two ends yet.
    """
    from dapt_merge.study import StudyConfig, load_study, rescore
    from dapt_merge.study.rescore import live_model

    study = load_study(folder)
    if (Path(folder) / REPORT_JSON).is_file():
        saved = load_report(folder)
        if saved.of_trials == len(study.finished) and title in (None, saved.title):
            return saved
    config = StudyConfig.model_validate(study.config)
    held_out = config.report is not None
    objectives, recorded = _suites(config)
    scorer = live_model(study, [*objectives.values(), *recorded])
    scores = rescore(study, list(scorer.suites), scorer=scorer, on_progress=on_progress)
    axes = _axes(study, objectives, recorded, scorer.tasks(), scores[next(iter(scores))])
    report = build_report(study, scores, axes, held_out=held_out, title=title)
    save_report(report, folder)
    return report


def _suites(config: StudyConfig) -> tuple[dict[str, Suite], list[Suite]]:
    """The suites that judge each objective, and those reported beside them."""
    from dapt_merge.evaluation.suites import load_suite

    if config.report is not None:
        paths, recorded = config.report.objectives, config.report.record
    else:
        paths, recorded = {name: objective.suite for name, objective in config.objectives.items()}, config.record
    return {name: load_suite(path) for name, path in paths.items()}, [load_suite(path) for path in recorded]


def _axes(
    study: StudyResult,
    objectives: Mapping[str, Suite],
    recorded: Sequence[Suite],
    tasks: Mapping[str, Iterable[str]],
    scores: Scores,
) -> list[Axis]:
    axes = [
        Axis(name, suite.axis, study.objective(name).metric, tuple(tasks[suite.name]))
        for name, suite in objectives.items()
    ]
    for suite in recorded:
        metric = _recorded_metric(scores, tasks[suite.name])
        if metric:
            axes.append(Axis(suite.name.removeprefix("report-"), suite.axis, metric, tuple(tasks[suite.name])))
    return axes


def _recorded_metric(scores: Scores, tasks: Iterable[str]) -> str | None:
    from dapt_merge.evaluation.items import by_task_and_metric

    records = by_task_and_metric(scores)
    return next((metric for metric in _RECORDED_METRICS if all((task, metric) in records for task in tasks)), None)
