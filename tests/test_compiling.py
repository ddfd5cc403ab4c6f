"""Where the compiled loops come from: loaded without what they do not need, and made where nothing can be kept."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import dapt_merge

MERGE = """
import sys, torch
from dapt_merge.methods.apply import combine
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.registry import get_method

base, model = torch.ones(3, 4, dtype=torch.bfloat16), torch.full((3, 4), 2.0, dtype=torch.bfloat16)
merged = combine(get_method("linear"), base, [model], {"weight": 0.5}, TensorContext("w"), out_dtype=torch.bfloat16)
assert (merged == 1.5).all()
"""
DOT = """
assert "scipy.linalg" not in sys.modules
import numba, numpy
print(numba.njit(lambda one: numpy.dot(one, one))(numpy.full((2, 2), 2.0))[0, 0])
"""
PLACE = """
from dapt_merge.methods import kernels
print(kernels.__file__, type(kernels.merge_two_of_bfloat16._cache).__name__)
"""


def outcome(program: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_merge_does_not_import_scipys_linear_algebra_and_other_loops_can_still_multiply_matrices(tmp_path):
    kept = {"NUMBA_CACHE_DIR": os.environ["NUMBA_CACHE_DIR"]} if "NUMBA_CACHE_DIR" in os.environ else {}
    found = outcome(MERGE + DOT, tmp_path, {"PYTHONPATH": str(Path(dapt_merge.__file__).parents[1]), **kept})
    assert (found.stdout, found.stderr) == ("8.0\n", "")


def test_an_installation_that_cannot_be_written_to_without_a_home_folder_merges_all_the_same(tmp_path):
    package = tmp_path / "dapt_merge"
    shutil.copytree(Path(dapt_merge.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "methods" / "__pycache__").touch()  # where the folder would have to be, even for root
    environment = {"PYTHONPATH": str(tmp_path), "HOME": os.devnull, "PYTHONDONTWRITEBYTECODE": "1"}
    found = outcome(MERGE + PLACE, tmp_path, environment)
    assert (found.stdout, found.stderr) == (f"{package / 'methods' / 'kernels.py'} NullCache\n", "")
