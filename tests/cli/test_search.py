"""`dapt-merge search` and `export` say what they did, and what to do when they cannot."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

import dapt_merge.study.run as study_run
from dapt_merge.cli.export import export
from dapt_merge.cli.search import search
from dapt_merge.errors import InputError

sys.path.insert(0, str(Path(__file__).parent.parent / "study"))
from formula_scorer import FormulaScorer, study_files

app = typer.Typer()
app.command("search")(search)
app.command("export")(export)


@pytest.fixture
def study_file(tmp_path, monkeypatch):
    monkeypatch.setattr(study_run, "_live_model", lambda *arguments: FormulaScorer())
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study_files(tmp_path)))
    return path


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_search_prints_one_line_a_trial_and_the_front(study_file):
    result = call("search", study_file, "budget.trials=4")
    assert result.exit_code == 0, result.output
    assert "DAPT checkpoint-20" in result.stderr
    assert "domain +1.000 ±0.000 bits per byte   general -30.000 ±0.000 points" in result.stderr
    assert "<- knee" in result.stdout
    assert "4 trials" in result.stdout


def test_search_prints_one_json_object(study_file):
    result = call("search", study_file, "budget.trials=3", "--json")
    content = json.loads(result.stdout)
    assert [trial["label"] for trial in content["trials"][:2]] == ["base", "DAPT checkpoint-20"]
    assert content["knee"] in content["front"]


def test_the_output_option_overrides_the_file(study_file, tmp_path):
    assert call("search", study_file, "-o", tmp_path / "other", "budget.trials=2").exit_code == 0
    assert (tmp_path / "other" / "study.db").is_file()


def test_an_interrupted_search_says_that_it_goes_on(study_file, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(FormulaScorer, "score", interrupted)
    result = call("search", study_file)
    assert result.exit_code == 130
    assert "the same command goes on" in result.stderr


def test_export_of_a_pick_that_does_not_exist_writes_nothing(study_file, tmp_path):
    call("search", study_file, "budget.trials=3")
    result = call("export", tmp_path / "out", "--pick", "17", "-o", tmp_path / "merged")
    assert isinstance(result.exception, InputError)
    assert "no trial 17" in str(result.exception)
    assert not (tmp_path / "merged").exists()


def test_export_of_a_folder_without_a_study_is_refused(tmp_path):
    result = call("export", tmp_path, "-o", tmp_path / "merged")
    assert isinstance(result.exception, InputError)
    assert "there is no study here" in str(result.exception)


def test_importing_the_commands_does_not_import_torch():
    import subprocess

    program = (
        "import sys, dapt_merge.cli.search, dapt_merge.cli.export, dapt_merge.study; assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
