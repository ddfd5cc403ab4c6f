"""The report's table: one model a line, one gain with its interval a column; for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dapt_merge.reports.rows import Axis, Gain, Row

if TYPE_CHECKING:
    from rich.table import Table


def heading(axis: Axis) -> str:
    """Column heading: what is measured and in which unit."""
    return f"{axis.name} ({axis.unit})"


def cells(rows: Sequence[Row], axes: Sequence[Axis]) -> list[list[str]]:
    """The table as text, the heading line first.

    The base's line shows scores (there is nothing to gain over itself), every other line gains over the base.
    """
    lines = [["model", *(heading(axis) for axis in axes)]]
    for row in rows:
        values = [_score(row, axis) if row.role == "base" else _gain(row.gains[axis.name], axis) for axis in axes]
        lines.append([f"★ {row.label}" if row.role == "knee" else row.label, *values])
    return lines


def to_markdown(rows: Sequence[Row], axes: Sequence[Axis]) -> str:
    """The table as GitHub-flavoured Markdown."""
    first, *rest = cells(rows, axes)
    out = ["| " + " | ".join(first) + " |", "|" + "---|" * len(first)]
    out += ["| " + " | ".join(line) + " |" for line in rest]
    return "\n".join(out) + "\n"


def to_rich(rows: Sequence[Row], axes: Sequence[Axis], *, title: str) -> list[Table]:
    """The table for a terminal, as one table a unit, so that each fits 80 columns; on narrower ones cells fold."""
    from rich.table import Table

    tables = []
    for unit in dict.fromkeys(axis.unit for axis in axes):
        shown = [axis for axis in axes if axis.unit == unit]
        table = Table(title=f"{title}, in {unit}", title_justify="left", expand=False)
        first, *rest = cells(rows, shown)
        for index, name in enumerate(first):
            heading_text = shown[index - 1].name if index else name
            table.add_column(heading_text, overflow="fold", justify="right" if index else "left")
        for row, line in zip(rows, rest, strict=True):
            table.add_row(*(_folded(cell) for cell in line), style="bold" if row.role == "knee" else None)
        tables.append(table)
    tables[-1].caption, tables[-1].caption_justify = CAPTION, "left"
    return tables


def _folded(cell: str) -> str:
    """The interval under its estimate, the checkpoint under its recipe: half the width."""
    return cell.replace(" · ", "\n").replace(" [", "\n[", 1)


CAPTION = (
    "★ the knee; base: its score; others: gain over the base, + is better, [95% paired bootstrap]; ° = within noise"
)


def _score(row: Row, axis: Axis) -> str:
    score = row.scores[axis.name]
    return f"{score:.3f}" if axis.scale == 1 else f"{axis.scale * score:.1f}%"


def _gain(gain: Gain, axis: Axis) -> str:
    places = 3 if axis.scale == 1 else 1
    mark = "" if gain.beyond_noise else " °"
    return f"{gain.estimate:+.{places}f} [{gain.low:+.{places}f}, {gain.high:+.{places}f}]{mark}"
