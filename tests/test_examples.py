"""Every example in a docstring runs and prints what it says; every preset opens with its command and its cost."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import dapt_merge

MODULES = sorted(module.name for module in pkgutil.walk_packages(dapt_merge.__path__, "dapt_merge."))
ROOT = Path(__file__).parent.parent
PRESETS = sorted([*ROOT.glob("recipes/*.yaml"), *ROOT.glob("search/*.yaml")])


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name):
    outcome = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert outcome.failed == 0


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.name)
def test_a_preset_says_what_it_does_how_to_run_it_and_what_it_costs(preset):
    header = [line for line in preset.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("dapt-merge " in line for line in header)
    assert any(word in line.lower() for line in header for word in ("cost", "needs"))


def test_presets_are_found_by_name():
    from dapt_merge.errors import InputError
    from dapt_merge.presets import preset

    assert preset("search/demo.yaml").is_file()
    with pytest.raises(InputError, match="preset"):
        preset("search/none.yaml")
