"""The Pareto front, its hypervolume, its knee, and picking one trial from it. Pure numpy on small arrays.

Two kinds of coordinates. *Losses*: objective values with the sign turned so that smaller is better. *Normalised*: per
objective 0 at the worse and 1 at the better of the base and the DAPT model, so that bits per byte and accuracies can be
compared; (domain, general) of the base is usually (0, 1) and of DAPT (1, 0). All of it is on search items: what is
claimed of a picked trial has to be measured on others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dapt_merge.errors import DaptMergeError, InputError, nearest

if TYPE_CHECKING:
    from dapt_merge.study.results import StudyResult, StudyTrial

# A little below the worse end, so that the ends themselves span an area.
REFERENCE = -0.1


def nondominated(losses: np.ndarray) -> np.ndarray:
    """Mark the points that no other point beats: no worse everywhere and better somewhere. Equal points all stay.

    Args:
        losses: shape (points, objectives), smaller is better.

    Returns:
        bool, shape (points,).

    Example:
        >>> nondominated(np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])).tolist()
        [True, True, False]
    """
    no_worse = (losses[:, None] <= losses[None]).all(axis=-1)
    better = (losses[:, None] < losses[None]).any(axis=-1)
    return np.asarray(~(no_worse & better).any(axis=0))


def losses_of(study: StudyResult, trials: Sequence[StudyTrial]) -> np.ndarray:
    """Return the objective values as losses, shape (trials, objectives)."""
    signs = np.array([1.0 if objective.direction == "minimize" else -1.0 for objective in study.objectives])
    values = [[trial.values[objective.name] for objective in study.objectives] for trial in trials]
    return signs * np.array(values, dtype=float).reshape(len(trials), len(study.objectives))


def front_trials(study: StudyResult) -> list[StudyTrial]:
    """Return the trials on the Pareto front, by number; of several with equal values only the first."""
    complete = study.complete
    if not complete:
        return []
    losses = losses_of(study, complete)
    _, first = np.unique(losses, axis=0, return_index=True)
    keep = nondominated(losses)
    return [trial for index, trial in enumerate(complete) if keep[index] and index in set(first.tolist())]


def normalised(study: StudyResult, trials: Sequence[StudyTrial]) -> np.ndarray:
    """Return the trials in normalised coordinates, shape (trials, objectives), larger is better.

    An objective on which the two ends are equal keeps its own unit, with the ends at 0.

    Raises:
        DaptMergeError: the study has not scored its two ends yet.
    """
    if study.base is None or study.dapt is None:
        raise DaptMergeError(
            "the study has not scored the base and the DAPT model yet",
            where=study.folder,
            remedy="Run the same search again; it goes on where it stopped.",
        )
    ends = losses_of(study, [study.trial(study.base), study.trial(study.dapt)])
    worst, best = ends.max(axis=0), ends.min(axis=0)
    span = np.where(worst > best, worst - best, 1.0)
    return (worst - losses_of(study, trials)) / span


def knee_index(points: np.ndarray) -> int:
    """Return the index of the knee of a front: the point farthest above the chord between the front's extremes.

    The extremes are the best points of each objective; the chord is the line (with three objectives the plane) through
    them, and "above" is the side where every objective grows. Without a point above it (a front of two points, or a
    hollow one) it is the point of the largest sum, and of equal ones the first.

    Args:
        points: shape (points, objectives), normalised, larger is better, nondominated.

    Example:
        >>> knee_index(np.array([[0.0, 1.0], [0.8, 0.9], [1.0, 0.0]]))
        1
    """
    extremes = points[points.argmax(axis=0)]
    normal = _normal(extremes)
    heights = (points - extremes[0]) @ normal
    if heights.max() > 1e-12:
        return int(heights.argmax())
    return int(points.sum(axis=1).argmax())


def _normal(extremes: np.ndarray) -> np.ndarray:
    """Return the unit normal of the plane through the extremes that points to better; (1, …, 1) when there is none."""
    objectives = extremes.shape[1]
    equal_weights = np.full(objectives, objectives**-0.5)
    _, sizes, directions = np.linalg.svd(extremes[1:] - extremes[0], full_matrices=True)
    if len(sizes) < objectives - 1 or sizes.min() < 1e-9:
        return equal_weights
    normal = directions[-1] * np.sign(directions[-1].sum() or 1.0)
    # A plane that rises in one objective and falls in none cannot be traded along.
    return normal if (normal > 0).all() else equal_weights


def knee(study: StudyResult) -> StudyTrial:
    """Return the knee of the study's front (see `knee_index`), in normalised coordinates."""
    front = front_trials(study)
    return front[knee_index(normalised(study, front))]


def hypervolume(study: StudyResult, trials: Sequence[StudyTrial] | None = None) -> float:
    """Return the volume that the trials dominate, in normalised coordinates above the reference (−0.1, …, −0.1).

    The two ends alone give 0.21 in the usual two-objective trade: 2 · 1.1 · 0.1 − 0.1². A merge as good as both ends at
    once would give 1.21. Points beyond the reference count for nothing.

    Args:
        study: a study with scored ends.
        trials: complete trials (default: all).
    """
    from optuna._hypervolume import compute_hypervolume

    points = normalised(study, study.complete if trials is None else trials)
    inside = points[(points > REFERENCE).all(axis=1)]
    if not len(inside):
        return 0.0
    return float(compute_hypervolume(-inside, np.full(points.shape[1], -REFERENCE)))


def pick_trial(study: StudyResult, pick: str | int) -> StudyTrial:
    """Choose one trial.

    Args:
        study: a study with scored ends.
        pick: `knee`; `best-OBJECTIVE`, the trial with the best value of it; a constraint such as `general>=-1`: of the
            front trials whose gain over the base in that objective is at least −1 (positive is better; in the
            objective's unit, see `Objective.unit`), the best in the first other objective; or a trial's number.

    Raises:
        InputError: the pick is none of these, no trial meets it, or that trial has no values.
    """
    words = str(pick).strip()
    if words.isdigit():
        return _numbered(study, int(words))
    if not study.complete:
        raise InputError("the study has no finished trial yet", where=study.folder, remedy="Run the search first.")
    if words == "knee":
        return knee(study)
    names = [objective.name for objective in study.objectives]
    if words.startswith("best-") and words[5:] in names:
        return _best(study, study.complete, words[5:])
    constraint = re.fullmatch(r"([\w-]+)\s*>=\s*([-+]?[\d.]+(?:e[-+]?\d+)?)", words)
    if constraint and constraint[1] in names:
        return _constrained(study, constraint[1], float(constraint[2]))
    known = ["knee", *(f"best-{name}" for name in names)]
    raise InputError(
        f"unknown pick '{words}'.{nearest(words, known)}",
        where="--pick",
        remedy=f'Use {", ".join(known)}, a constraint such as "{names[-1]}>=-1", or a trial\'s number.',
    )


def _numbered(study: StudyResult, number: int) -> StudyTrial:
    found = next((trial for trial in study.trials if trial.number == number), None)
    if found is None or found.state != "complete":
        what = "there is no trial" if found is None else f"the trial is {found.state}:"
        complete = ", ".join(str(trial.number) for trial in study.complete) or "none yet"
        raise InputError(f"{what} {number}", where=study.folder, remedy=f"Choose a complete one: {complete}.")
    return found


def _best(study: StudyResult, trials: Sequence[StudyTrial], name: str) -> StudyTrial:
    """Return the best trial in one objective; of equal ones the best in the others, then the first."""
    column = [objective.name for objective in study.objectives].index(name)
    losses = losses_of(study, trials)
    others = np.delete(losses, column, axis=1).sum(axis=1)
    return trials[int(np.lexsort((others, losses[:, column]))[0])]


def _constrained(study: StudyResult, name: str, least: float) -> StudyTrial:
    gains = {trial.number: study.gains(trial)[name] for trial in front_trials(study)}
    # 100 · (0.79 − 0.80) is −1.0000000000000009: whoever allows one point means that trial too.
    allowed = [trial for trial in front_trials(study) if gains[trial.number] >= least - 1e-9]
    if not allowed:
        unit = study.objective(name).unit
        raise InputError(
            f"no trial has {name} >= {least:g}: the best is {max(gains.values()):+.3g} {unit}",
            where="--pick",
            remedy="Lower the bound, or search on with a larger budget.",
        )
    other = next(objective.name for objective in study.objectives if objective.name != name)
    return _best(study, allowed, other)
