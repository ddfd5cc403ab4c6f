"""Suites of lm-eval tasks, scored item by item, and the statistics of paired comparisons.

The idea: no score without its uncertainty, and no comparison that is not on the same items. `Scorer` and `evaluate`
turn a model into `TaskItems`, `ItemStore` keeps them, `statistics` compares them. Nothing here knows of merging.
"""

from dapt_merge.evaluation.items import TaskItems
from dapt_merge.evaluation.runner import evaluate, load_causal_lm, load_tokenizer
from dapt_merge.evaluation.scorer import Scorer
from dapt_merge.evaluation.statistics import (
    Interval,
    gain,
    paired_bootstrap,
    retained_share,
    standard_error,
    suite_score,
    suite_standard_error,
)
from dapt_merge.evaluation.store import ItemStore
from dapt_merge.evaluation.suites import Suite, load_suite

__all__ = [
    "Interval",
    "ItemStore",
    "Scorer",
    "Suite",
    "TaskItems",
    "evaluate",
    "gain",
    "load_causal_lm",
    "load_suite",
    "load_tokenizer",
    "paired_bootstrap",
    "retained_share",
    "standard_error",
    "suite_score",
    "suite_standard_error",
]
