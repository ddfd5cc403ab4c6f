"""One trial of a study becomes a checkpoint on disk, with the record of why it was picked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dapt_merge.atomic import atomic_folder, refuse_existing
from dapt_merge.study.front import pick_trial
from dapt_merge.study.results import StudyResult, StudyTrial, load_study
from dapt_merge.study.scoring import Progress

if TYPE_CHECKING:
    from dapt_merge.merging import MergeReport
    from dapt_merge.merging.card import CardScore

TRIAL_FILE = "study_trial.json"
_SEARCH_ITEMS = "Values are on the items that the search chose by: report other items."


def export_trial(
    study: str | Path | StudyResult,
    pick: str | int,
    out: str | Path,
    *,
    out_dtype: str | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> tuple[StudyTrial, MergeReport]:
    """Write the merge of a picked trial as an ordinary checkpoint.

    Args:
        study: the study's folder, or the loaded study.
        pick: `knee`, `best-OBJECTIVE`, a constraint such as `general>=-1`, or a trial's number; see `pick_trial`.
        out: the new model folder; it also gets `recipe.yaml`, `merge_report.json` and `study_trial.json`.
        out_dtype: the weights' dtype (default: the checkpoints' own).
        overwrite: replace an existing `out`.
        on_progress: called with (done, total) elements.

    Returns:
        the picked trial and the merge report.

    Raises:
        InputError: no such trial; the output exists; a checkpoint of the recipe is gone.
    """
    from dapt_merge.merging import merge_to_disk, plan_merge
    from dapt_merge.merging.card import CARD_FILE, model_card
    from dapt_merge.recipe import load_recipe

    refuse_existing(out, overwrite)
    result = study if isinstance(study, StudyResult) else load_study(study)
    trial = pick_trial(result, pick)
    recipe = load_recipe(yaml.safe_load(trial.recipe or ""))
    if out_dtype is not None:
        recipe = load_recipe(yaml.safe_load(recipe.to_yaml()), [f"out_dtype={out_dtype}"])
    with atomic_folder(out, overwrite=overwrite) as folder:
        plan = plan_merge(recipe)
        report = merge_to_disk(plan, folder / "model", on_progress=on_progress, placed_at=Path(out))
        for path in (folder / "model").iterdir():
            path.rename(folder / path.name)
        (folder / "model").rmdir()
        record = json.dumps(_provenance(result, trial, pick), indent=2, ensure_ascii=False)
        (folder / TRIAL_FILE).write_text(record + "\n", encoding="utf-8")
        card = model_card(report, plan.checkpoints, scores=_card_scores(result, trial), scores_note=_SEARCH_ITEMS)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
    return trial, report


def _card_scores(study: StudyResult, trial: StudyTrial) -> list[CardScore]:
    from dapt_merge.merging.card import CardScore

    gains = study.gains(trial)
    return [
        CardScore(o.suite, o.metric, trial.values[o.name], trial.standard_errors.get(o.name), gains[o.name], o.unit)
        for o in study.objectives
    ]


def _provenance(study: StudyResult, trial: StudyTrial, pick: str | int) -> dict[str, Any]:
    return {
        "study": study.name,
        "pick": str(pick),
        "trial": trial.number,
        "of_trials": len(study.finished),
        "params": dict(trial.params),
        "values": dict(trial.values),
        "standard_errors": dict(trial.standard_errors),
        "gains": study.gains(trial),
        "objectives": [
            {"name": o.name, "suite": o.suite, "metric": o.metric, "unit": o.unit} for o in study.objectives
        ],
        "note": _SEARCH_ITEMS,
    }
