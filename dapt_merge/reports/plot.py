"""The Pareto picture: domain gain against general gain, each model with its error bars.

The idea: base at the origin, up is better on the domain, right is better in general; DAPT goes up and left, and a
good merge keeps the height while it comes back to the right. Points are drawn from report items; the trials of the
search, scored on other items, stay faint in the background. What this module does not know: how a score was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapt_merge.atomic import atomic_file
from dapt_merge.errors import InputError
from dapt_merge.reports.rows import Row

# Okabe and Ito's palette: told apart by readers with any kind of colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FORMATS = ("png", "svg", "pdf", "html")


@dataclass(frozen=True)
class TrialPoint:
    """One trial of the search, on the search items: gains over the base and the method that made it."""

    domain: float
    general: float
    method: str


@dataclass(frozen=True)
class FrontPicture:
    """All that the picture shows. `domain_axis` and `general_axis` name the rows' gains to draw."""

    rows: Sequence[Row]
    trials: Sequence[TrialPoint]
    domain_axis: str
    general_axis: str
    unit: str
    title: str
    footnote: str = ""


def save_front(picture: FrontPicture, path: str | Path) -> Path:
    """Draw `picture` into `path`; the ending chooses the format (png, svg, pdf or html).

    Raises:
        InputError: the ending is none of these.
    """
    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    if kind not in FORMATS:
        raise InputError(f"cannot draw a '{path.suffix}' file", where=path, remedy=f"Use one of: {', '.join(FORMATS)}.")
    with atomic_file(path) as temporary:
        if kind == "html":
            temporary.write_text(_draw_plotly(picture).to_html(include_plotlyjs=True), encoding="utf-8")
        else:
            figure = _draw_matplotlib(picture)
            # Neither a date nor random ids: the same numbers give the same file.
            metadata = {"Date": None} if kind == "svg" else {"CreationDate": None} if kind == "pdf" else {}
            figure.savefig(temporary, format=kind, dpi=160, metadata=metadata)
    return path


def row_method(row: Row) -> str:
    """The method's name, which opens every row's label."""
    return row.label.split(" ")[0]


def _colours(picture: FrontPicture) -> dict[str, tuple[str, str]]:
    methods = [point.method for point in picture.trials]
    methods += [row_method(row) for row in picture.rows if row.role in ("knee", "front")]
    return {
        method: (_COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)])
        for index, method in enumerate(sorted(set(methods)))
    }


def _draw_matplotlib(picture: FrontPicture) -> Any:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "dapt-merge"
    mpl.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(8.0, 5.6), layout="constrained")
    axes = figure.subplots()
    colours = _colours(picture)
    axes.axhline(0, color="#d0d0d0", linewidth=0.8, zorder=0)
    axes.axvline(0, color="#d0d0d0", linewidth=0.8, zorder=0)
    _draw_chord(axes, picture)
    for method, (colour, marker) in colours.items():
        points = [point for point in picture.trials if point.method == method]
        axes.scatter(
            [point.general for point in points],
            [point.domain for point in points],
            s=16,
            color=colour,
            marker=marker,
            alpha=0.28,
            linewidths=0,
            zorder=1,
        )
    for row in sorted(picture.rows, key=lambda row: row.role == "knee"):
        _draw_row(axes, picture, row, colours)
    _label_rows(axes, picture)
    axes.set_xlabel(f"General ability: gain over the base ({picture.unit})  better →")
    axes.set_ylabel(f"Domain: gain over the base ({picture.unit})  better →")
    axes.set_title(picture.title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.16, y=0.2)
    _legend(axes, picture, colours)
    if picture.footnote:
        figure.supxlabel(picture.footnote, fontsize=7.5, color="#606060", x=0.01, ha="left")
    return figure


def _draw_chord(axes: Any, picture: FrontPicture) -> None:
    """The straight trade between the two ends: points above it give back more than they cost."""
    ends = [row for role in ("base", "dapt") for row in picture.rows if row.role == role]
    if len(ends) == 2:
        axes.plot(
            [row.gains[picture.general_axis].estimate for row in ends],
            [row.gains[picture.domain_axis].estimate for row in ends],
            linestyle=(0, (4, 4)),
            color="#b0b0b0",
            linewidth=1,
            zorder=1,
        )


def _style(row: Row, colours: dict[str, tuple[str, str]]) -> tuple[str, str, int]:
    if row.role in ("base", "dapt"):
        return "#404040", "o", 60
    colour, marker = colours[row_method(row)]
    return (colour, "*", 240) if row.role == "knee" else (colour, marker, 42)


def _draw_row(axes: Any, picture: FrontPicture, row: Row, colours: dict[str, tuple[str, str]]) -> None:
    general, domain = row.gains[picture.general_axis], row.gains[picture.domain_axis]
    colour, marker, size = _style(row, colours)
    axes.errorbar(
        general.estimate,
        domain.estimate,
        xerr=[[general.estimate - general.low], [general.high - general.estimate]],
        yerr=[[domain.estimate - domain.low], [domain.high - domain.estimate]],
        color=colour,
        elinewidth=1.1,
        capsize=2,
        alpha=0.75,
        zorder=2,
    )
    axes.scatter(
        general.estimate,
        domain.estimate,
        s=size,
        color=colour,
        marker=marker,
        edgecolors="white",
        linewidths=0.7,
        zorder=3,
    )


# Where each label stands, in points from its marker: clear of the error bars that cross there.
_LABEL_OFFSETS = {"base": (9, -14), "dapt": (-6, 34), "knee": (0, 40)}


def _label_rows(axes: Any, picture: FrontPicture) -> None:
    """Name the ends and the knee; the knee's recipe and checkpoint on two lines, joined to the star by a thin line."""
    for row in picture.rows:
        if row.role not in _LABEL_OFFSETS:
            continue
        name = f"knee: {row.label}".replace(" · ", "\n") if row.role == "knee" else row.label
        axes.annotate(
            name,
            (row.gains[picture.general_axis].estimate, row.gains[picture.domain_axis].estimate),
            xytext=_LABEL_OFFSETS[row.role],
            textcoords="offset points",
            ha="left" if row.role == "base" else "center",
            arrowprops={"arrowstyle": "-", "color": "#909090", "linewidth": 0.7} if row.role == "knee" else None,
            fontsize=9,
            fontweight="bold" if row.role == "knee" else "normal",
            zorder=4,
        )


def _legend(axes: Any, picture: FrontPicture, colours: dict[str, tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=6, label=method)
        for method, (colour, marker) in colours.items()
    ]
    if picture.trials:
        handles.append(
            Line2D(
                [],
                [],
                color="#808080",
                marker="o",
                linestyle="none",
                alpha=0.4,
                markersize=4,
                label="trials of the search (search items)",
            )
        )
    handles.append(Line2D([], [], color="#b0b0b0", linestyle=(0, (4, 4)), label="straight trade, base to DAPT"))
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="best")


def _draw_plotly(picture: FrontPicture) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    colours = _colours(picture)
    for method, (colour, _) in colours.items():
        points = [point for point in picture.trials if point.method == method]
        figure.add_scatter(
            x=[point.general for point in points],
            y=[point.domain for point in points],
            mode="markers",
            name=f"{method}, search items",
            marker={"color": colour, "size": 6, "opacity": 0.3},
        )
    for row in picture.rows:
        general, domain = row.gains[picture.general_axis], row.gains[picture.domain_axis]
        colour, _, size = _style(row, colours)
        figure.add_scatter(
            x=[general.estimate],
            y=[domain.estimate],
            error_x={"array": [general.high - general.estimate], "arrayminus": [general.estimate - general.low]},
            error_y={"array": [domain.high - domain.estimate], "arrayminus": [domain.estimate - domain.low]},
            mode="markers",
            name=f"knee: {row.label}" if row.role == "knee" else row.label,
            marker={"color": colour, "size": 8 + size / 25, "symbol": "star" if row.role == "knee" else "circle"},
            hovertemplate=f"{row.label}<br>domain {domain}<br>general {general}<extra></extra>",
        )
    figure.update_layout(
        title=picture.title,
        xaxis_title=f"General ability: gain over the base ({picture.unit})",
        yaxis_title=f"Domain: gain over the base ({picture.unit})",
        template="plotly_white",
    )
    return figure
