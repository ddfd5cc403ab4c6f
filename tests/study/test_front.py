"""Fronts, knees, hypervolumes and picks mean what their definitions say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dapt_merge.errors import DaptMergeError, InputError
from dapt_merge.study import (
    Objective,
    StudyResult,
    StudyTrial,
    front_trials,
    hypervolume,
    knee,
    knee_index,
    nondominated,
    normalised,
    pick_trial,
)

DOMAIN = Objective("domain", "d", "domain", "bits_per_byte", "minimize", ("d",))
GENERAL = Objective("general", "g", "general", "acc", "maximize", ("g",))

few_values = arrays(float, st.tuples(st.integers(1, 12), st.integers(2, 3)), elements=st.integers(0, 4).map(float))


def study(*points, ends=True):
    """Points are (domain, general), the base and the DAPT model first."""
    trials = tuple(
        StudyTrial(number, "complete", {}, {"domain": domain, "general": general}, {})
        for number, (domain, general) in enumerate(points)
    )
    base, dapt = (0, 1) if ends else (None, None)
    return StudyResult(Path("out"), "study", (DOMAIN, GENERAL), trials, base, dapt, {})


TRADE = study((2.0, 0.8), (1.0, 0.5), (1.2, 0.74), (1.5, 0.79), (1.6, 0.6))


@given(few_values)
def test_the_front_is_optunas(losses):
    reference = optuna.create_study(directions=["minimize"] * losses.shape[1])
    for row in losses:
        reference.add_trial(optuna.trial.create_trial(values=row.tolist()))
    expected = {trial.number for trial in reference.best_trials}
    assert set(np.flatnonzero(nondominated(losses)).tolist()) == expected


@given(few_values)
def test_every_point_off_the_front_is_beaten_by_one_on_it(losses):
    front = losses[nondominated(losses)]
    for row in losses[~nondominated(losses)]:
        assert ((front <= row).all(axis=1) & (front < row).any(axis=1)).any()


def test_front_trials_leave_out_dominated_ones_and_later_copies():
    with_copy = study((2.0, 0.8), (1.0, 0.5), (1.2, 0.74), (1.6, 0.6), (1.2, 0.74))
    assert [trial.number for trial in front_trials(with_copy)] == [0, 1, 2]


def test_normalised_coordinates_put_the_ends_at_the_corners():
    assert normalised(TRADE, TRADE.complete)[:2] == pytest.approx(np.array([[0.0, 1.0], [1.0, 0.0]]))


def test_an_objective_that_the_ends_share_keeps_its_own_unit():
    level = study((2.0, 0.8), (1.0, 0.8), (1.5, 0.7))
    assert normalised(level, level.complete)[2] == pytest.approx([0.5, -0.1])


def test_the_knee_is_farthest_above_the_chord():
    # Heights above the line from (0, 1) to (1, 0): (0.8 + 0.8 − 1)/√2 and (0.5 + 0.967 − 1)/√2.
    assert knee(TRADE).number == 2


@given(
    st.integers(0, 6),
    st.floats(0.1, 10),
    st.floats(-5, 5),
)
def test_the_knee_does_not_change_with_scale_and_origin_of_the_coordinates(seed, scale, shift):
    angles = np.sort(np.random.default_rng(seed).uniform(0, np.pi / 2, 9))
    points = np.stack([np.sin(angles), np.cos(angles)], axis=1)
    assert knee_index(points) == knee_index(points * scale + shift)


def test_a_front_without_a_point_above_its_chord_has_its_knee_at_the_largest_sum():
    assert knee_index(np.array([[0.0, 1.0], [1.0, 0.2]])) == 1
    assert knee_index(np.array([[0.0, 1.0], [0.3, 0.3], [1.0, 0.2]])) == 1 + 1
    assert knee_index(np.array([[0.4, 0.4]])) == 0


def test_the_knee_of_three_objectives_is_farthest_above_the_plane():
    points = np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0.5, 0.5, 0.5], [0.34, 0.34, 0.34]])
    assert knee_index(points) == 3


def test_hypervolume_of_the_two_ends_and_of_a_perfect_merge():
    assert hypervolume(study((2.0, 0.8), (1.0, 0.5))) == pytest.approx(2 * 1.1 * 0.1 - 0.1**2)
    assert hypervolume(study((2.0, 0.8), (1.0, 0.5), (1.0, 0.8))) == pytest.approx(1.1**2)


@given(st.lists(st.tuples(st.floats(0.8, 2.4), st.floats(0.4, 0.9)), max_size=8), st.data())
def test_hypervolume_never_falls_when_a_trial_is_added(points, data):
    fewer = study((2.0, 0.8), (1.0, 0.5), *points)
    more = study((2.0, 0.8), (1.0, 0.5), *points, (data.draw(st.floats(0.8, 2.4)), data.draw(st.floats(0.4, 0.9))))
    assert hypervolume(more) >= hypervolume(fewer) - 1e-12


@pytest.mark.parametrize(
    ("pick", "number"),
    [
        ("knee", 2),
        ("best-domain", 1),
        ("best-general", 0),
        ("general>=-1", 3),  # one point of accuracy: 0.79 against 0.80
        ("general >= -6.5", 2),
        ("general>=-100", 1),
        ("domain>=0.9", 1),
        ("domain>=0.45", 3),
        ("4", 4),
        (4, 4),
    ],
)
def test_picks(pick, number):
    assert pick_trial(TRADE, pick).number == number


@pytest.mark.parametrize(
    ("pick", "said"),
    [
        ("knees", "Did you mean 'knee'"),
        ("best-genral", "Did you mean 'best-general'"),
        ("general>=1", "the best is \\+0 points"),
        ("17", "there is no trial 17"),
        ("genral>=-1", "unknown pick"),
    ],
)
def test_a_pick_that_means_nothing_is_refused_with_what_there_is(pick, said):
    with pytest.raises(InputError, match=said):
        pick_trial(TRADE, pick)


def test_without_scored_ends_there_is_no_knee():
    with pytest.raises(DaptMergeError, match="has not scored the base"):
        knee(study((2.0, 0.8), ends=False))
