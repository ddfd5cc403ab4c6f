"""The report's table: one model a line, one gain with its interval a column; for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dapt_merge.reports.rows import Axis, Gain, Row

if TYPE_CHECKING:
    from rich.table import Table

_ROLE_MARK = {"base": "base", "dapt": "DAPT", "knee": "★ knee", "front": "front", "trial": ""}


def heading(axis: Axis) -> str:
    """Column heading: what is measured and in which unit."""
    return f"{axis.name} ({axis.unit})"


def cells(rows: Sequence[Row], axes: Sequence[Axis]) -> list[list[str]]:
    """The table as text, the heading line first.

    The base's line shows scores (there is nothing to gain over itself), every other line gains over the base.
    """
    lines = [["", "model", *(heading(axis) for axis in axes)]]
    for row in rows:
        values = [_score(row, axis) if row.role == "base" else _gain(row.gains[axis.name], axis) for axis in axes]
        lines.append([_ROLE_MARK[row.role], row.label, *values])
    return lines


def to_markdown(rows: Sequence[Row], axes: Sequence[Axis]) -> str:
    """The table as GitHub-flavoured Markdown."""
    first, *rest = cells(rows, axes)
    out = ["| " + " | ".join(first) + " |", "|" + "---|" * len(first)]
    out += ["| " + " | ".join(line) + " |" for line in rest]
    return "\n".join(out) + "\n"


def to_rich(rows: Sequence[Row], axes: Sequence[Axis], *, title: str) -> Table:
    """The table for a terminal; columns fold rather than vanish on a narrow one."""
    from rich.table import Table

    first, *rest = cells(rows, axes)
    table = Table(title=title, title_justify="left", caption_justify="left", caption=CAPTION)
    for index, name in enumerate(first):
        table.add_column(name, overflow="fold", justify="left" if index < 2 else "right")
    for row, line in zip(rows, rest, strict=True):
        table.add_row(*line, style="bold" if row.role == "knee" else None)
    return table


CAPTION = "base: its score; others: gain over the base, + is better, [95% paired bootstrap]; ° = within noise"


def _score(row: Row, axis: Axis) -> str:
    score = row.scores[axis.name]
    return f"{score:.3f}" if axis.scale == 1 else f"{axis.scale * score:.1f}%"


def _gain(gain: Gain, axis: Axis) -> str:
    places = 3 if axis.scale == 1 else 1
    mark = "" if gain.beyond_noise else " °"
    return f"{gain.estimate:+.{places}f} [{gain.low:+.{places}f}, {gain.high:+.{places}f}]{mark}"
