"""A merge method in a package of one's own, just as the README shows it, installed and used."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def block(language: str, words: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return next(text for text in found if words in text)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The README's two blocks as a package, installed by pip into a folder of its own."""
    root = tmp_path_factory.mktemp("plugin")
    source = root / "source" / "my_package"
    source.mkdir(parents=True)
    (source / "__init__.py").touch()
    (source / "methods.py").write_text(block("python", "def capped"), encoding="utf-8")
    declaration = '[project]\nname = "my-package"\nversion = "1.0"\n\n' + block("toml", "capped =")
    (source.parent / "pyproject.toml").write_text(declaration, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(root / "site"), str(source.parent)], check=True, cwd=root)
    return root / "site"


def run(site, *arguments):
    start = "import sys; from dapt_merge.cli import main; sys.argv[0] = 'dapt-merge'; main()"
    paths = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", start, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )


@pytest.mark.slow
def test_its_method_is_listed_with_its_parameter(installed):
    found = json.loads(run(installed, "methods", "capped", "--json").stdout)
    assert found["parameters"][0]["meaning"] == "largest change of an element"
    assert found["description"].startswith("θ₀ + clip(δ, −cap, cap)")
    assert "capped" in run(installed, "methods").stdout


@pytest.mark.slow
def test_its_method_merges_and_its_parameter_is_checked(installed, tmp_path):
    weights = {"base": torch.zeros(3), "dapt": torch.tensor([-1.0, 0.0005, 1.0])}
    for name, tensor in weights.items():
        (tmp_path / name).mkdir()
        save_file({"w": tensor}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
    pair = ["--base", str(tmp_path / "base"), "--dapt", str(tmp_path / "dapt"), "--method", "capped"]
    done = run(installed, "merge", *pair, "cap=0.25", "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    merged = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert merged.tolist() == pytest.approx([-0.25, 0.0005, 0.25])
    refused = run(installed, "merge", *pair, "cap=-1", "-o", str(tmp_path / "other"))
    assert refused.returncode == 2
    assert "a finite number of at least 0" in refused.stderr


@pytest.mark.slow
def test_without_the_package_the_name_is_unknown(tmp_path):
    found = run(tmp_path, "methods", "capped")
    assert found.returncode == 2
    assert "there is no merge method 'capped'" in found.stderr
