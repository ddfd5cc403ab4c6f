"""What DAPT runs changed, as sentences and tables for a terminal: first what to take away, then where it comes from.

The idea: one checkpoint gets a line for each part of the model with every measure; several get a column each, so that a
run is read from left to right. Tables keep to the width they are given. What this module does not know: how anything
was measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from dapt_merge.checkpoints import TensorGroup
from dapt_merge.inspection import Comparison, Inspection, Place, Summary

_BAR_CELLS = 12
# A table with bars is this much wider than one without.
_WIDTH_WITH_BARS = 76
_EIGHTHS = " ▏▎▍▌▋▊▉█"

Keep = Callable[[TensorGroup], bool]


def findings(found: Inspection, comparison: Comparison) -> list[str]:
    """Say what to take away: how far and where the model moved, what bfloat16 will not hold, whether slerp is slerp."""
    whole = found.summary(comparison)
    lines = [f"moved by {percent(whole.difference.relative_norm)} of the base's norm"]
    by_group = [(kind, found.summary(comparison, _of_kind(kind))) for kind in found.kinds]
    by_layer = [
        (f"layer {found.place_name(place)}", found.summary(comparison, _within(place)))
        for place in found.places
        if place.layer is not None
    ]
    lines[0] += "".join(_extremes(rows) for rows in (by_group, by_layer))
    middle = _middle(found)
    loss = whole.difference.rounding[middle]
    if loss.lost_share:
        lines.append(
            f"in bfloat16 at weight {found.weights[middle]:g}, {percent(loss.lost_share)} of the moved elements fall"
            f" back to the base; relative error of the update {loss.relative_error:.2f}"
        )
    if whole.slerp_fallbacks:
        lines.append(
            f"slerp would merge {whole.slerp_fallbacks:,} of {whole.tensors:,} tensors linearly: they are so near"
        )
    return lines


def sign_sentence(found: Inspection) -> str:
    """Say how far several task vectors pull the same way, and how far unrelated ones would."""
    share = found.summary(found.comparisons[0]).signs
    count = len(found.comparisons)
    told = percent(None if share is None else share.share)
    return (
        f"signs: where at least two of the {count} checkpoints move an element, all that move it agree in {told} of"
        f" cases ({percent(2.0 ** (1 - count))} if they were unrelated)"
    )


def tables_of_one(found: Inspection, comparison: Comparison, *, all_cells: bool, width: int) -> list[Table]:
    """Return the tables of one checkpoint: by group, by layer (or by group of each layer), and bfloat16 by weight."""
    groups = [(kind, found.summary(comparison, _of_kind(kind))) for kind in found.kinds]
    layers = [
        (name, cell) for name, keep in _parts(found, all_cells) if (cell := found.summary(comparison, keep)).tensors
    ]
    return [
        _measures("group", found, [*groups, ("all", found.summary(comparison))], width),
        _measures("layer", found, layers, width),
        _rounding_by_group(found, comparison),
    ]


def tables_of_several(found: Inspection, *, all_cells: bool, width: int) -> list[Table]:
    """Return the tables of several checkpoints beside each other: as wholes, by group, by layer, bfloat16 by weight."""
    names = short_names([comparison.label for comparison in found.comparisons])
    wholes = [found.summary(comparison) for comparison in found.comparisons]
    rows = list(zip(names, wholes, strict=True))
    groups: list[tuple[str, Keep]] = [(kind, _of_kind(kind)) for kind in found.kinds]
    rounding = _new_table("weight", names, "elements lost to bfloat16, by checkpoint")
    for position, weight in enumerate(found.weights):
        losses = [whole.difference.rounding[position].lost_share for whole in wholes]
        rounding.add_row(f"{weight:g}", *map(percent, losses))
    return [
        _measures("checkpoint", found, rows, width, signs=False),
        _beside("group", found, names, [*groups, ("all", lambda group: True)]),
        _beside("layer", found, names, _parts(found, all_cells)),
        rounding,
    ]


def short_names(labels: Sequence[str]) -> list[str]:
    """Return the ends of paths, as short as they stay different.

    Example:
        >>> short_names(["runs/a/checkpoint-8", "runs/a/checkpoint-30"]), short_names(["a/final", "b/final"])
        (['checkpoint-8', 'checkpoint-30'], ['a/final', 'b/final'])
    """
    names = [Path(label).name or label for label in labels]
    if len(set(names)) == len(names):
        return names
    shared = os.path.commonpath(labels) if all(map(os.path.isabs, labels)) else ""
    return [os.path.relpath(label, shared) if shared else label for label in labels]


def percent(value: float | None) -> str:
    """Write a share in per cent with three figures, or a dash for None.

    Example:
        >>> percent(0.00454), percent(0.4), percent(1.0), percent(None)
        ('0.454%', '40.0%', '100%', '–')
    """
    if value is None:
        return "–"
    return f"{100 * value:#.3g}%".replace(".%", "%") if value else "0%"


def _extremes(rows: Sequence[tuple[str, Summary]]) -> str:
    norms = [(s.difference.relative_norm, name) for name, s in rows if s.difference.relative_norm is not None]
    if len(norms) < 2:
        return ""
    (low, least), (high, most) = min(norms), max(norms)
    return f"; {most} most ({percent(high)}), {least} least ({percent(low)})"


def _parts(found: Inspection, all_cells: bool) -> list[tuple[str, Keep]]:
    """Return the rows by layer: the name of each, and which tensors are in it."""
    if not all_cells:
        return [(found.place_name(place), _within(place)) for place in found.places]
    return [
        (f"{'–' if place.layer is None else found.place_name(place)} {kind}", _within(place, kind))
        for place in found.places
        for kind in found.kinds
    ]


def _within(place: Place, kind: str | None = None) -> Keep:
    return lambda group: Place.of(group) == place and kind in (None, group.kind)


def _of_kind(kind: str) -> Keep:
    return lambda group: group.kind == kind


def _measures(
    heading: str, found: Inspection, rows: Sequence[tuple[str, Summary]], width: int, *, signs: bool = True
) -> Table:
    """One line a part of the model; a column only where there is something to say in it."""
    ranked = any(summary.rank_share is not None for _, summary in rows)
    signed = signs and any(summary.signs is not None for _, summary in rows)
    headings = [
        "δ/base",
        "cos",
        "changed",
        *(["rank"] if ranked else []),
        "lost",
        "slerp",
        *(["signs"] if signed else []),
    ]
    table = _new_table(heading, headings)
    barred = width >= _WIDTH_WITH_BARS
    if barred:
        table.add_column("", no_wrap=True)
    largest = max((s.difference.relative_norm or 0.0 for _, s in rows), default=0.0)
    for name, summary in rows:
        own = summary.difference
        cells = [percent(own.relative_norm), _cosine(own.cosine), percent(own.changed_share)]
        cells += [percent(summary.rank_share)] if ranked else []
        cells += [percent(own.rounding[_middle(found)].lost_share), f"{summary.slerp_fallbacks}/{summary.tensors}"]
        cells += [percent(None if summary.signs is None else summary.signs.share)] if signed else []
        cells += [_bar(own.relative_norm, largest)] if barred else []
        table.add_row(name, *cells, style="bold" if name == "all" else None)
    return table


def _beside(heading: str, found: Inspection, names: Sequence[str], parts: Sequence[tuple[str, Keep]]) -> Table:
    """δ/base of every checkpoint, and the agreement of their signs."""
    table = _new_table(heading, [*names, "signs"], "δ/base, by checkpoint")
    for name, keep in parts:
        cells = [found.summary(comparison, keep) for comparison in found.comparisons]
        if not any(cell.tensors for cell in cells):
            continue
        signs = next((cell.signs.share for cell in cells if cell.signs is not None), None)
        norms = [percent(cell.difference.relative_norm) for cell in cells]
        table.add_row(name, *norms, percent(signs), style="bold" if name == "all" else None)
    return table


def _rounding_by_group(found: Inspection, comparison: Comparison) -> Table:
    """What a bfloat16 output loses of the update w·δ, at each weight."""
    whole = found.summary(comparison)
    groups = [found.summary(comparison, _of_kind(kind)) for kind in found.kinds]
    table = _new_table(
        "weight", [*found.kinds, "all", "error"], "elements of w·δ lost to bfloat16; relative error of all"
    )
    for position, weight in enumerate(found.weights):
        losses = [summary.difference.rounding[position] for summary in (*groups, whole)]
        error = losses[-1].relative_error
        table.add_row(
            f"{weight:g}", *(percent(loss.lost_share) for loss in losses), "–" if error is None else f"{error:.2f}"
        )
    return table


def _new_table(heading: str, columns: Sequence[str], title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, title=title, title_justify="left")
    table.add_column(heading, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _bar(value: float | None, largest: float) -> str:
    eighths = round(8 * _BAR_CELLS * (value or 0.0) / largest) if largest else 0
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _middle(found: Inspection) -> int:
    return min(range(len(found.weights)), key=lambda index: abs(found.weights[index] - 0.5))


def _cosine(value: float | None) -> str:
    return "–" if value is None else f"{value:.5f}"
