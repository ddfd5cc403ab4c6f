"""`dapt-merge inspect`: what a DAPT run changed, by layer and group, before anything is merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from dapt_merge.checkpoints import TensorGroup
    from dapt_merge.inspection import Comparison, Inspection, Place, Summary


def inspect(
    base: Annotated[str, typer.Argument(help="The base: a folder, a file or a hub id.", show_default=False)],
    dapt: Annotated[list[str], typer.Argument(metavar="DAPT...", help="What was trained from it.", show_default=False)],
    all_cells: Annotated[bool, typer.Option("--all", help="A line for each group of each layer.")] = False,
    heat_map: Annotated[
        Path | None, typer.Option(help="Draw layers × groups into this file (.png, .svg, .pdf).", show_default=False)
    ] = None,
    rank: Annotated[bool, typer.Option("--rank/--no-rank", help="Effective ranks take most of the time.")] = True,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Tensors measured at once.", show_default="the CPUs there are")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the heat map if it exists.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print every measure, of every tensor too, as JSON.")] = False,
) -> None:
    """Measure the task vector δ = DAPT − BASE by layer and group.

    The columns are δ/base (norm of δ per norm of the base), cos (of DAPT to BASE), changed (share of the elements),
    rank (mean effective rank of δ per smaller side of the matrix; it is the exponential of the entropy of the
    normalised singular values), lost (share of the update 0.5·δ that rounding to bfloat16 undoes), slerp (tensors so
    near that it would merge them linearly) and signs (of the elements that several δ move, the share that all of them
    move in one direction).

    dapt-merge inspect models/base runs/dapt/checkpoint-1440 --heat-map change.png
    """
    from dapt_merge.atomic import refuse_existing
    from dapt_merge.checkpoints import open_checkpoint
    from dapt_merge.cli.console import output, print_json, progress
    from dapt_merge.inspection import inspect_checkpoints
    from dapt_merge.reports.heat_map import check_format, save_heat_map

    if heat_map is not None:
        check_format(heat_map)
        refuse_existing(heat_map, overwrite)
    opened = [open_checkpoint(reference) for reference in (base, *dapt)]
    with progress("measuring", "elements") as on_progress:
        found = inspect_checkpoints(opened[0], opened[1:], rank=rank, threads=threads, on_progress=on_progress)
    if heat_map is not None:
        save_heat_map(found, heat_map, overwrite=overwrite)
    if json:
        print_json(found.to_dict() | {"heat_map": heat_map})
        return
    for comparison in found.comparisons:
        for line in _declarations(comparison, found.base):
            output.print(line, soft_wrap=True, markup=False)
        for table in (*_tables(found, comparison, all_cells), _rounding_table(found, comparison)):
            output.print()
            output.print(table)
        output.print()
    if heat_map is not None:
        output.print(str(heat_map), soft_wrap=True, markup=False)


def _declarations(comparison: Comparison, base: str) -> list[str]:
    """What differs beside the weights, in sentences."""
    found = comparison.compatibility
    lines = [f"{comparison.label} against {base}"]
    lines.append(f"vocabulary: {found.vocabulary or 'no difference'}")
    lines += [f"config.json: {d.key} is {d.base} in the base and {d.model} here" for d in found.config]
    if not found.config:
        lines.append("config.json: no setting that both state differs")
    if found.stated_once:
        lines.append(
            f"config.json: {len(found.stated_once)} settings are stated by one only: {_some(found.stated_once)}"
        )
    for names, what in (
        (found.only_in_base, "only in the base"),
        (found.only_in_model, "not in the base"),
        (found.other_shape, "of another shape than in the base"),
    ):
        if names:
            lines.append(f"tensors {what}: {len(names)}: {_some(names)}")
    if found.merge_refused:
        lines.append(f"a merge would be refused: {found.merge_refused}")
    return lines + [f"note: {note}" for note in found.notes if note != found.vocabulary]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _tables(found: Inspection, comparison: Comparison, all_cells: bool) -> list[Table]:
    groups = [(kind, found.summary(comparison, lambda group, kind=kind: group.kind == kind)) for kind in found.kinds]  # type: ignore[misc]
    by_group = _table("group", found, [*groups, ("all", found.summary(comparison))])
    if all_cells:
        rows = [
            (f"{'–' if place.layer is None else found.place_name(place)} {kind}", cell)
            for place in found.places
            for kind in found.kinds
            if (cell := found.cell(comparison, place, kind)) is not None
        ]
    else:
        rows = [(found.place_name(place), found.summary(comparison, _within(place))) for place in found.places]
    return [by_group, _table("layer", found, rows)]


def _within(place: Place) -> Callable[[TensorGroup], bool]:
    return lambda group: type(place).of(group) == place


def _table(heading: str, found: Inspection, rows: Sequence[tuple[str, Summary]]) -> Table:
    """One line a part of the model; a column only where there is something to say in it."""
    from rich import box
    from rich.table import Table

    ranked = any(summary.rank_share is not None for _, summary in rows)
    signed = any(summary.signs is not None for _, summary in rows)
    middle = _middle(found)
    headings = [
        "δ/base",
        "cos",
        "changed",
        *(["rank"] if ranked else []),
        "lost",
        "slerp",
        *(["signs"] if signed else []),
    ]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column(heading, no_wrap=True)
    for name in headings:
        table.add_column(name, justify="right", overflow="fold")
    for name, summary in rows:
        found_here = summary.difference
        cells = [_share(found_here.relative_norm), _cosine(found_here.cosine), _share(found_here.changed_share)]
        cells += [_share(summary.rank_share)] if ranked else []
        cells += [_share(found_here.rounding[middle].lost_share), f"{summary.slerp_fallbacks}/{summary.tensors}"]
        cells += [_share(None if summary.signs is None else summary.signs.share)] if signed else []
        table.add_row(name, *cells, style="bold" if name == "all" else None)
    return table


def _rounding_table(found: Inspection, comparison: Comparison) -> Table:
    """What a bfloat16 output keeps of the update, at each weight."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        title="The update w·δ, rounded to bfloat16",
        title_justify="left",
    )
    for name in ("weight", "elements lost", "relative error"):
        table.add_column(name, justify="right", overflow="fold")
    losses = found.summary(comparison).difference.rounding
    for weight, loss in zip(found.weights, losses, strict=True):
        error = "–" if loss.relative_error is None else f"{loss.relative_error:.2f}"
        table.add_row(f"{weight:g}", _share(loss.lost_share), error)
    return table


def _middle(found: Inspection) -> int:
    return min(range(len(found.weights)), key=lambda index: abs(found.weights[index] - 0.5))


def _share(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if value >= 0.001 or value == 0 else f"{100 * value:.1g}%"


def _cosine(value: float | None) -> str:
    return "–" if value is None else f"{value:.5f}"
