"""The whole search on a real, tiny model: merged in memory, scored by lm-eval, exported, and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from tiny_models import tiny_study

from dapt_merge.study import (
    export_trial,
    front_trials,
    load_study,
    load_study_config,
    pick_trial,
    rescore,
    run_study,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def files(folder):
    return tiny_study(folder)


@pytest.fixture(scope="module")
def result(files):
    return run_study(load_study_config(files))


def test_a_search_on_a_live_model_ends_with_values_for_every_trial(result):
    assert [trial.state for trial in result.trials] == ["complete"] * 6
    assert result.trial(result.base).values != result.trial(result.dapt).values
    assert all(trial.standard_errors["domain"] > 0 for trial in result.complete)
    assert set(result.trial(result.base).gain_standard_errors.values()) == {0.0}
    assert result.trial(result.dapt).gain_standard_errors["domain"] > 0


def test_a_trials_values_are_those_of_its_exported_checkpoint(result, folder):
    from dapt_merge.evaluation import evaluate
    from dapt_merge.evaluation.statistics import suite_score

    trial = next(trial for trial in result.complete if trial.endpoint is None)
    export_trial(result, trial.number, folder / "exported")
    for objective in result.objectives:
        suite = result.config["objectives"][objective.name]["suite"]
        scores = evaluate(folder / "exported", suite, dtype="float32")
        assert suite_score(scores, objective.tasks, objective.metric) == trial.values[objective.name]
    record = json.loads((folder / "exported" / "study_trial.json").read_text())
    assert record["trial"] == trial.number
    card = (folder / "exported" / "README.md").read_text()
    assert all(f"{trial.values[o.name]:.4f} ± {trial.standard_errors[o.name]:.4f}" in card for o in result.objectives)
    assert record["note"] in card
    assert yaml.safe_load((folder / "exported" / "recipe.yaml").read_text())["merge_method"] == trial.params["method"]


def test_the_front_is_scored_again_on_other_suites_with_both_ends(result):
    scored = rescore(result, [result.config["objectives"]["general"]["suite"]])
    assert set(scored) == {result.base, result.dapt, *(trial.number for trial in front_trials(result))}
    assert scored[result.base]["general_text"].score == result.trial(result.base).values["general"]


def test_a_recipe_that_was_scored_is_neither_merged_nor_scored_again(result, monkeypatch):
    from dapt_merge.evaluation import scorer
    from dapt_merge.merging import ResidentMerger

    suites = [objective["suite"] for objective in result.config["objectives"].values()]
    monkeypatch.setattr(ResidentMerger, "apply", None)
    monkeypatch.setattr(scorer, "_answer", None)
    scored = rescore(result, suites)
    assert scored[result.dapt]["domain_text"].score == result.trial(result.dapt).values["domain"]


def test_the_knee_lies_on_the_front(result):
    assert pick_trial(result, "knee") in front_trials(result)


def test_sigkill_of_the_command_keeps_finished_trials_and_the_next_run_ends_the_study(files, folder):
    path = folder / "study_file.yaml"
    path.write_text(yaml.safe_dump({**files, "output": str(folder / "killed"), "budget": {"trials": 40}}))
    whole = run_study(load_study_config(path, [f"output={folder / 'whole'}"]))
    program = "import typer; from dapt_merge.cli.search import search; typer.run(search)"
    command = [sys.executable, "-c", program, str(path)]
    kept = []
    for least in (2, 8):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while _finished(folder / "killed") < least:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kept.append([(trial.number, trial.values) for trial in load_study(folder / "killed").complete])
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    final = load_study(folder / "killed")
    assert len(final.finished) == 40
    assert [(t.params, t.values) for t in final.complete] == [(t.params, t.values) for t in whole.complete]
    values = {trial.number: trial.values for trial in final.complete}
    assert all(values[number] == earlier for session in kept for number, earlier in session)


def _finished(folder):
    try:
        return len(load_study(folder).finished)
    except Exception:
        return 0
