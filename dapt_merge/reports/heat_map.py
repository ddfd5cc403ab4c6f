"""Where a DAPT run changed the model: layers down, groups across, one panel a measure.

The idea: a merge can weight layers and groups, so the picture has the axes of a recipe. Of several checkpoints the size
of the change is drawn for each, on one scale, from left to right; the other measures are the last one's. A measure that
is the same everywhere is said in the heading. What this module does not know: how anything was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dapt_merge.atomic import atomic_file
from dapt_merge.errors import InputError
from dapt_merge.inspection import Comparison, Inspection, Summary

FORMATS = ("png", "svg", "pdf")
_MOST_ANNOTATED_LAYERS = 48
_MOST_CHECKPOINTS = 8
# Values further apart than this get a logarithmic scale, on which the many small ones can still be told apart.
_WIDE_RANGE = 5.0
_EVEN = 0.5  # percentage points: a measure that varies less has no pattern to show


@dataclass(frozen=True)
class Panel:
    """One measure: its heading, and the number drawn of a cell (None leaves the cell empty), as a percentage.

    `of_each` is for a measure that is drawn for every checkpoint, `of_all` for one that belongs to all together.
    """

    title: str
    value: Callable[[Summary], float | None]
    of_each: bool = False
    of_all: bool = False


def save_heat_map(inspection: Inspection, path: str | Path, *, overwrite: bool = True) -> Path:
    """Draw `inspection` into `path`; the ending chooses the format (png, svg or pdf).

    Raises:
        InputError: the ending is none of these; the file exists and `overwrite` is false.
    """
    path = Path(path)
    kind = check_format(path)
    with atomic_file(path, overwrite=overwrite) as temporary:
        metadata = {"Date": None} if kind == "svg" else {"CreationDate": None} if kind == "pdf" else {}
        _draw(inspection).savefig(temporary, format=kind, dpi=160, metadata=metadata)
    return path


def check_format(path: Path) -> str:
    """Return the format that a file name asks for; call it before any long work.

    Raises:
        InputError: it asks for none that can be drawn.
    """
    kind = path.suffix.lstrip(".").lower()
    if kind not in FORMATS:
        raise InputError(f"cannot draw a '{path.suffix}' file", where=path, remedy=f"Use one of: {', '.join(FORMATS)}.")
    return kind


def panels(inspection: Inspection) -> list[Panel]:
    """Return the measures worth a panel: those that exist in this inspection."""
    middle = min(range(len(inspection.weights)), key=lambda index: abs(inspection.weights[index] - 0.5))
    weight = inspection.weights[middle]
    candidates = [
        Panel("size of the change\n‖δ‖ / ‖θ₀‖", lambda cell: cell.difference.relative_norm, of_each=True),
        Panel("elements changed", lambda cell: cell.difference.changed_share),
        Panel(f"lost to bfloat16\nat weight {weight:g}", lambda cell: cell.difference.rounding[middle].lost_share),
        Panel("effective rank of δ\nper smaller side", lambda cell: cell.rank_share),
        Panel(
            "signs that agree\namong all δ", lambda cell: None if cell.signs is None else cell.signs.share, of_all=True
        ),
    ]
    return [panel for panel in candidates if np.isfinite(_grids(inspection, panel)).any()]


def _draw(inspection: Inspection) -> Any:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "dapt-merge"
    chosen, evens = _shown(inspection)
    layers, kinds = len(inspection.places), len(inspection.kinds)
    columns = sum(len(values) for _, values, _ in chosen)
    figure = Figure(
        figsize=(max(2.3, 0.5 * kinds + 0.5) * columns + 0.9 * len(chosen) + 0.5, max(2.4, 0.24 * layers + 1.3) + 0.5),
        layout="constrained",
        facecolor="white",
    )
    grid, column = figure.subplots(1, columns, squeeze=False, sharey=True)[0], 0
    for panel, values, names in chosen:
        scale = _scale(values)
        mine = grid[column : column + len(values)]
        for axes, of_one, name in zip(mine, values, names, strict=True):
            image = _draw_panel(axes, inspection, of_one, scale)
            axes.set_title("\n".join(part for part in (panel.title, name) if part), fontsize=9)
        bar = figure.colorbar(image, ax=list(mine), shrink=0.8, pad=0.02, format=lambda v, _: f"{v:.3g}%")
        bar.ax.tick_params(labelsize=7, which="both")
        bar.outline.set_visible(False)
        column += len(values)
    base = Path(inspection.base).name or inspection.base
    figure.suptitle("; ".join([f"What changed from {base}, in %", *evens]), x=0.01, ha="left", fontsize=11)
    return figure


def _shown(inspection: Inspection) -> tuple[list[tuple[Panel, Any, list[str]]], list[str]]:
    """Return (panel, a grid for each checkpoint that it is drawn for, their names), and sentences on what is even."""
    names = [_shortened(comparison) for comparison in inspection.comparisons]
    last = len(names) - 1
    every = sorted({round(k * last / (_MOST_CHECKPOINTS - 1)) for k in range(_MOST_CHECKPOINTS)})
    chosen, evens = [], []
    for panel in panels(inspection):
        rows = every if panel.of_each else [last]
        values = _grids(inspection, panel)[rows]
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        if high - low < _EVEN and not panel.of_each:
            evens.append(f"{' '.join(panel.title.split())}: {_percent(high)}% everywhere")
        else:
            chosen.append((panel, values, [""] if panel.of_all else [names[row] for row in rows]))
    return chosen, evens


def _scale(values: Any) -> Any:
    """Return the colours' scale: from nothing to the largest value, or by factors where most would look alike."""
    from matplotlib.colors import LogNorm, Normalize

    top = float(np.nanmax(values)) or 1.0
    positive = values[np.isfinite(values) & (values > 0)]
    if len(positive) and top > _WIDE_RANGE * float(np.median(positive)):
        return LogNorm(vmin=min(float(np.quantile(positive, 0.02)), top / _WIDE_RANGE), vmax=top, clip=True)
    return Normalize(vmin=0, vmax=top)


def _draw_panel(axes: Any, inspection: Inspection, values: Any, scale: Any) -> Any:
    layers, kinds = [inspection.place_name(place) for place in inspection.places], inspection.kinds
    image = axes.imshow(values, aspect="auto", cmap="viridis", norm=scale, interpolation="none")
    axes.set_facecolor("#efefef")  # a group that a layer does not have
    axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", fontsize=8, rotation_mode="anchor")
    step = 1 if len(layers) <= _MOST_ANNOTATED_LAYERS else 4
    ticks = range(0, len(layers), step)
    axes.set_yticks(
        list(ticks), [f"layer {layers[tick]}" if layers[tick] == "0" else layers[tick] for tick in ticks], fontsize=7
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(layers) > _MOST_ANNOTATED_LAYERS:
        return image
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        value = values[row, column]
        # viridis is dark below and light above about its middle.
        colour = "white" if scale(value) < 0.6 else "black"
        axes.text(column, row, _percent(value), ha="center", va="center", fontsize=6.5, color=colour)
    return image


def _grids(inspection: Inspection, panel: Panel) -> Any:
    """Return percentages, (checkpoints × layers × groups), NaN where there is nothing."""
    return np.array(
        [
            [
                [_value(inspection.cell(c, place, kind), panel) for kind in inspection.kinds]
                for place in inspection.places
            ]
            for c in inspection.comparisons
        ]
    )


def _value(cell: Summary | None, panel: Panel) -> float:
    value = None if cell is None else panel.value(cell)
    return math.nan if value is None else 100 * value


def _percent(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 or value == 0 else f"{value:#.2g}"


def _shortened(comparison: Comparison) -> str:
    name = Path(comparison.label).name or comparison.label
    return name if len(name) <= 32 else f"…{name[-31:]}"
