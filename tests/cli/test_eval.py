"""`dapt-merge eval` as a user meets it: a table, a JSON object, three short lines for a mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))

from evaluation_cases import QUESTIONS, SENTENCES, make_model, make_tokenizer, write_suites

from dapt_merge.cli.eval import eval as eval_command
from dapt_merge.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    write_suites(folder)
    for name, seed in (("base", 0), ("dapt", 1)):
        make_model(seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder


def run(*arguments):
    app = typer.Typer()
    app.command()(eval_command)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_table_has_a_row_for_each_task_and_a_column_for_each_model(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("dapt_merge.cli.console.output", Console(width=160, highlight=False))
    shown = run("base", "dapt", "--suite", "domain.yaml", "--suite", "general.yaml").stdout
    assert "questions (domain)" in shown
    assert "texts (general)" in shown
    assert "base" in shown
    assert "dapt" in shown
    assert shown.count("±") == 6


def test_json_is_one_object_with_scores_errors_and_counts(folder):
    result = run(folder / "base", "--suite", folder / "domain.yaml", "--suite", folder / "general.yaml", "--json")
    printed = json.loads(result.stdout)
    model = printed["models"][str(folder / "base")]
    quiz, texts = model["suites"]["questions"]["tasks"], model["suites"]["texts"]["tasks"]
    assert [row["metric"] for row in quiz] == ["acc", "acc_norm"]
    assert [row["items"] for row in (*quiz, *texts)] == [len(QUESTIONS), len(QUESTIONS), len(SENTENCES)]
    assert texts[0]["score"] > 0
    assert texts[0]["standard_error"] > 0
    assert printed["suites"]["texts"] == {"axis": "general", "language": "en"}


def test_a_limit_and_a_store_are_honoured(folder, tmp_path):
    store = tmp_path / "items.sqlite"
    arguments = (folder / "base", "--suite", folder / "domain.yaml", "--limit", 2, "--store", store, "--json")
    first = json.loads(run(*arguments).stdout)
    assert first["models"][str(folder / "base")]["suites"]["questions"]["tasks"][0]["items"] == 2
    assert store.is_file()
    assert json.loads(run(*arguments).stdout) == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("./absent", "--suite", "domain.yaml"), "model folder does not exist"),
        (("./bas", "--suite", "domain.yaml"), "Did you mean 'base'"),
        (("tasks", "--suite", "domain.yaml"), "config.json is missing"),
        (("base", "--suite", "absent.yaml"), "no such file"),
        (("base", "--suite", "domain.yaml", "--dtype", "bf16"), "unknown dtype"),
        (("nobody/nothing", "--suite", "domain.yaml"), "cannot be loaded"),
        (("domain.yaml", "--suite", "domain.yaml"), "a model is a folder"),
    ],
)
def test_a_mistake_is_an_input_error(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=message):
        run(*arguments)


def test_the_command_does_not_import_torch_before_it_runs():
    code = "import sys, dapt_merge.cli.eval; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
