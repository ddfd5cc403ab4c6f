"""Every merge recipe that ships is valid, has nothing inert in it, and opens with what it does and how to run it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dapt_merge.recipe import load_recipe, recipe_warnings

FOLDER = Path(__file__).parents[2] / "recipes"
MERGES = sorted(path for path in FOLDER.glob("*.yaml") if "merge_method" in yaml.safe_load(path.read_text("utf-8")))


def test_the_merges_that_the_documentation_names_are_there():
    names = {path.stem for path in MERGES}
    assert {
        "slerp-half",
        "slerp-gradient",
        "linear-wise-ft",
        "ties",
        "dare-ties",
        "stack-upscale",
        "group-weights",
    } <= names


@pytest.mark.parametrize("path", MERGES, ids=lambda path: path.stem)
def test_it_loads_without_a_warning(path):
    assert recipe_warnings(load_recipe(path)) == []


@pytest.mark.parametrize("path", MERGES, ids=lambda path: path.stem)
def test_its_header_says_what_it_does_how_to_run_it_and_what_it_costs(path):
    header = path.read_text("utf-8").split("merge_method:")[0]
    assert header.startswith("# ")
    assert "# Cost: " in header
    command = next(line for line in header.splitlines() if line.startswith("# Run:  dapt-merge merge"))
    assert f"recipes/{path.name} -o merged" in command


@pytest.mark.parametrize("path", MERGES, ids=lambda path: path.stem)
def test_the_overrides_of_its_command_are_accepted(path):
    header = path.read_text("utf-8").split("merge_method:")[0]
    command = next(line for line in header.splitlines() if line.startswith("# Run:"))
    overrides = [word for word in command.split() if "=" in word]
    # The command replaces every placeholder by a name in capitals.
    assert all(reference.isupper() for reference in load_recipe(path, overrides).references())


@pytest.mark.parametrize(
    "path", [p for p in MERGES if "(Our own form" not in p.read_text("utf-8")], ids=lambda p: p.stem
)
def test_mergekit_reads_it_too(path):
    from mergekit.config import MergeConfiguration

    assert MergeConfiguration.model_validate(yaml.safe_load(path.read_text("utf-8"))).referenced_models()
