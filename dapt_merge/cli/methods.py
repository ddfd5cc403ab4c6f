"""`dapt-merge methods`: the merge methods there are, those of other installed packages among them, and their knobs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from dapt_merge.methods.contract import Method, Parameter

_SCALED_BY_LAYER = "lines_"


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A method, to see its formula and parameters.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """List the merge methods, or say what one computes and what its parameters mean.

    dapt-merge methods ties
    """
    from dapt_merge.cli.console import output, print_json
    from dapt_merge.methods.registry import get_method, method_names

    if name is not None:
        method = get_method(name)
        if json:
            print_json(_as_json(method))
            return
        for line in _heading(method):
            output.print(line, markup=False)
        if method.parameters:
            output.print(_parameter_table(method.parameters))
        return
    found = [get_method(known) for known in method_names()]
    if json:
        print_json({method.name: _as_json(method) for method in found})
        return
    output.print(_method_table([method for method in found if not method.name.startswith(_SCALED_BY_LAYER)]))
    scaled = [
        method.name.removeprefix(_SCALED_BY_LAYER) for method in found if method.name.startswith(_SCALED_BY_LAYER)
    ]
    output.print(f"\nScaled by layer, as lines is task_arithmetic: {_SCALED_BY_LAYER} before {', '.join(scaled)}.")
    output.print("dapt-merge methods NAME: the formula, and what each parameter means.")


def _heading(method: Method) -> list[str]:
    """The name, what goes in, where the formula comes from, and the docstring, whose first lines are the formula."""
    drawn = "; draws at random, from the recipe's seed" if method.random else ""
    return [f"{method.name}: {_inputs(method)}{drawn}", f"reference: {method.reference}", "", *_paragraphs(method), ""]


def _paragraphs(method: Method) -> list[str]:
    """The docstring without what is raised, a line for each paragraph: the terminal breaks it."""
    text = (inspect.getdoc(method.function) or "").split("\nRaises:")[0].strip()
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def _method_table(found: list[Method]) -> Table:
    table = _table("method", "inputs", "parameters", "what it does")
    for method in found:
        knobs = ", ".join(_knob(parameter) for parameter in method.parameters)
        table.add_row(method.name, _inputs(method), knobs or "none", _paragraphs(method)[0])
    return table


def _parameter_table(parameters: tuple[Parameter, ...]) -> Table:
    table = _table("parameter", "default", "allowed", "meaning")
    for parameter in parameters:
        meaning = parameter.meaning + (" (per model)" if parameter.per_model else "")
        table.add_row(parameter.name, _default(parameter), parameter.expected, meaning)
    return table


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("method", "parameter"))
    return table


def _knob(parameter: Parameter) -> str:
    return parameter.name if parameter.default is None else f"{parameter.name}={_default(parameter)}"


def _default(parameter: Parameter) -> str:
    default = parameter.default
    if default is None:
        return "must be given"
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)


def _inputs(method: Method) -> str:
    """What goes in, in words: the base if there is one, and how many models besides."""
    least, most = method.min_models, method.max_models
    if most is None:
        models = f"{least} or more models"
    elif least == most:
        models = f"{least} model{'s' if least > 1 else ''}"
    else:
        models = f"{least} to {most} models"
    return {"required": f"a base and {models}", "optional": f"{models}, a base if given", "unused": models}[method.base]


def _as_json(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "description": inspect.getdoc(method.function),
        "reference": method.reference,
        "base": method.base,
        "min_models": method.min_models,
        "max_models": method.max_models,
        "random": method.random,
        "parameters": [
            {
                "name": parameter.name,
                "kind": parameter.kind,
                "default": parameter.default,
                "allowed": parameter.expected,
                "per_model": parameter.per_model,
                "meaning": parameter.meaning,
            }
            for parameter in method.parameters
        ],
    }
