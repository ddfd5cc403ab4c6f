"""Where a DAPT run changed the model: layers down, groups across, one panel a measure, one row of panels a checkpoint.

The idea: a merge can weight layers and groups, so the picture has the axes of a recipe. What this module does not know:
how anything was measured.
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


@dataclass(frozen=True)
class Panel:
    """One measure: its heading, and the number drawn of a cell (None leaves the cell empty), as a percentage."""

    title: str
    value: Callable[[Summary], float | None]


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
        Panel("size of the change\n‖δ‖ / ‖θ₀‖", lambda cell: cell.difference.relative_norm),
        Panel("elements changed", lambda cell: cell.difference.changed_share),
        Panel(f"lost to bfloat16\nat weight {weight:g}", lambda cell: cell.difference.rounding[middle].lost_share),
        Panel("effective rank of δ\nper smaller side", lambda cell: cell.rank_share),
        Panel("signs that agree\namong all δ", lambda cell: None if cell.signs is None else cell.signs.share),
    ]
    return [panel for panel in candidates if np.isfinite(_grids(inspection, panel)).any()]


def _draw(inspection: Inspection) -> Any:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "dapt-merge"
    shown, comparisons = panels(inspection), inspection.comparisons
    layers, kinds = len(inspection.places), len(inspection.kinds)
    height = max(2.4, 0.24 * layers + 1.3)
    width = max(2.6, 0.62 * kinds + 0.9)
    figure = Figure(
        figsize=(width * len(shown) + 0.6, height * len(comparisons) + 0.5), layout="constrained", facecolor="white"
    )
    grid = figure.subplots(len(comparisons), len(shown), squeeze=False, sharey=True)
    for column, panel in enumerate(shown):
        values = _grids(inspection, panel)
        top = float(np.nanmax(values)) or 1.0
        for row, comparison in enumerate(comparisons):
            image = _draw_panel(grid[row][column], inspection, values[row], top)
            if row == 0:
                grid[row][column].set_title(panel.title, fontsize=9)
            if column == 0:
                grid[row][column].set_ylabel(_shortened(comparison), fontsize=9)
        bar = figure.colorbar(image, ax=list(grid[:, column]), shrink=0.8, pad=0.02, format=lambda v, _: f"{v:.3g}%")
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
    base = Path(inspection.base).name or inspection.base
    figure.suptitle(f"What changed from {base}, in %", x=0.01, ha="left", fontsize=11)
    return figure


def _draw_panel(axes: Any, inspection: Inspection, values: Any, top: float) -> Any:
    layers, kinds = [inspection.place_name(place) for place in inspection.places], inspection.kinds
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="none")
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
        colour = "white" if value < 0.6 * top else "black"
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
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.095 or value == 0 else f"{value:.2g}"


def _shortened(comparison: Comparison) -> str:
    name = Path(comparison.label).name or comparison.label
    return name if len(name) <= 32 else f"…{name[-31:]}"
