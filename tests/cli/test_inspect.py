"""`dapt-merge inspect`: two checkpoints in; tables that fit the terminal, JSON, a heat map; faults before any work."""

from __future__ import annotations

import json
import re

import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from dapt_merge.cli.inspect import inspect
from dapt_merge.errors import InputError

SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    **{f"model.layers.{n}.{part}.weight": (8, 8) for n in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")},
    "model.norm.weight": (8,),
}


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """Three checkpoints in the current folder: base, dapt, dapt2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dapt_merge.cli.console.output", Console(width=60, highlight=False))
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for name, scale in (("base", 0.0), ("dapt", 0.01), ("dapt2", 0.02)):
        (tmp_path / name).mkdir()
        moved = {n: t + scale * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        save_file(moved, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama", "rms_norm_eps": 1 + scale}))


def run(*arguments: str):
    app = typer.Typer()
    app.command()(inspect)
    return CliRunner().invoke(app, list(arguments))


def refused(*arguments: str) -> InputError:
    error = run(*arguments).exception
    assert isinstance(error, InputError)
    return error


@pytest.mark.parametrize("arguments", [["dapt"], ["dapt", "dapt2"], ["dapt", "dapt2", "--all"]])
def test_the_tables_fit_a_narrow_terminal_with_every_number_whole(arguments):
    result = run("base", *arguments)
    assert result.exit_code == 0, result.output
    table = result.stdout.split("group", 1)[1]
    assert all(len(line) <= 60 for line in table.splitlines() if not line.startswith(("config", "dapt", "a merge")))
    assert "attention" in table
    assert "embedding" in table
    assert "…" not in table


def test_differences_beside_the_weights_are_told():
    told = run("base", "dapt", "--no-rank").stdout
    assert "config.json: rms_norm_eps is 1.0 in the base and 1.01 here" in told
    assert "vocabulary: no difference" in told


def test_layers_are_lines_and_with_all_every_group_of_them_is():
    short, full = run("base", "dapt", "--no-rank").stdout, run("base", "dapt", "--no-rank", "--all").stdout
    assert "outside" in short
    assert "0 attention" not in short
    assert "0 attention" in full
    assert "1 mlp" in full


def test_what_to_take_away_is_said_first():
    told = run("base", "dapt").stdout
    assert re.search(r"moved by 1\.\d+% of the base's norm; \w+ most \(\d", told)
    assert re.search(r"in bfloat16 at weight 0\.5, \d+\.?\d*% of the moved elements fall back", told)
    assert re.search(r"slerp would merge \d of 6 tensors linearly", told)


def test_several_checkpoints_have_a_column_each_and_agree_in_sign_as_far_as_is_said():
    told = run("base", "dapt", "dapt2", "--no-rank").stdout
    header = next(line for line in told.splitlines() if line.startswith("layer "))
    assert header.split() == ["layer", "dapt", "dapt2", "signs"]
    assert "(50.0% if they were unrelated)" in told
    rows = {line.split()[0]: line.split()[1:3] for line in told.splitlines() if line.startswith(("dapt ", "dapt2 "))}
    assert 0.8 < float(rows["dapt"][0].rstrip("%")) < 1.2 < 1.6 < float(rows["dapt2"][0].rstrip("%")) < 2.4


def test_without_ranks_there_is_no_column_for_them():
    assert " rank " in run("base", "dapt").stdout
    assert " rank " not in run("base", "dapt", "--no-rank").stdout


def test_json_on_stdout_holds_every_tensor_and_nothing_else():
    data = json.loads(run("base", "dapt", "dapt2", "--json").stdout)
    assert data["base"] == "base"
    assert [entry["label"] for entry in data["dapt"]] == ["dapt", "dapt2"]
    assert {tensor["name"] for tensor in data["dapt"][0]["tensors"]} == SHAPES.keys()
    assert data["dapt"][1]["all"]["relative_norm"] == pytest.approx(0.02, rel=0.2)


def test_the_heat_map_is_a_picture_that_is_not_overwritten_unasked(tmp_path):
    result = run("base", "dapt", "--heat-map", "map.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert "map.png" in result.stdout
    assert "exists" in refused("base", "dapt", "--heat-map", "map.png").what
    assert run("base", "dapt", "--heat-map", "map.png", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["absent", "dapt"], "no such file"),
        (["base", "dap"], "Did you mean"),
        (["base", "dapt", "--heat-map", "map.jpeg"], "cannot draw"),
    ],
)
def test_each_misuse_is_told_with_a_remedy(arguments, what, tmp_path):
    error = refused(*arguments)
    assert what in str(error)
    assert error.remedy
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "dapt", "dapt2"]


def test_one_checkpoint_is_not_enough():
    assert run("base").exit_code == 2
