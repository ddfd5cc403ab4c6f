"""`dapt-merge explain`: a recipe in; settings, warnings and cost out, without a weight being read."""

from __future__ import annotations

import json
import math

import pytest
import typer
import yaml
from typer.testing import CliRunner

from dapt_merge.cli.explain import explain
from dapt_merge.errors import InputError

LAYERS, HIDDEN, INNER, KEYS, TOKENS = 32, 4096, 14336, 1024, 128256
CONFIG = {"model_type": "llama", "vocab_size": TOKENS, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}


def shapes_of_an_8b_model():
    shapes = {"model.embed_tokens.weight": (TOKENS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}"
        shapes |= {f"{start}.self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qo"}
        shapes |= {f"{start}.self_attn.{part}_proj.weight": (KEYS, HIDDEN) for part in "kv"}
        shapes |= {f"{start}.mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        shapes[f"{start}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes |= {f"{start}.{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    return {**shapes, "lm_head.weight": (TOKENS, HIDDEN)}


def write_headers(folder):
    """Write a checkpoint whose header is real and whose 16 GB of weights are a hole in a sparse file."""
    header, end = {}, 0
    for name, shape in shapes_of_an_8b_model().items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """Two checkpoints of an 8B model, base and dapt, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no rates of earlier merges
    # The console of the commands may be older than this test, so its width is set on it.
    monkeypatch.setattr("dapt_merge.cli.console.output.width", 60)
    for name in ("base", "dapt"):
        write_headers(tmp_path / name)


def recipe(**keys) -> str:
    content = {"merge_method": "slerp", "base_model": "base", "models": [{"model": "dapt"}], "parameters": {"t": 0.5}}
    with open("recipe.yaml", "w") as file:
        yaml.safe_dump(content | keys, file)
    return "recipe.yaml"


def run(*arguments: str):
    app = typer.Typer()
    app.command()(explain)
    return CliRunner().invoke(app, list(arguments))


def told(*arguments: str) -> str:
    result = run(*arguments, "--throughput", "1")
    assert result.exit_code == 0, result.output
    return result.stdout


def test_an_8b_model_is_explained_from_its_headers():
    text = told(recipe())
    assert "291" in text
    assert "all tensors" in text
    assert "reads 32.12 GB, writes 16.06 GB" in text
    assert "time: about 48 s at 1.00 GB/s (as given)" in text


def test_the_table_fits_a_narrow_terminal_with_a_line_for_each_run_of_tensors():
    text = told(recipe(parameters={"t": [{"filter": "self_attn", "value": [0, 1]}, {"value": 0.3}]}))
    table = [line for line in text.splitlines() if not line.startswith(("reads", "memory", "time", "slerp"))]
    assert all(len(line) <= 60 for line in table)
    assert "attention of layer 0" in text
    assert "a copy of base" in " ".join(text.split())
    assert "throughout: dot_threshold 0.9995" in text


def test_a_gradient_over_the_layers_is_one_line_with_its_course():
    text = " ".join(
        told(recipe(parameters={"t": [{"filter": "mlp", "value": [0.1, 0.9, 0.1]}, {"value": 0.3}]})).split()
    )
    assert "mlp of layers 0–31" in text
    assert "t 0.1 … 0.8742 … 0.1, layer by layer" in text


def test_every_recipe_of_a_file_is_explained_and_their_cost_added_up():
    soup = {"name": "soup", "merge_method": "linear", "models": [{"model": "base"}, {"model": "dapt"}]}
    soup["parameters"] = {"weight": 1}
    with open("chain.yaml", "w") as file:
        yaml.safe_dump_all([soup, {**soup, "name": "again", "models": [{"model": "soup"}, {"model": "dapt"}]}], file)
    text = told("chain.yaml")
    assert text.index("soup, used further down:") < text.index("the result:")
    assert "models soup, dapt" in text
    assert "reads 64.24 GB, writes 32.12 GB" in text
    data = json.loads(run("chain.yaml", "--throughput", "1", "--json").stdout)
    assert [found["name"] for found in data["recipes"]] == ["soup", "again"]
    assert data["cost"]["seconds"] == pytest.approx(96.4, abs=0.1)


def test_all_gives_every_tensor_a_line():
    text = told(recipe(), "--all")
    for name in shapes_of_an_8b_model():
        assert f"{name}: t 0.5, dot_threshold 0.9995 → bfloat16" in text


def test_overrides_act_and_dead_knobs_are_warned_about():
    file = recipe(merge_method="ties", parameters={"weight": 0.3, "density": 0.5})
    result = run(file, "normalize=true", "--throughput", "1")
    assert "normalize true" in result.stdout.replace("\n", " ")
    assert "warning: weight" in result.stderr


def test_json_on_stdout_is_one_object():
    data = json.loads(run(recipe(), "--throughput", "2", "--threads", "2", "--json").stdout)
    assert data["tensors"] == 291
    assert data["lines"][0]["parameters"]["t"] == 0.5
    assert data["cost"]["bytes_per_second"] == 2e9
    assert data["cost"]["threads"] == 2


def test_a_throughput_that_is_not_given_is_measured_and_said_to_be():
    assert "by how fast bytes are copied here now, in 1 thread" in run(recipe(), "--threads", "1").stdout
    assert "as a few made-up tensors took here, in 1 thread" in run(recipe(), "--threads", "1", "--measure").stdout


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["absent.yaml"], "no such file"),
        (["recipe.yaml", "tt=0.5"], "unknown key"),
        (["recipe.yaml", "t=2"], "expected a number in"),
        (["recipe.yaml", "base_model=bsae"], "no such file"),
    ],
)
def test_each_misuse_is_told_with_a_remedy(arguments, what):
    recipe()
    error = run(*arguments).exception
    assert isinstance(error, InputError)
    assert what in str(error)
    assert error.remedy
