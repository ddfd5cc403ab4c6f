"""`dapt-merge merge --verify OUT`: exit 0 for the same bits, 1 for others, 2 when it cannot be told."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dapt_merge import merge as merge_models
from dapt_merge.cli.merge import merge
from dapt_merge.errors import InputError

NAMES = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """A merge of base and dapt in the current folder, in out."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "dapt")):
        generator = torch.Generator().manual_seed(seed)
        (tmp_path / name).mkdir()
        save_file({n: torch.randn(4, 4, generator=generator) for n in NAMES}, tmp_path / name / "model.safetensors")
    merge_models("base", "dapt", "linear", weight=0.5).save("out")
    return tmp_path / "out"


def run(*arguments: str):
    app = typer.Typer()
    app.command()(merge)
    return CliRunner().invoke(app, list(arguments))


def change(folder, name):
    weights = load_file(folder / "model.safetensors")
    weights[name][0, 0] += 1
    save_file(weights, folder / "model.safetensors")


def test_the_same_bits_exit_with_0_and_nothing_is_written(output, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = run("--verify", "out")
    assert result.exit_code == 0, result.output
    assert "3 tensors, the same bit for bit" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_other_bits_exit_with_1_and_name_the_tensor(output):
    change(output, NAMES[1])
    result = run("--verify", "out")
    assert result.exit_code == 1
    assert f"{NAMES[1]}: 1 of 16 elements differ" in result.stdout
    assert NAMES[0] not in result.stdout
    assert "changed afterwards" in result.stdout


def test_json_holds_the_finding(output):
    change(output, NAMES[2])
    result = run("--verify", "out", "--json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert data["same"] is False
    assert list(data["differing"]) == [NAMES[2]]


def test_inputs_that_are_gone_are_an_input_error_until_they_are_given(tmp_path):
    (tmp_path / "dapt").rename(tmp_path / "archive")
    error = run("--verify", "out").exception
    assert isinstance(error, InputError)
    assert error.exit_code == 2
    assert "'dapt' is gone" in error.what
    assert run("--verify", "out", "dapt=archive").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--verify", "absent"], "no readable merge report"),
        (["--verify", "base"], "no readable merge report"),
        (["--verify", "out", "-o", "other"], "--out cannot be combined"),
        (["--verify", "out", "recipe.yaml"], "recipe.yaml cannot be combined"),
        (["--verify", "out", "third=x"], "no input 'third'"),
        (["recipe.yaml"], "no output was given"),
    ],
)
def test_each_misuse_is_told_with_a_remedy(arguments, what):
    error = run(*arguments).exception
    assert isinstance(error, InputError)
    assert what in error.what
    assert error.remedy
