"""What the report items say of each model, as signed differences from the base.

One convention everywhere: a *gain* is positive when the model is better than the base, whatever the metric's direction.
Bits per byte stay bits per byte; accuracies are in points (hundredths). Every gain carries a paired-bootstrap interval
over the same items. What this module does not know: where scores come from, and how rows are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from dapt_merge.evaluation import TaskItems
    from dapt_merge.evaluation.statistics import Interval

Role = Literal["base", "dapt", "knee", "front", "trial"]
UNIT = {"bits_per_byte": "bits per byte"}


@dataclass(frozen=True)
class Axis:
    """One thing that is measured: an objective, or a suite that is recorded beside them.

    `tasks` are the lm-eval tasks whose macro mean is the score; `higher_is_better` is the metric's direction.
    """

    name: str
    side: Literal["domain", "general"]
    metric: str
    higher_is_better: bool
    tasks: tuple[str, ...]

    @property
    def unit(self) -> str:
        """Unit of a difference on this axis."""
        return UNIT.get(self.metric, "points")

    @property
    def scale(self) -> float:
        """Factor from the metric to the unit."""
        return 1.0 if self.metric in UNIT else 100.0

    @property
    def sign(self) -> int:
        """+1 when a larger score is better, −1 otherwise."""
        return 1 if self.higher_is_better else -1


@dataclass(frozen=True)
class Gain:
    """A signed difference from the base, positive when better, with its 95% interval; in the axis's unit."""

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


def gain_over(
    model: Mapping[str, TaskItems], reference: Mapping[str, TaskItems], axis: Axis, *, seed: int = 0
) -> Gain:
    """Difference of `model` from `reference` on one axis, positive when `model` is better."""
    from dapt_merge.evaluation.statistics import paired_bootstrap

    interval = paired_bootstrap(model, reference, axis.tasks, axis.metric, seed=seed)
    return _signed(interval, axis)


def _signed(interval: Interval, axis: Axis) -> Gain:
    ends = sorted(axis.sign * axis.scale * end for end in (interval.low, interval.high))
    return Gain(axis.sign * axis.scale * interval.estimate, ends[0], ends[1])


def axes_in_order(axes: Sequence[Axis]) -> list[Axis]:
    """Domain before general, objectives (bits per byte) before what is recorded beside them."""
    return sorted(axes, key=lambda axis: (axis.metric not in UNIT, axis.side != "domain"))
