"""`dapt-merge inspect`: what a DAPT run changed, by layer and group, before anything is merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dapt_merge.inspection import Comparison, Inspection


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
    move in one direction). Of several checkpoints, the tables by group and layer show δ/base of each.

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
    _print(found, all_cells)
    if heat_map is not None:
        output.print(str(heat_map), soft_wrap=True, markup=False)


def _print(found: Inspection, all_cells: bool) -> None:
    from dapt_merge.cli.console import output
    from dapt_merge.reports.change_tables import findings, sign_sentence, tables_of_one, tables_of_several

    for comparison in found.comparisons:
        for line in (*_declarations(comparison, found.base), *findings(found, comparison)):
            output.print(line, soft_wrap=True, markup=False)
        output.print()
    if len(found.comparisons) == 1:
        tables = tables_of_one(found, found.comparisons[0], all_cells=all_cells, width=output.width)
    else:
        output.print(sign_sentence(found) + "\n", soft_wrap=True, markup=False)
        tables = tables_of_several(found, all_cells=all_cells, width=output.width)
    for table in tables:
        output.print(table)
        output.print()


def _declarations(comparison: Comparison, base: str) -> list[str]:
    """What differs beside the weights, in sentences."""
    found = comparison.compatibility
    lines = [f"{comparison.label} against {base}"]
    told = [found.vocabulary or "no difference is known"] if found.tokens is None else found.tokens.sentences()
    lines += [f"vocabulary: {sentence}" for sentence in told]
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
