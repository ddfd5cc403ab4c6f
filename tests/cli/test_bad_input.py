"""Each bad input as a newcomer meets it: the real entry point, one clear error, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dapt_merge import cli


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with `base`, `dapt` and `two-shards`: tiny Llamas that transformers wrote."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
    )
    for seed, name in enumerate(("base", "dapt", "two-shards")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(root / name, max_shard_size="20KB" if seed == 2 else "1GB")
        save_tokenizer(root / name)
    return root


def save_tokenizer(folder: Path, *, order: int = 1) -> None:
    """A tokenizer of 64 words beside a model; `order` -1 gives the same words the opposite ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", *[f"w{index}" for index in range(62)][::order]]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder)


@pytest.fixture
def copy(models, tmp_path):
    """Copy a model of `models` under a new name, to be spoilt."""
    import shutil

    def make(name: str) -> Path:
        return Path(shutil.copytree(models / name, tmp_path / f"spoilt-{name}"))

    return make


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; return exit code and what stderr said."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["dapt-merge", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr().err

    return call


def merge_of(base: Path, dapt: Path, out: Path, *more: object) -> list[object]:
    return ["merge", "--base", base, "--dapt", dapt, "--method", "linear", "--weight", "0.5", "-o", out, *more]


def clear(code: int, told: str, *parts: str) -> None:
    assert code == 2, told
    assert told.startswith("error: ")
    assert "Traceback" not in told
    assert "what to do:" in told
    for part in parts:
        assert part in told


def test_a_missing_model(run, models, tmp_path):
    clear(*run(*merge_of(models / "base", models / "dpat", tmp_path / "out")), "dpat", "Did you mean 'dapt'?")
    assert not (tmp_path / "out").exists()


def test_a_missing_recipe(run, tmp_path):
    clear(*run("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "out"), "recipe.yaml")


def test_a_truncated_safetensors_file(run, models, copy, tmp_path):
    file = copy("dapt") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    clear(*run(*merge_of(models / "base", file.parent, tmp_path / "out")), "model.safetensors")
    assert not (tmp_path / "out").exists()


def test_an_index_that_names_a_missing_shard(run, models, copy, tmp_path):
    folder = copy("two-shards")
    missing = sorted(folder.glob("model-*.safetensors"))[-1]
    missing.unlink()
    clear(*run(*merge_of(models / "base", folder, tmp_path / "out")), missing.name)


def test_an_index_that_points_outside_its_folder(run, models, copy, tmp_path):
    folder = copy("two-shards")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "../base/model.safetensors"
    path.write_text(json.dumps(index))
    clear(*run(*merge_of(models / "base", folder, tmp_path / "out")), "outside")


def test_mismatched_shapes(run, models, copy, tmp_path):
    folder = copy("dapt")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(8, 16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    clear(*run(*merge_of(models / "base", folder, tmp_path / "out")), "up_proj", "32", "8")


def test_two_vocabularies(run, models, copy, tmp_path):
    folder = copy("dapt")
    save_tokenizer(folder, order=-1)
    clear(*run(*merge_of(models / "base", folder, tmp_path / "out")), "vocabular")
    assert not (tmp_path / "out").exists()


def test_an_unknown_method(run, models, tmp_path):
    arguments = merge_of(models / "base", models / "dapt", tmp_path / "out")
    arguments[arguments.index("linear")] = "linaer"
    clear(*run(*arguments), "linaer", "Did you mean 'linear'?")


@pytest.mark.parametrize(("method", "setting"), [("slerp", "1.5"), ("ties", "nan")])
def test_a_weight_out_of_range(run, models, tmp_path, method, setting):
    arguments = merge_of(models / "base", models / "dapt", tmp_path / "out")
    arguments[arguments.index("linear")] = method
    arguments[arguments.index("0.5")] = setting
    arguments += ["density=0.5"] if method == "ties" else []
    clear(*run(*arguments), setting)


def test_nan_in_a_tensor(run, models, copy, tmp_path):
    folder = copy("dapt")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    clear(*run(*merge_of(models / "base", folder, tmp_path / "out")), "model.norm.weight", folder.name)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_recipe_with_an_unknown_key(run, models, tmp_path):
    recipe = {"merge_method": "linear", "base_modle": str(models / "base"), "models": [{"model": str(models / "dapt")}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    clear(*run("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "out"), "base_modle", "Did you mean 'base_model'?")


@pytest.mark.parametrize("content", ["", "\n\n"], ids=["no bytes", "blank lines"])
def test_an_empty_corpus(run, models, tmp_path, content):
    (tmp_path / "corpus.jsonl").write_text(content)
    config = {"base": str(models / "base"), "corpus": [str(tmp_path / "corpus.jsonl")], "tokens": 100}
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(config))
    clear(*run("pretrain", tmp_path / "pretrain.yaml", "-o", tmp_path / "run"), "corpus.jsonl")
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_an_existing_output_is_kept(run, models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    clear(*run(*merge_of(models / "base", models / "dapt", tmp_path / "out")), "--overwrite")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_a_study_with_an_unknown_key(run, tmp_path):
    (tmp_path / "study.yaml").write_text("base: x\ncheckpoint: y\n")
    clear(*run("search", tmp_path / "study.yaml", "-o", tmp_path / "study"), "Did you mean 'checkpoints'?")


@pytest.mark.parametrize("command", ["plot", "export"])
def test_a_folder_without_a_study(run, tmp_path, command):
    more = ["--pick", "knee", "-o", tmp_path / "out"] if command == "export" else []
    clear(*run(command, tmp_path, *more), "no study")


def test_an_unknown_option_is_bad_usage(run):
    code, told = run("merge", "--wieght", "1")
    assert code == 2
    assert "wieght" in told


def test_a_full_disk(models, tmp_path):
    """On a real file system of 16 KiB; skipped where this process may not mount one."""
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", small]).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        command = [sys.executable, "-c", "from dapt_merge.cli import main; main()"]
        arguments = [str(a) for a in merge_of(models / "base", models / "dapt", small / "out")]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        clear(done.returncode, done.stderr, "disk is full")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_help_answers_without_torch():
    script = "import sys\nfrom dapt_merge.cli import build_app\nbuild_app()\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
