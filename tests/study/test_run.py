"""A study keeps what it finished, repeats nothing, and goes on as if it had never stopped."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time

import optuna
import pytest
from formula_scorer import FormulaScorer, study_files

from dapt_merge.errors import DaptMergeError, InputError
from dapt_merge.study import load_study, load_study_config, run_study


def run(files, *overrides, scorer=None, **kwargs):
    return run_study(load_study_config(files, overrides), scorer=scorer or FormulaScorer(), **kwargs)


def points(result):
    return [(trial.params, dict(trial.values)) for trial in result.finished]


@pytest.fixture
def files(tmp_path):
    return study_files(tmp_path)


def test_the_two_ends_come_first_then_the_enqueued_points(files):
    result = run({**files, "enqueue": [{"method": "linear", "checkpoint": "checkpoint-20", "weight": 0.5}]})
    assert [trial.label for trial in result.trials[:3]] == [
        "base",
        "DAPT checkpoint-20",
        "linear weight 0.5 · checkpoint-20",
    ]
    assert (result.base, result.dapt) == (0, 1)
    assert len(result.complete) == 6


def test_a_trial_carries_its_recipe_its_scores_and_their_standard_errors(files):
    trial = run(files).trials[3]
    assert set(trial.values) == set(trial.standard_errors) == {"domain", "general"}
    assert trial.standard_errors["general"] > 0
    assert trial.record == {"extra": {"acc": pytest.approx(0.5)}}
    assert trial.scores["domain_task/bits_per_byte"] == trial.values["domain"]
    assert f"merge_method: {trial.params['method']}" in trial.recipe


def test_gains_are_positive_when_better_whatever_the_direction(files):
    result = run(files)
    assert result.gains(result.trial(result.dapt)) == {"domain": pytest.approx(1.0), "general": pytest.approx(-30.0)}


def test_a_study_is_read_back_from_its_folder_as_it_was_returned(files):
    result = run(files)
    loaded = load_study(files["output"])
    assert points(loaded) == points(result)
    assert loaded.objectives == result.objectives
    assert loaded.objective("general").side == "general"


@pytest.mark.parametrize(
    "sampler", ["tpe", "nsgaii", *(pytest.param(name, marks=pytest.mark.slow) for name in ("random", "qmc", "gp"))]
)
def test_an_interrupted_study_proposes_what_an_uninterrupted_one_would(tmp_path, sampler):
    files = study_files(tmp_path)
    overrides = [f"sampler.name={sampler}", "sampler.seed=7"]
    trials = 13
    whole = run(files, f"output={tmp_path / 'whole'}", f"budget.trials={trials}", *overrides)
    for number in (1, 11):
        with pytest.raises(KeyboardInterrupt):
            run(
                files,
                f"output={tmp_path / 'torn'}",
                f"budget.trials={trials}",
                *overrides,
                scorer=_Interrupting(after=number - _finished(tmp_path / "torn")),
            )
    torn = run(files, f"output={tmp_path / 'torn'}", f"budget.trials={trials}", *overrides)
    assert points(torn) == points(whole)
    assert len(torn.finished) == trials
    assert [trial.state for trial in torn.trials].count("interrupted") == 2


class _Interrupting(FormulaScorer):
    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def score(self, recipe, on_progress=None):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().score(recipe, on_progress)


def _finished(folder):
    return len(load_study(folder).finished) if (folder / "study.db").exists() else 0


def test_the_same_seed_gives_the_same_study_and_another_seed_another(files, tmp_path):
    first = run(files, f"output={tmp_path / 'a'}", "sampler.seed=1", "budget.trials=4")
    second = run(files, f"output={tmp_path / 'b'}", "sampler.seed=1", "budget.trials=4")
    third = run(files, f"output={tmp_path / 'c'}", "sampler.seed=2", "budget.trials=4")
    assert points(first) == points(second)
    assert points(first) != points(third)


def test_a_failed_trial_is_kept_with_its_reason_and_the_study_goes_on(files):
    result = run(files, scorer=FormulaScorer(fail_when=lambda recipe: recipe.merge_method == "ties"))
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert failed
    assert all(trial.failure == "RuntimeError: out of memory, as it were" for trial in failed)
    assert len(result.finished) == 6


def test_a_failed_end_stops_the_study_and_is_tried_again_by_the_next_run(files):
    with pytest.raises(DaptMergeError, match=r"base end .* out of memory"):
        run(files, scorer=FormulaScorer(fail_when=lambda recipe: True))
    result = run(files)
    assert len(result.complete) == 6
    assert result.trial(result.base).endpoint == "base"


def test_a_finished_study_does_nothing_more_and_a_larger_budget_goes_on(files):
    run(files)
    again = FormulaScorer()
    assert len(run(files, scorer=again).finished) == 6
    assert again.scored == []
    assert len(run(files, "budget.trials=8", scorer=again).finished) == 8
    # The base once more: for paired differences, and from the item store where there is a model.
    assert len([recipe for recipe in again.scored if "weight: 0.0" not in recipe]) == 2


def test_a_setting_that_is_refused_leaves_no_folder(files, tmp_path):
    with pytest.raises(InputError):
        run(files, "space.method=linaer")
    assert not (tmp_path / "out").exists()


def test_a_larger_budget_gives_the_same_trials_as_that_budget_from_the_start(files, tmp_path):
    run(files)
    grown = run(files, "budget.trials=9")
    whole = run(files, "budget.trials=9", f"output={tmp_path / 'whole'}")
    assert points(grown) == points(whole)


def test_a_budget_in_seconds_stops_between_trials(files):
    files["budget"] = {"seconds": 0.3}
    result = run(files, scorer=FormulaScorer(seconds=0.1))
    assert 2 <= len(result.finished) <= 4


@pytest.mark.parametrize(
    ("override", "scorer", "said"),
    [
        ("space.weight.high=0.9", {}, "space.weight.high was 1.0, is 0.9"),
        ("sampler.name=random", {}, "sampler.name was tpe, is random"),
        ("limit=5", {}, "limit was None, is 5"),
        ("name=study", {"base": "other"}, "base was b:base, is other:base"),
    ],
)
def test_a_folder_with_another_study_is_refused_by_what_differs(files, override, scorer, said):
    run(files)
    with pytest.raises(InputError, match="made with other settings") as refused:
        run(files, override, scorer=FormulaScorer(**scorer))
    assert said in str(refused.value)


def test_tasks_that_changed_since_are_refused(files):
    run(files)
    with pytest.raises(InputError, match=r"domain\.domain_task was 1, is 2"):
        run(files, "budget.trials=7", scorer=FormulaScorer(version="2"))


def test_a_grid_takes_every_point_once_and_needs_no_budget(files):
    files["space"] = {
        "method": ["linear", "ties"],
        "weight": {"low": 0.0, "high": 1.0, "step": 0.25},
        "density": [0.3, 0.6],
    }
    del files["budget"]
    result = run(files, "sampler.name=grid")
    assert len(result.complete) == 5 + 5 * 2 - 2  # at weight 0, TIES is the base at any density
    assert len({trial.recipe for trial in result.complete}) == 13
    assert all(("density" in trial.params) == (trial.params["method"] == "ties") for trial in result.complete)


def test_the_ends_are_scored_exactly_even_where_the_space_leaves_them_out(files):
    files["space"] = {"method": "ties", "weight": {"low": 0.2, "high": 0.8}, "density": 0.5}
    result = run(files, "budget.trials=13", "sampler.name=nsgaii")
    assert "weight: 0.0" in result.trial(result.base).recipe
    assert "weight: 1.0" in result.trial(result.dapt).recipe
    assert all(0.2 <= trial.params["weight"] <= 0.8 for trial in result.complete[2:])


def test_two_searches_at_once_on_one_folder_are_refused(files):
    def on_trial(trial, result):
        with pytest.raises(DaptMergeError, match=f"process {os.getpid()}"):
            run(files)

    run(files, on_trial=on_trial)


def test_progress_ends_at_the_total_and_never_goes_back(files):
    seen = []
    run(files, on_progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (120, 120)


def _search(files):
    run(files, "budget.trials=10", scorer=FormulaScorer(seconds=0.05))


@pytest.mark.slow
def test_sigkill_at_any_moment_loses_no_finished_trial_and_repeats_none(files, tmp_path):
    whole = run(files, "budget.trials=10", f"output={tmp_path / 'whole'}")
    context = multiprocessing.get_context("spawn")
    kept = []
    for delay_seconds in (0.02, 0.13, 0.21, 0.34, 0.4):
        process = context.Process(target=_search, args=(files,))
        process.start()
        _wait_for_lock(tmp_path / "out" / "study.lock", process.pid)
        time.sleep(delay_seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kept.append(_safely(tmp_path / "out"))
    assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(kept))
    final = run(files, "budget.trials=10")
    assert points(final) == points(whole)
    assert optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path / 'out' / 'study.db'}").trials


def _wait_for_lock(lock, pid):
    while not (lock.is_file() and lock.read_text() == str(pid)):
        time.sleep(0.01)


def _safely(folder):
    try:
        return points(load_study(folder))
    except InputError:
        return []
