"""Torch comes when something computes with it: not before, and then with one thread in every worker."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from dapt_merge.methods.registry import get_method, method_names

COMPILED = [name for name in method_names() if get_method(name).kernel is not None]


def python(code: str, *arguments: str) -> dict:
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


MERGE = """
import json, sys
sys.argv = ["dapt-merge", "merge", *sys.argv[1:]]
from dapt_merge.cli import build_app
try:
    build_app(["merge"])()
except SystemExit as ending:
    assert not ending.code, ending.code
print(json.dumps({"torch": "torch" in sys.modules}))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    start = {"layers.0.up.weight": torch.randn(48, 32, generator=generator), "norm.weight": torch.ones(32)}
    for name in ("base", "one", "two"):
        moved = {key: value + 0.01 * torch.randn(value.shape, generator=generator) for key, value in start.items()}
        moved = {key: value.bfloat16() for key, value in moved.items()} | {"ids": torch.arange(5)}
        (folder / name).mkdir()
        save_file(moved, folder / name / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", COMPILED)
def test_a_merge_by_compiled_loops_does_without_torch(models, tmp_path, name):
    method = get_method(name)
    weights = {"slerp": ["t=0.4"]}.get(name, ["weight=0.6"])
    others = {"density": "density=0.5", "alpha": "alpha=0.3", "beta": "beta=0.2"}
    settings = [setting for parameter, setting in others.items() if method.parameter(parameter)]
    many = method.max_models is None
    dapt = ["--dapt", str(models / "one"), *(["--dapt", str(models / "two")] if many else [])]
    given = ["--base", str(models / "base"), *dapt, "--method", name, "-o", str(tmp_path / "out")]
    assert python(MERGE, *given, *weights, *settings) == {"torch": False}


def test_tensors_that_stay_as_they_are_need_it_as_little(models, tmp_path):
    given = ["--base", str(models / "base"), "--dapt", str(models / "one"), "--method", "slerp"]
    assert python(MERGE, *given, "t=0", "-o", str(tmp_path / "copied")) == {"torch": False}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: ties\nbase_model: {models / 'base'}\nfreeze: [norm]\n"
        "parameters: {weight: 0.5, density: 0.5}\n"
        f"models: [{{model: {models / 'one'}}}, {{model: {models / 'two'}}}]\n"
    )
    assert python(MERGE, str(recipe), "-o", str(tmp_path / "frozen")) == {"torch": False}


def test_a_method_without_loops_imports_it(models, tmp_path):
    given = ["--base", str(models / "base"), "--dapt", str(models / "one"), "--dapt", str(models / "two")]
    assert python(MERGE, *given, "--method", "model_stock", "-o", str(tmp_path / "out")) == {"torch": True}


def test_planning_is_done_without_it():
    code = """
import json, sys
import dapt_merge.merging.chain, dapt_merge.recipe, dapt_merge.checkpoints, dapt_merge.merging.api
from dapt_merge.methods.registry import method_names
names = method_names()
print(json.dumps({"torch": "torch" in sys.modules, "methods": len(names)}))
"""
    assert python(code) == {"torch": False, "methods": len(method_names())}


def test_whoever_needs_it_first_within_a_pool_gets_it_with_one_thread_and_so_does_every_worker():
    code = """
import json, sys
from dapt_merge.checkpoints.threads import map_in_threads
from dapt_merge.tensors.lazy_torch import torch

def threads(_):
    return torch.get_num_threads()

assert "torch" not in sys.modules
within = map_in_threads(threads, range(64), lambda _: 1, threads=4)
after = torch.get_num_threads()
print(json.dumps({"within": sorted(set(within)), "after": after}))
"""
    import os

    available = len(os.sched_getaffinity(0))
    environment_says_one = os.environ.get("OMP_NUM_THREADS") == "1"
    assert python(code) == {"within": [1], "after": 1 if environment_says_one else available}
