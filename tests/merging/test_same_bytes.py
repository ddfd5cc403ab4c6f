"""A merge on disk has the bits of the simple implementation, however the work is cut up and whoever does it.

The simple implementation is the methods' torch functions on whole tensors, in one thread, and one rounding at the end.
"""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dapt_merge import merge
from dapt_merge.checkpoints import staging
from dapt_merge.merging import tensor as merging_tensor
from dapt_merge.methods.apply import combine
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.registry import get_method

METHODS = {
    "linear": {"weight": 0.3},
    "task_arithmetic": {"weight": 0.7, "lambda": 0.9},
    "slerp": {"t": 0.4},
    "dare_linear": {"weight": 0.5, "density": 0.4},
    "ties": {"weight": 0.5, "density": 0.3},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5, "epsilon": 0.2},
    "della_linear": {"weight": 0.5, "density": 0.5},
    "breadcrumbs": {"weight": 0.5, "density": 0.6, "gamma": 0.05},
    "breadcrumbs_ties": {"weight": 0.5, "density": 0.6},
    "model_stock": {},
    "sce": {"select_topk": 0.4},
}
# Longer than a run of the writer, shorter than a block of the disk, not a whole number of either, a buffer, nothing.
SHAPES = {"a": (701, 523), "b": (37,), "c": (64, 64), "d": (3, 1), "layers.1.e": (5, 8191), "f": ()}
# threads, largest weight file, elements handed over at a time, bytes of a writing buffer
LAYOUTS = [
    (1, 10**9, 1 << 18, 8 << 20),
    (3, 10**9, 1 << 18, 8 << 20),
    (2, 50_000, 1 << 12, 1 << 14),
    (5, 1, 1 << 10, 1 << 13),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return three folders: a base and two models near it, in bfloat16, with a counter that all agree on."""
    root, folders = tmp_path_factory.mktemp("inputs"), []
    base = {}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for name, shape in SHAPES.items():
            drawn = torch.randn(shape, generator=generator)
            base.setdefault(name, 0.02 * drawn)
            weights[name] = (base[name] if seed == 0 else base[name] + 0.002 * drawn).to(torch.bfloat16)
        weights["steps"] = torch.tensor([7, 8])
        folders.append(root / str(seed))
        folders[-1].mkdir()
        save_file(weights, folders[-1] / "model.safetensors")
    return folders


def simply_merged(folders, name, parameters, seed):
    method = get_method(name)
    base, *models = (load_file(folder / "model.safetensors") for folder in folders)
    merged = {}
    for tensor in base:
        context = TensorContext(tensor, seed=seed)
        arguments = (method, base[tensor], [model[tensor] for model in models], parameters, context)
        merged[tensor] = combine(*arguments, piece_elements=1 << 30, compiled=False).to(base[tensor].dtype)
    return merged


@pytest.mark.parametrize("name", METHODS)
def test_the_bits_are_those_of_the_simple_implementation_however_the_work_is_cut_up(
    inputs, tmp_path, monkeypatch, name
):
    folders = inputs[:2] if name == "slerp" else inputs
    expected = simply_merged(folders, name, METHODS[name], seed=3)
    lazy = merge(folders[0], folders[1:], name, seed=3, **METHODS[name])
    reports = []
    for number, (threads, shard_bytes, run_elements, buffer_bytes) in enumerate(LAYOUTS):
        monkeypatch.setattr(merging_tensor, "RUN_ELEMENTS", run_elements)
        monkeypatch.setattr(staging, "_LARGEST_BUFFER_BYTES", buffer_bytes)
        out = tmp_path / str(number)
        reports.append(lazy.save(out, threads=threads, shard_bytes=shard_bytes))
        files = sorted(out.glob("*.safetensors"))
        assert (len(files) == 1) == (shard_bytes == 10**9)
        merged = {key: value for file in files for key, value in load_file(file).items()}
        assert merged.keys() == expected.keys()
        for key, value in expected.items():
            assert merged[key].dtype == value.dtype
            assert (
                torch.equal(merged[key].view(torch.uint8), value.view(torch.uint8))
                if value.dim()
                else (merged[key] == value)
            )
    assert len({(r.output, r.lost_elements, r.updated_elements) for r in reports}) == 1


SAVE = """
import sys
from dapt_merge import merge
base, one, two, method, out = sys.argv[1:]
print(merge(base, [one, two], method, weight=0.5, density=0.5, seed=3).save(out, threads=2).output)
"""


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_how_python_hashes(inputs, tmp_path):
    outputs, files = set(), set()
    for hash_seed in ("0", "1", "12345"):
        out = tmp_path / hash_seed
        command = [sys.executable, "-c", SAVE, *map(str, inputs), "dare_ties", str(out)]
        done = subprocess.run(
            command, env={"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
        files.add((out / "model.safetensors").read_bytes())
    assert len(outputs) == len(files) == 1
