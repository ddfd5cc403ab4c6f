"""What the report items say of each model, as signed differences from the base.

One convention everywhere: a *gain* is positive when the model is better than the base, whatever the metric's direction.
Bits per byte stay bits per byte; accuracies are in points (hundredths). Every gain carries a paired-bootstrap interval
over the same items. What this module does not know: where scores come from, and how rows are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dapt_merge.evaluation.items import gain_scale, gain_unit

if TYPE_CHECKING:
    from dapt_merge.evaluation.statistics import Scores

Role = Literal["base", "dapt", "knee", "front", "trial"]


@dataclass(frozen=True)
class Axis:
    """One thing that is measured: an objective, or a suite that is recorded beside them.

    `tasks` are the lm-eval tasks whose macro mean is the score.
    """

    name: str
    side: Literal["domain", "general"]
    metric: str
    tasks: tuple[str, ...]

    @property
    def unit(self) -> str:
        """Unit of a difference on this axis."""
        return gain_unit(self.metric)

    @property
    def scale(self) -> float:
        """Factor from the metric to the unit."""
        return gain_scale(self.metric)


@dataclass(frozen=True)
class Gain:
    """A signed difference, positive when better, with its 95% interval; in the axis's unit."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Row:
    """One model of the report: its scores and its gains over the base, by axis name."""

    label: str
    role: Role
    trial: int | None
    scores: Mapping[str, float]
    gains: Mapping[str, Gain]
    over_dapt: Mapping[str, Gain] = field(default_factory=dict)
    domain_gain_kept: Gain | None = None
    general_loss_given_back: Gain | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def build_row(
    label: str,
    role: Role,
    trial: int | None,
    model: Scores,
    base: Scores,
    dapt: Scores,
    axes: Sequence[Axis],
    *,
    seed: int = 0,
) -> Row:
    """Score one model of the report against the base and the DAPT checkpoint.

    Args:
        label: the model in words.
        role: what the model is in the report.
        trial: its number in the study.
        model, base, dapt: per-item scores on the same report items.
        axes: what to compare on.
        seed: of the bootstrap.
    """
    from dapt_merge.evaluation.statistics import suite_score

    gains = {axis.name: gain_over(model, base, axis, seed=seed) for axis in axes}
    over_dapt = {axis.name: gain_over(model, dapt, axis, seed=seed) for axis in axes}
    scores = {axis.name: suite_score(model, axis.tasks, axis.metric) for axis in axes}
    main = {axis.side: axis for axis in reversed(axes_in_order(axes))}
    kept = _retained(model, base, dapt, main["domain"], seed) if "domain" in main else None
    lost = _retained(model, base, dapt, main["general"], seed) if "general" in main else None
    given_back = None if lost is None else Gain(1 - lost.estimate, 1 - lost.high, 1 - lost.low)
    return Row(label, role, trial, scores, gains, over_dapt, kept, given_back)


def gain_over(model: Scores, reference: Scores, axis: Axis, *, seed: int = 0) -> Gain:
    """Difference of `model` from `reference` on one axis, in its unit, positive when `model` is better."""
    from dapt_merge.evaluation.statistics import gain

    interval = gain(model, reference, axis.tasks, axis.metric, seed=seed)
    return Gain(*(axis.scale * value for value in (interval.estimate, interval.low, interval.high)))


def _retained(model: Scores, base: Scores, dapt: Scores, axis: Axis, seed: int) -> Gain | None:
    """Share of DAPT's change that the model keeps; None where it is no gain or no loss beyond noise."""
    from dapt_merge.evaluation.statistics import retained_share

    share = retained_share(model, base, dapt, axis.tasks, axis.metric, seed=seed)
    change = gain_over(dapt, base, axis, seed=seed).estimate
    # A share of a loss that was a gain, or of a gain that was a loss, would read as its opposite.
    if not math.isfinite(share.low) or (change > 0) != (axis.side == "domain"):
        return None
    return Gain(share.estimate, share.low, share.high)


def axes_in_order(axes: Sequence[Axis]) -> list[Axis]:
    """Domain before general, objectives (bits per byte) before what is recorded beside them."""
    return sorted(axes, key=lambda axis: (axis.scale != 1, axis.side != "domain"))
