"""Uncertainty of scores and of differences between models scored on the same items. Pure numpy.

The idea: a suite's score is the macro mean, over its tasks, of a ratio of sums over items; the tasks are fixed and the
items are the sample. All models of one comparison are resampled with the *same* draws of items, so that what makes an
item hard for every model cancels in their differences. One matrix product of resample counts with numerators and
denominators gives every resampled score.

Resampling: `n − 1` items with replacement within each task of `n` items (Rao and Wu, JASA 1988, with-replacement
bootstrap for stratified samples): the spread of a mean is then unbiased within every task, where drawing `n` makes it
(n−1)/n too small, which adds up over many small tasks.

Interval: percentile. It respects transformations, so that one set of resamples serves differences and ratios of
differences alike, and it needs no skewness constant, which for 0/1 scores with few discordant items is mostly noise
(the reason not to take BCa). Its price: with strongly skewed items and fewer than about 30 of them it is a little too
narrow.

Sign conventions: `paired_bootstrap(a, b)` is the raw difference a − b in the metric's unit. `gain(model, base)` is
oriented so that positive means better than the base whatever the metric: the domain gain, and the general loss, are
both this signed difference (a general "loss" of −0.01 is one point lost).

What this module does not know: lm-eval, files, and which models matter.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dapt_merge.errors import InputError
from dapt_merge.evaluation.items import TaskItems, pick

Scores = Mapping[str, TaskItems]

# Bounds the scratch memory of one block of resample counts (float64) to 32 MB, whatever the number of items.
_COUNTS_PER_BLOCK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile interval.

    `p_value` is two-sided, for the hypothesis that the true value is zero: the smallest 1 − confidence at which the
    interval leaves zero out, never below 2 / (resamples + 1). `standard_error` is the resamples' standard deviation.
    """

    estimate: float
    low: float
    high: float
    p_value: float
    standard_error: float
    confidence: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class ResampledScores:
    """Suite scores of several models on the same resampled items.

    Args:
        estimates: shape (models,), the scores on all items.
        resamples: shape (models, resamples), the scores on each resample; column r is the same draw for every model.
        higher_is_better: the metric's direction.
    """

    estimates: np.ndarray
    resamples: np.ndarray
    higher_is_better: bool


def standard_error(items: TaskItems) -> float:
    """Standard error of a ratio-of-sums score, by linearisation.

    √(n/(n−1) · Σ(numᵢ − score·denᵢ)²) / Σ denᵢ (Cochran, Sampling Techniques, 3rd ed., eq. 6.13 without the finite
    population correction). For accuracy this is √(p(1−p)/(n−1)), the number that lm-eval prints. NaN for one item.

    Example:
        >>> import numpy as np
        >>> quiz = TaskItems("quiz", "1", "acc", True, tuple("abcde"), np.array([1, 1, 1, 0, 0.0]), np.ones(5))
        >>> round(standard_error(quiz), 4)
        0.2449
    """
    count = len(items)
    if count < 2:
        return math.nan
    residuals = items.numerators - items.score * items.denominators
    return float(math.sqrt(count / (count - 1) * np.sum(residuals**2)) / items.denominators.sum())


def suite_score(items: Scores, tasks: Sequence[str], metric: str) -> float:
    """Macro mean of the tasks' scores: every task weighs the same, however many items it has.

    Raises:
        InputError: `tasks` is empty, or a task has no record of `metric`.
    """
    _refuse_no_tasks(tasks)
    return float(np.mean([pick(items, task, metric).score for task in tasks]))


def suite_standard_error(items: Scores, tasks: Sequence[str], metric: str) -> float:
    """Standard error of `suite_score`: √Σ seₜ² / T, items being independent between tasks and tasks being fixed."""
    _refuse_no_tasks(tasks)
    squares = [standard_error(pick(items, task, metric)) ** 2 for task in tasks]
    return math.sqrt(sum(squares)) / len(tasks)


def resampled_scores(
    models: Sequence[Scores], tasks: Sequence[str], metric: str, *, resamples: int = 10_000, seed: int = 0
) -> ResampledScores:
    """Score every model on the same resamples of items; the source of all intervals, and of ranks with intervals.

    A task's draws depend on the seed, its name and its number of items only: not on the order of its items, on the
    other tasks or on the models beside it.

    Raises:
        InputError: a task is missing, has fewer than two items, or the models were not scored on the same items.
    """
    _refuse_no_tasks(tasks)
    if resamples < 1:
        raise InputError(f"{resamples} resamples asked for, at least 1 is needed")
    directions = {pick(scores, task, metric).higher_is_better for scores in models for task in tasks}
    if len(directions) > 1:
        raise InputError(f"metric '{metric}' is better high in one task and better low in another")
    estimates = np.zeros(len(models))
    totals = np.zeros((len(models), resamples))
    for task in tasks:
        records = [pick(scores, task, metric) for scores in models]
        numerators, denominators = paired_arrays(records)
        estimates += numerators.sum(axis=1) / denominators.sum(axis=1)
        totals += _resampled_ratios(numerators, denominators, resamples, [seed, zlib.crc32(task.encode())])
    return ResampledScores(estimates / len(tasks), totals / len(tasks), directions.pop())


def paired_bootstrap(
    a: Scores,
    b: Scores,
    tasks: Sequence[str],
    metric: str,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Difference a − b of two models' suite scores on the same items, in the metric's unit.

    Items are resampled within each task; see the module's text for the scheme and the choice of interval.

    Raises:
        InputError: the two models were not scored on the same items of the same task versions.

    Example:
        >>> import numpy as np
        >>> def quiz(*correct):
        ...     return {"quiz": TaskItems("quiz", "1", "acc", True, tuple("abcd"), np.array(correct), np.ones(4))}
        >>> paired_bootstrap(quiz(1, 1, 1, 0), quiz(1, 0, 0, 0), ["quiz"], "acc").estimate
        0.5
    """
    scores = resampled_scores([a, b], tasks, metric, resamples=resamples, seed=seed)
    difference = _difference(scores.resamples[0], scores.resamples[1])
    return _interval(float(_difference(scores.estimates[0], scores.estimates[1])), difference, confidence)


def gain(
    model: Scores,
    base: Scores,
    tasks: Sequence[str],
    metric: str,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """How much better than the base a model is, in the metric's unit: positive is better, whatever the metric.

    On a domain suite this is the domain gain; on a general suite a negative value is the general loss. For bits per
    byte it is base − model, for accuracy model − base.
    """
    higher_is_better = pick(base, tasks[0], metric).higher_is_better if tasks else True
    first, second = (model, base) if higher_is_better else (base, model)
    return paired_bootstrap(first, second, tasks, metric, resamples=resamples, confidence=confidence, seed=seed)


def retained_share(
    merged: Scores,
    base: Scores,
    dapt: Scores,
    tasks: Sequence[str],
    metric: str,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Share of the DAPT checkpoint's change from the base that the merged model has kept.

    (merged − base) / (dapt − base): 1 keeps all of the domain gain (or repeats all of the general loss), 0 none; it may
    lie outside [0, 1]. Numerator and denominator come from the same resamples. When dapt − base is itself not told from
    zero at this confidence the share is not bounded by the data, and the interval is (−∞, ∞). `p_value` is that of
    merged − base: of the hypothesis that nothing was kept.
    """
    scores = resampled_scores([merged, base, dapt], tasks, metric, resamples=resamples, seed=seed)
    kept_estimate, whole_estimate = _difference(scores.estimates[[0, 2]], scores.estimates[1])
    kept, whole = _difference(scores.resamples[[0, 2]], scores.resamples[1])
    p_value = _two_sided_p(kept)
    if not _interval(float(whole_estimate), whole, confidence).excludes_zero:
        share = float(kept_estimate / whole_estimate) if whole_estimate else math.nan
        return Interval(share, -math.inf, math.inf, p_value, math.nan, confidence)
    # The few resamples in which the denominator reaches zero lie in the tails that the interval leaves out.
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.nan_to_num(kept / whole, nan=0.0)
    interval = _interval(float(kept_estimate / whole_estimate), shares, confidence)
    return Interval(interval.estimate, interval.low, interval.high, p_value, interval.standard_error, confidence)


def paired_arrays(records: Sequence[TaskItems]) -> tuple[np.ndarray, np.ndarray]:
    """Align several models' records of one task by item id.

    Returns:
        numerators and denominators, float64, each of shape (models, items), items in the order of their sorted ids.

    Raises:
        InputError: the task's version differs between the models, or their items do.
    """
    first = records[0]
    reference = sorted(first.item_ids)
    for record in records[1:]:
        if record.item_ids != first.item_ids and sorted(record.item_ids) != reference:
            shared = len(set(reference) & set(record.item_ids))
            raise InputError(
                f"the models were not scored on the same items: {len(first)} and {len(record)} items,"
                f" {shared} in common",
                where=f"task {first.task}",
                remedy="Score all models with the same suite files and the same --limit.",
            )
        if record.version != first.version:
            raise InputError(
                f"the models were scored on two versions of the task: {first.version} and {record.version}",
                where=f"task {first.task}",
                remedy="Score all models again with the same suite files.",
            )
    orders = [np.argsort(np.asarray(record.item_ids)) for record in records]
    numerators = np.stack([record.numerators[order] for record, order in zip(records, orders, strict=True)])
    denominators = np.stack([record.denominators[order] for record, order in zip(records, orders, strict=True)])
    return numerators, denominators


def _resampled_ratios(numerators: np.ndarray, denominators: np.ndarray, resamples: int, seeds: list[int]) -> np.ndarray:
    """Ratio-of-sums score of each model on each resample: shape (models, resamples)."""
    models, count = numerators.shape
    if count < 2:
        raise InputError("a task with one item has no measurable uncertainty", remedy="Score at least two items.")
    columns = np.concatenate([numerators, denominators]).T
    random = np.random.default_rng(seeds)
    sums = np.empty((resamples, 2 * models))
    block = max(1, _COUNTS_PER_BLOCK // count)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = random.integers(0, count, size=(rows, count - 1)) + count * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        sums[start : start + rows] = counts.astype(np.float64) @ columns
    if not (sums[:, models:] > 0).all():
        raise InputError("a resample holds only items without text", remedy="Remove empty documents from the task.")
    return (sums[:, :models] / sums[:, models:]).T


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a − b, with differences in the last bits (the order of a sum) set to the zero that they stand for."""
    difference = np.asarray(a - b)
    difference[np.abs(difference) <= 1e-12 * np.maximum(np.abs(a), np.abs(b))] = 0.0
    return difference


def _interval(estimate: float, resampled: np.ndarray, confidence: float) -> Interval:
    if not 0 < confidence < 1:
        raise InputError(f"the confidence is {confidence}, expected a number between 0 and 1, such as 0.95")
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(
        estimate, float(low), float(high), _two_sided_p(resampled), float(np.std(resampled, ddof=1)), confidence
    )


def _two_sided_p(resampled: np.ndarray) -> float:
    below = (1 + np.count_nonzero(resampled <= 0)) / (1 + len(resampled))
    above = (1 + np.count_nonzero(resampled >= 0)) / (1 + len(resampled))
    return float(min(1.0, 2 * min(below, above)))


def _refuse_no_tasks(tasks: Sequence[str]) -> None:
    if not tasks:
        raise InputError("no tasks were named", remedy="Name the tasks of a suite.")
