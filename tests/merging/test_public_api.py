"""`import dapt_merge` costs nothing, and every public name is where it says."""

import subprocess
import sys

import pytest

import dapt_merge


def test_importing_the_package_imports_no_heavy_library():
    heavy = "('torch', 'transformers', 'optuna', 'lm_eval', 'datasets', 'numpy')"
    code = f"import sys, dapt_merge; dir(dapt_merge); print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", dapt_merge.__all__)
def test_every_public_name_is_there(name):
    assert getattr(dapt_merge, name) is not None
    assert name in dir(dapt_merge)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'merge_all'"):
        _ = dapt_merge.merge_all
