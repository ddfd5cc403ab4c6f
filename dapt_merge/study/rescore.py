"""The front of a study scored again, on items that did not choose it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from dapt_merge.errors import DaptMergeError
from dapt_merge.study.front import front_trials
from dapt_merge.study.results import ITEMS_FILE, StudyResult, load_study
from dapt_merge.study.scoring import LiveModel, Progress, RecipeScorer

if TYPE_CHECKING:
    from dapt_merge.evaluation.items import TaskItems
    from dapt_merge.evaluation.suites import Suite


def rescore(
    study: str | Path | StudyResult,
    suites: Sequence[str | Path | Suite],
    *,
    trials: Sequence[int] | None = None,
    scorer: RecipeScorer | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    on_progress: Progress | None = None,
) -> dict[int, Mapping[str, TaskItems]]:
    """Score the front, the base and the DAPT model of a study on other suites.

    What has been scored before comes from the study's item store, so that a killed call goes on from there.

    Args:
        study: the study's folder, or the loaded study.
        suites: suite files or suites, of report items.
        trials: numbers of further trials, or None; the front and the two ends are always there.
        scorer: what scores the recipes (default: the base model, live in memory).
        dtype, batch_size: as in the study's settings unless given.
        limit: score only the first items of each task.
        on_progress: called with (done, total) in items over all trials.

    Returns:
        trial number → (as `Scorer.score` returns it) task → items.

    Raises:
        DaptMergeError: the study has not scored its two ends yet.
    """
    result = study if isinstance(study, StudyResult) else load_study(study)
    if result.base is None or result.dapt is None:
        raise DaptMergeError(
            "the study has not scored the base and the DAPT model yet",
            where=result.folder,
            remedy="Run the same search again; it goes on where it stopped.",
        )
    numbers = dict.fromkeys([result.base, result.dapt, *(t.number for t in front_trials(result)), *(trials or ())])
    scorer = scorer or live_model(result, suites, dtype, batch_size, limit)
    scored: dict[int, Mapping[str, TaskItems]] = {}
    for position, number in enumerate(numbers):
        recipe = _recipe(result, number)
        scored[number] = scorer.score(recipe, _part(on_progress, position, len(numbers))).items
    return scored


def _recipe(study: StudyResult, number: int):  # type: ignore[no-untyped-def]
    from dapt_merge.recipe import load_recipe

    return load_recipe(yaml.safe_load(study.trial(number).recipe or ""))


def _part(on_progress: Progress | None, position: int, parts: int) -> Progress | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(position * total + done, parts * total)


def live_model(
    study: StudyResult,
    suites: Sequence[str | Path | Suite],
    dtype: str | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
) -> LiveModel:
    """Return the study's base, live in memory, to score its recipes on other suites; arguments as for `rescore`."""
    from dapt_merge.evaluation.suites import Suite, load_suite
    from dapt_merge.study.config import StudyConfig
    from dapt_merge.study.space import find_checkpoints

    config = StudyConfig.model_validate(study.config)
    return LiveModel(
        config.base,
        list(find_checkpoints(config.checkpoints).values()),
        [suite if isinstance(suite, Suite) else load_suite(suite) for suite in suites],
        study.folder / ITEMS_FILE,
        dtype=dtype or config.dtype,
        device=config.device,
        batch_size=batch_size or config.batch_size,
        max_length=config.max_length,
        limit=limit,
    )
