"""`dapt-merge methods`: what a user has to know of a method before writing a recipe."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from dapt_merge.cli import console
from dapt_merge.cli.methods import methods
from dapt_merge.errors import InputError
from dapt_merge.methods.registry import get_method, method_names


def run(*arguments):
    app = typer.Typer()
    app.command()(methods)
    # A console asks for COLUMNS once, when it is made: whichever test loads it first would decide.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console.output, "_width", 600)
        result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_the_list_has_every_method_with_its_inputs_and_knobs():
    lines = {line.split()[0]: line for line in run().splitlines() if line.strip()}
    for name in method_names():
        if name.startswith("lines_"):
            assert name.removeprefix("lines_") in lines["Scaled"]
            continue
        for parameter in get_method(name).parameters:
            assert parameter.name in lines[name]
        assert get_method(name).function.__doc__.split("\n")[0].strip() in lines[name]
    assert "a base and 2 or more models" in lines["model_stock"]
    assert "a base and 1 model " in lines["slerp"]
    assert "1 or more models, a base if given" in lines["linear"]
    assert "dot_threshold=0.9995" in lines["slerp"]


@pytest.mark.parametrize("name", method_names())
def test_one_method_tells_its_formula_and_the_meaning_and_range_of_every_parameter(name):
    text = " ".join(run(name).split())
    method = get_method(name)
    assert method.function.__doc__.split("\n")[0].strip() in text
    assert method.reference in text
    for parameter in method.parameters:
        assert " ".join(parameter.meaning.split()) in text
        assert parameter.expected in text
    assert "Raises" not in text


def test_json_has_the_same_for_programs():
    listed = json.loads(run("--json"))
    assert set(listed) == set(method_names())
    assert listed["ties"] == json.loads(run("ties", "--json"))
    density = next(knob for knob in listed["ties"]["parameters"] if knob["name"] == "density")
    assert density["allowed"] == "a number in [0, 1]"
    assert density["default"] == 1
    assert density["per_model"]
    assert listed["dare_ties"]["random"]
    assert not listed["ties"]["random"]


def test_an_unknown_method_suggests_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'ties'"):
        run("teis")
