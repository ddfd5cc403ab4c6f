"""Studies: the search for the merge with the best trade, over recipes, on several objectives at once.

It joins recipes, merging and evaluation under Optuna's nouns (study, trial, sampler, storage). What it does not know:
how results are drawn or told (`reports`, `cli`). Importing it loads neither torch nor Optuna.
"""

from dapt_merge.study.config import StudyConfig, load_study_config
from dapt_merge.study.export import export_trial
from dapt_merge.study.front import (
    front_trials,
    hypervolume,
    knee,
    knee_index,
    nondominated,
    normalised,
    pick_trial,
)
from dapt_merge.study.rescore import rescore
from dapt_merge.study.results import Objective, StudyResult, StudyTrial, load_study
from dapt_merge.study.run import run_study

__all__ = [
    "Objective",
    "StudyConfig",
    "StudyResult",
    "StudyTrial",
    "export_trial",
    "front_trials",
    "hypervolume",
    "knee",
    "knee_index",
    "load_study",
    "load_study_config",
    "nondominated",
    "normalised",
    "pick_trial",
    "rescore",
    "run_study",
]
