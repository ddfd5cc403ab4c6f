"""`dapt-merge merge`: a recipe or flags in; a checkpoint, a summary or JSON out; faults before any work."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dapt_merge.cli.merge import _speed, merge
from dapt_merge.errors import InputError
from dapt_merge.merging.report import MergeReport

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    **{
        f"model.layers.{layer}.{part}.weight": (8, 8)
        for layer in (0, 1)
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    },
    "model.norm.weight": (8,),
    "lm_head.weight": (16, 8),
}


def write_checkpoint(folder, seed, around=None):
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors = drawn if around is None else {name: around[name] + 0.5 * step for name, step in drawn.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return tensors


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Three checkpoints in the current folder: base, dapt, dapt2."""
    monkeypatch.chdir(tmp_path)
    base = write_checkpoint(tmp_path / "base", 0)
    return {
        "base": base,
        "dapt": write_checkpoint(tmp_path / "dapt", 1, base),
        "dapt2": write_checkpoint(tmp_path / "dapt2", 2, base),
    }


def run(*arguments: str):
    app = typer.Typer()
    app.command()(merge)
    return CliRunner().invoke(app, list(arguments))


def refused(*arguments: str) -> InputError:
    error = run(*arguments).exception
    assert isinstance(error, InputError)
    return error


def merged(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def recipe_file(tmp_path, **keys) -> str:
    content = {
        "merge_method": "linear",
        "base_model": "base",
        "models": [{"model": "dapt", "parameters": {"weight": 0.25}}],
        **keys,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_a_recipe_file_with_an_override_writes_the_checkpoint_it_describes(models, tmp_path):
    result = run(recipe_file(tmp_path), "weight=0.5", "-o", "out")
    assert result.exit_code == 0, result.output
    for name, tensor in merged(tmp_path / "out").items():
        torch.testing.assert_close(tensor, (models["base"][name] + models["dapt"][name]) / 2)
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["models"][0]["parameters"]["weight"] == 0.5


def test_flags_and_the_same_recipe_write_the_same_bytes(models, tmp_path):
    flags = ["--base", "base", "--dapt", "dapt", "--dapt", "dapt2", "--method", "ties"]
    result = run(*flags, "--weight", "0.6", "--weight", "0.3", "--density", "0.5", "-o", "from-flags", "lambda=0.9")
    assert result.exit_code == 0, result.output
    entries = [{"model": "dapt", "parameters": {"weight": 0.6}}, {"model": "dapt2", "parameters": {"weight": 0.3}}]
    file = recipe_file(tmp_path, merge_method="ties", models=entries, parameters={"lambda": 0.9, "density": 0.5})
    assert run(file, "-o", "from-file").exit_code == 0
    one, other = merged(tmp_path / "from-flags"), merged(tmp_path / "from-file")
    assert one.keys() == SHAPES.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_gradient_reaches_each_layer_and_the_outer_tensors(models, tmp_path):
    entries = [{"model": "dapt", "parameters": {"weight": [0, 1]}}]
    assert run(recipe_file(tmp_path, models=entries), "-o", "out").exit_code == 0
    found = merged(tmp_path / "out")
    for name in SHAPES:
        behind = ".layers.1." in name or name in ("model.norm.weight", "lm_head.weight")
        assert torch.equal(found[name], models["dapt" if behind else "base"][name]), name


def test_the_recipe_that_a_merge_leaves_behind_gives_the_same_bytes(models, tmp_path):
    file = recipe_file(tmp_path, merge_method="dare_ties", seed=3, out_dtype="bfloat16")
    assert run(file, "models.0.parameters.density=0.5", "-o", "first").exit_code == 0
    assert run("first/recipe.yaml", "-o", "second").exit_code == 0
    first, second = merged(tmp_path / "first"), merged(tmp_path / "second")
    assert first["lm_head.weight"].dtype == torch.bfloat16
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)


def test_json_on_stdout_is_the_report_and_nothing_else(models, tmp_path):
    file = recipe_file(tmp_path, parameters={"int8_mask": True})
    result = run(file, "-o", "out", "--json")
    report = json.loads(result.stdout)
    assert report["tensors"] == len(SHAPES)
    assert report == json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert any("int8_mask" in warning for warning in report["warnings"])
    assert "int8_mask" in result.stderr


def test_the_summary_states_tensors_fallbacks_bytes_and_speed(models, tmp_path):
    file = recipe_file(tmp_path, merge_method="slerp", models=[{"model": "dapt"}], parameters={"t": 0.5})
    summary = run(file, "-o", "out", "parameters.dot_threshold=0").stdout
    assert f"{len(SHAPES)} tensors" in summary
    assert f"fallbacks: {len(SHAPES)} of {len(SHAPES)} tensors (linear)" in summary
    assert "MB/s" in summary
    summary = run(file, "-o", "rounded", "out_dtype=bfloat16").stdout
    assert "rounding: " in summary
    assert "fallbacks" not in summary


def test_an_existing_output_is_kept_unless_overwrite_is_given(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    file = recipe_file(tmp_path)
    assert "exists" in refused(file, "-o", "out").what
    assert (tmp_path / "out" / "precious").exists()
    assert run(file, "-o", "out", "--overwrite").exit_code == 0
    assert merged(tmp_path / "out").keys() == SHAPES.keys()


def test_the_number_of_threads_changes_no_byte(models, tmp_path):
    file = recipe_file(tmp_path)
    assert run(file, "-o", "one", "--threads", "1").exit_code == 0
    assert run(file, "-o", "three", "--threads", "3").exit_code == 0
    one, three = merged(tmp_path / "one"), merged(tmp_path / "three")
    assert all(torch.equal(one[name], three[name]) for name in SHAPES)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["-o", "out"], "no recipe was given"),
        (["t=0.5", "-o", "out"], "no recipe was given"),
        (["absent.yaml", "-o", "out"], "no such file"),
        (["a.yaml", "b.yaml", "-o", "out"], "more than one recipe"),
        (["a.yaml", "--weight", "0.5", "-o", "out"], "--weight cannot be combined"),
        (["--base", "base", "-o", "out"], "--dapt, --method missing"),
        (["--base", "base", "--dapt", "dapt", "--method", "tise", "-o", "out"], "Did you mean 'ties'?"),
        (["--base", "b", "--dapt", "d", "--method", "ties", "--weight", "1", "weight=1", "-o", "o"], "given twice"),
        (["--base", "b", "--dapt", "d", "--method", "ties", "base=c", "-o", "o"], "'base' is no parameter"),
        (["--base", "b", "--dapt", "d", "--method", "ties", "densty=1", "-o", "o"], "Did you mean 'density'?"),
        (["--base", "absent", "--dapt", "dapt", "--method", "slerp", "t=0.5", "-o", "out"], "absent"),
    ],
)
def test_each_misuse_is_told_and_writes_nothing(models, tmp_path, arguments, what):
    error = refused(*arguments)
    assert what in str(error)
    assert error.remedy
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "dapt", "dapt2"]


def test_mergekit_can_be_the_engine_and_its_failures_are_told(models, tmp_path, monkeypatch):
    called = {}

    def merge_nothing(chain, out, engine, overwrite):
        called.update(method=chain[0].recipe.merge_method, out=str(out), engine=engine, overwrite=overwrite)

    monkeypatch.setattr("dapt_merge.merging.chain.merge_chain", merge_nothing)
    assert run(recipe_file(tmp_path), "--engine", "mergekit", "--overwrite", "-o", "theirs").exit_code == 0
    assert called == {"method": "linear", "out": "theirs", "engine": "mergekit", "overwrite": True}
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    file = recipe_file(tmp_path, merge_method="slerp", models=[{"model": "dapt"}], parameters={"t": 0.3})
    # These models have no norms, which mergekit's table of architectures insists on.
    assert "mergekit failed" in str(run(file, "--engine", "mergekit", "-o", "theirs").exception)
    assert not (tmp_path / "theirs").exists()


def test_an_engine_that_is_not_there_and_threads_for_mergekits_are_refused(models, tmp_path):
    assert "Did you mean 'mergekit'?" in refused(recipe_file(tmp_path), "--engine", "mergkit", "-o", "out").what
    assert "threads" in refused(recipe_file(tmp_path), "--engine", "mergekit", "--threads", "2", "-o", "out").what


def test_the_speed_is_told_against_copying_and_not_where_a_run_was_resumed(models, tmp_path):
    run(recipe_file(tmp_path), "-o", "out")
    report = open_report(tmp_path / "out")
    moved = report.bytes_read + report.bytes_written
    assert _speed(replace(report, seconds=2.0, copy_seconds=1.0)).endswith(
        "50% of the speed of copying the same bytes here)"
    )
    assert f"({moved / 2 / 1e6:.2f} MB/s)" in _speed(replace(report, seconds=2.0, copy_seconds=None))
    assert _speed(replace(report, seconds=2.0, resumed_tensors=3)).endswith(
        "3 tensors by an interrupted run, the rest in 2.0 s"
    )


def open_report(folder) -> MergeReport:
    content = json.loads((folder / "merge_report.json").read_text())
    return MergeReport(**content)
