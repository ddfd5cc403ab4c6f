"""`dapt-merge explain`: what a recipe would do and cost, from the headers alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from dapt_merge.merging.cost import Cost
    from dapt_merge.merging.explanation import ExplainedTensors
    from dapt_merge.merging.plan import MergePlan

# A course of values over the layers with more turns than this is told by its range alone.
_MOST_TURNS = 2


def explain(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override keys of it, such as t=0.3.")
    ] = None,
    all_tensors: Annotated[bool, typer.Option("--all", help="A line for each tensor.")] = False,
    throughput: Annotated[
        float | None,
        typer.Option(
            min=1e-9,
            help="GB read and written in a second, for the time.",
            show_default="that of the last such merges, or of copying",
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Merge made-up tensors for a second to tell the time by.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Tensors merged at once.", show_default="the CPUs there are")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Say what a recipe would do to every tensor and the tokenizer, what has no effect, and what it would cost.

    Reads no weights.

    Of several recipes in a file, all are explained, in the order in which they would be merged.

    dapt-merge explain recipes/ties.yaml density=0.3
    """
    from dapt_merge.cli.console import console, output, print_json
    from dapt_merge.merging.cost import estimate_cost, total_cost
    from dapt_merge.merging.explanation import explain as explain_plan
    from dapt_merge.merging.explanation import plan_chain
    from dapt_merge.recipe import load_recipes

    chain = load_recipes(recipe, overrides or [])
    plans = plan_chain(chain)
    explained = [(step.name, plan, explain_plan(plan)) for step, plan in zip(chain, plans, strict=True)]
    given = None if throughput is None else throughput * 1e9
    costs = [estimate_cost(plan, threads=threads, bytes_per_second=given, trial=measure) for plan in plans]
    if json:
        print_json(_as_json(explained, costs))
        return
    for name, plan, lines in explained:
        if len(chain) > 1:
            output.print("the result:" if plan is plans[-1] else f"{name}, used further down:", markup=False)
        _print_recipe(plan, lines, all_tensors)
        for warning in plan.warnings:
            console.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
    for line in _cost_lines(total_cost(costs)):
        output.print(line, soft_wrap=True, markup=False)


def _as_json(explained: list[tuple[str | None, MergePlan, list[ExplainedTensors]]], costs: list[Cost]) -> Any:
    """One recipe is an object; several are a list of such objects under "recipes", with the cost of all of them."""
    from dapt_merge.merging.cost import total_cost
    from dapt_merge.merging.explanation import explain_tokenizer

    found = [
        {
            "name": name,
            "method": plan.recipe.merge_method,
            "reference": plan.recipe.method.reference,
            "inputs": list(plan.checkpoints),
            "tensors": len(plan.jobs),
            "elements": sum(job.elements for job in plan.jobs),
            "warnings": list(plan.warnings),
            "tokenizer": asdict(explain_tokenizer(plan)),
            "lines": [line.to_dict() for line in lines],
            "cost": cost.to_dict(),
        }
        for (name, plan, lines), cost in zip(explained, costs, strict=True)
    ]
    return found[0] if len(found) == 1 else {"recipes": found, "cost": total_cost(costs).to_dict()}


def _print_recipe(plan: MergePlan, lines: list[ExplainedTensors], all_tensors: bool) -> None:
    from dapt_merge.cli.console import output
    from dapt_merge.merging.explanation import explain_tokenizer, layer_runs

    common = _common(lines)
    for line in _heading(plan, common):
        output.print(line, soft_wrap=True, markup=False)
    for line in explain_tokenizer(plan).sentences():
        output.print(line, soft_wrap=True, markup=False)
    if not all_tensors:
        output.print(_table(layer_runs(lines), list(common)))
        return
    own = {name: line for line in lines for name in line.names}
    for job in plan.jobs:
        output.print(f"{job.name}: {_settings([own[job.name]], ())}", soft_wrap=True, markup=False)


def _common(lines: list[ExplainedTensors]) -> dict[str, object]:
    """The settings that all of several lines share: said once above the table, they leave it readable."""
    first, *rest = lines
    shared = {name: value for name, value in first.settings.items() if all(o.settings.get(name) == value for o in rest)}
    return shared if rest else {}


def _heading(plan: MergePlan, common: dict[str, object]) -> list[str]:
    """What goes in: the method, and the checkpoints in the order of the values of a per-model parameter."""
    method = plan.recipe.method
    lines = [f"{method.name} ({method.reference})"]
    inputs = {(job.base, job.models, job.target): None for job in plan.jobs}
    for base, models, target in inputs:
        roles = [f"base {base}"] if base is not None else []
        roles += [f"models {', '.join(models)}"] + ([f"added to {target}"] if target is not None else [])
        lines.append(", ".join(roles))
    return [*lines, f"throughout: {_in_words(common)}"] if common else lines


def _table(runs: list[list[ExplainedTensors]], common: Collection[str]) -> Table:
    from rich import box
    from rich.table import Table

    from dapt_merge.merging.explanation import describe

    everything = [name for run in runs for line in run for name in line.names]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("tensors", justify="right", no_wrap=True)
    table.add_column("which", overflow="fold")
    table.add_column("settings", overflow="fold")
    for run in runs:
        names = [name for line in run for name in line.names]
        table.add_row(f"{len(names):,}", _escaped(describe(names, everything)), _escaped(_settings(run, common)))
    return table


def _settings(run: list[ExplainedTensors], common: Collection[str]) -> str:
    """The values in words, without those that are common; then the output's dtype, and of what it is a copy."""
    from dapt_merge.merging.explanation import layer_by_layer

    first = run[0]
    own = {name: [line.settings[name] for line in layer_by_layer(run)] for name in first.settings if name not in common}
    values = ", ".join(f"{name} {_course(several)}" for name, several in own.items())
    layered = ", layer by layer" if len(run) > 1 else ""
    copied = "" if first.copied_from is None else f"; a copy of {first.copied_from}"
    return f"{values + layered + ' ' if values else ''}→ {first.out_dtype}{copied}"


def _course(values: Sequence[object]) -> str:
    """Write one value, or those of several layers: the first, every turn, the last. Models are separated by slashes."""
    first = values[0]
    if isinstance(first, tuple):
        between = ", " if any(isinstance(single, str) for single in first) else "/"  # paths have slashes themselves
        return between.join(_course([v[model] for v in values if isinstance(v, tuple)]) for model in range(len(first)))
    if all(value == first for value in values):
        return _value(first)
    numbers = [number for number, _ in groupby(value for value in values if isinstance(value, int | float))]
    turns = [b for a, b, c in zip(numbers, numbers[1:], numbers[2:], strict=False) if (b - a) * (c - b) < 0]
    if len(turns) > _MOST_TURNS:
        return f"{_value(min(numbers))} to {_value(max(numbers))}"
    return " … ".join(_value(number) for number in (numbers[0], *turns, numbers[-1]))


def _in_words(settings: Mapping[str, object]) -> str:
    """Write name and value; those of several models are separated by slashes, in the order of the heading."""
    return ", ".join(f"{name} {_value(value)}" for name, value in settings.items())


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return _course([value])
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cost_lines(cost: Cost) -> list[str]:
    in_threads = f"{cost.threads} thread{'s' if cost.threads > 1 else ''}"
    lines = [
        f"reads {_bytes(cost.bytes_read)}, writes {_bytes(cost.bytes_written)} (as much free disk is needed)",
        f"memory: about {_bytes(cost.memory_bytes)} in {in_threads}, beside the page cache",
    ]
    if cost.bytes_per_second is None or cost.seconds is None:
        return [*lines, "time: not known before such a merge has run here; --measure tries it, --throughput states it"]
    source = {
        "given": "as given",
        "last merge": "as the last such merges here",
        "copying": f"by how fast bytes are copied here now, in {in_threads}, and by what the method computes; "
        "--measure tries it itself",
        "trial": f"as a few made-up tensors took here, in {in_threads}",
    }[str(cost.source)]
    bound = "at least " if cost.grows and cost.source == "trial" else "about "
    return [*lines, f"time: {bound}{_duration(cost.seconds)} at {_bytes(cost.bytes_per_second)}/s ({source})"]


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
