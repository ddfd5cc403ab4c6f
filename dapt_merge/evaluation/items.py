"""The unit of all statistics: the per-item scores of one model on one task.

A score is a ratio of sums over items, Σ numerators / Σ denominators, because that is what both kinds of metric are:
bits per byte is bits over UTF-8 bytes (a long document weighs more), accuracy is correct answers over questions. Items
carry an id made from their content, so that two models are compared on the same items whatever the order of the file.
This module knows neither lm-eval nor files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from dapt_merge.errors import InputError, nearest


@dataclass(frozen=True, eq=False)
class TaskItems:
    """One model's scores on the items of one task, for one metric.

    Args:
        task: the lm-eval task's name.
        version: the YAML's version and a hash of prompts, targets and settings; equal versions mean equal items.
        metric: "bits_per_byte", "acc", "acc_norm", …
        higher_is_better: the metric's direction.
        item_ids: content hash of each document, unique within the task; shape (items,).
        numerators: float64, shape (items,): bits, or the item's score.
        denominators: float64, shape (items,): UTF-8 bytes, or 1.

    Raises:
        InputError: there is no item, the lengths differ, an id occurs twice, a value is not finite, or the denominators
            sum to zero.

    Example:
        >>> import numpy as np
        >>> TaskItems("quiz", "1", "acc", True, ("a", "b"), np.array([1.0, 0.0]), np.array([1.0, 1.0])).score
        0.5
    """

    task: str
    version: str
    metric: str
    higher_is_better: bool
    item_ids: tuple[str, ...]
    numerators: np.ndarray
    denominators: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "numerators", np.asarray(self.numerators, dtype=np.float64))
        object.__setattr__(self, "denominators", np.asarray(self.denominators, dtype=np.float64))
        where = f"task {self.task}, metric {self.metric}"
        if not self.item_ids:
            raise InputError("the task has no items", where=where, remedy="Give it a data file with documents.")
        if not self.numerators.shape == self.denominators.shape == (len(self.item_ids),):
            raise InputError(
                f"{len(self.item_ids)} item ids, numerators of shape {self.numerators.shape}, denominators of shape"
                f" {self.denominators.shape}",
                where=where,
            )
        if len(set(self.item_ids)) != len(self.item_ids):
            raise InputError("an item id occurs twice", where=where)
        bad = ~(np.isfinite(self.numerators) & np.isfinite(self.denominators))
        if bad.any():
            raise InputError(
                f"{int(bad.sum())} of {len(bad)} items have a score that is not finite",
                where=f"{where}, item {self.item_ids[int(np.argmax(bad))]}",
                remedy="Look for NaN in the model's weights, or score in float32 (--dtype float32).",
            )
        if self.denominators.sum() <= 0:
            raise InputError("all items are empty", where=where, remedy="Give the task documents with text.")

    @property
    def score(self) -> float:
        """Σ numerators / Σ denominators, in the metric's unit (bits per byte, or a share from 0 to 1)."""
        return float(self.numerators.sum() / self.denominators.sum())

    def __len__(self) -> int:
        return len(self.item_ids)


def by_task_and_metric(items: Mapping[str, TaskItems] | Iterable[TaskItems]) -> dict[tuple[str, str], TaskItems]:
    """Index score records by (task, metric), whatever the keys of the mapping that they come in."""
    records: Iterator[TaskItems] = iter(items.values() if isinstance(items, Mapping) else items)
    return {(record.task, record.metric): record for record in records}


def pick(items: Mapping[str, TaskItems], task: str, metric: str) -> TaskItems:
    """Return the record of one task and metric.

    Raises:
        InputError: the model has no such record; the message names the nearest task, or the metrics that there are.
    """
    records = by_task_and_metric(items)
    if (task, metric) in records:
        return records[task, metric]
    metrics = sorted(found for name, found in records if name == task)
    if metrics:
        raise InputError(f"task '{task}' has no metric '{metric}'; it has: {', '.join(metrics)}")
    known = sorted({name for name, _ in records})
    raise InputError(f"there are no scores for task '{task}'.{nearest(task, known)}", remedy="Score the task first.")


# Metrics that have a unit of their own. All others are shares from 0 to 1, and their differences are told in points.
_UNITS = {"bits_per_byte": "bits per byte", "byte_perplexity": "perplexity", "word_perplexity": "perplexity"}


def gain_unit(metric: str) -> str:
    """Unit of a difference between two scores: points (hundredths) for shares, the metric's own for the others.

    Example:
        >>> gain_unit("bits_per_byte"), gain_unit("acc")
        ('bits per byte', 'points')
    """
    return _UNITS.get(metric, "points")


def gain_scale(metric: str) -> float:
    """Factor from a difference in the metric to `gain_unit`: 100 for shares, 1 for the others."""
    return 1.0 if metric in _UNITS else 100.0
