"""Breadcrumbs: drop the largest changes as outliers and the smallest as noise, and merge the band between.

The idea: two exact thresholds per task vector, one above and one below the band. What is dropped at the top stays
dropped, also at density 1: the outliers are what this method distrusts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dapt_merge.methods.contract import Parameter, Source, TensorContext, Values
from dapt_merge.methods.dare import linear_copy, summed_in_one_pass
from dapt_merge.methods.fused import Thinning, ToBand
from dapt_merge.methods.pieces import Operands
from dapt_merge.methods.registry import method
from dapt_merge.methods.rescaling import RESCALE_SELECTED, l1_ratio, restores_l1
from dapt_merge.methods.selection import Cutoff, kept_count, kept_mask
from dapt_merge.methods.task_arithmetic import (
    LAMBDA,
    NORMALIZE_BY_SUM,
    WEIGHT,
    add_scaled,
    cancelled_weight,
    scales,
    zeroed,
)
from dapt_merge.methods.ties import (
    DENSITY,
    ELECT,
    NORMALIZE,
    cutoffs_of,
    elected_copy,
    elected_dead_knobs,
    elected_in_one_pass,
    merge_elected,
    normalizes,
    taking_part,
)
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

GAMMA = Parameter(
    "gamma", 0.01, "share of the largest elements of each task vector that is dropped", per_model=True, low=0, high=1
)


class _Band(NamedTuple):
    """The kept elements of a task vector: those that `lower` keeps and `upper` does not (None: no border there).

    `factor` multiplies what is kept.
    """

    upper: Cutoff | None
    lower: Cutoff | None
    factor: float = 1.0

    @property
    def thinning(self) -> ToBand | None:
        """The band for the compiled loops; None where everything is kept as it is."""
        if self.upper is None and self.lower is None and self.factor == 1:
            return None
        return ToBand(self.lower, self.upper, self.factor)

    def mask(self, delta: Tensor, start: int) -> Tensor:
        """Return which elements of a 1-d run are kept; `start` is the index of its first element."""
        if self.lower is None:
            kept = torch.ones(delta.shape, dtype=torch.bool, device=delta.device)
        else:
            kept = kept_mask(delta, self.lower, start)
        return kept if self.upper is None else kept & ~kept_mask(delta, self.upper, start)


def band_counts(density: float, gamma: float, numel: int) -> tuple[int, int]:
    """Return how many of the largest elements are dropped, ⌊gamma·n⌋, and how many of the others are kept.

    Those are ⌊density·n⌋, at least 1, unless fewer are left.

    Example:
        >>> band_counts(0.5, 0.1, 20), band_counts(1.0, 0.1, 20), band_counts(0.01, 0.0, 20)
        ((2, 10), (2, 18), (0, 1))
    """
    outliers = int(gamma * numel)
    return outliers, min(kept_count(density, numel), numel - outliers)


def _bands(operands: Operands, values: Values, context: TensorContext) -> tuple[_Band, ...]:
    voters = taking_part(values["weight"], values["density"])
    bands = []
    for position, (density, gamma) in enumerate(zip(values["density"], values["gamma"], strict=True)):
        band = _Band(None, None)
        if position in voters:
            band = _find_band(operands, position, *band_counts(density, gamma, operands.numel))
        if restores_l1(values["rescale"]) and (band.upper or band.lower):
            band = band._replace(factor=l1_ratio(operands, position, band.mask))
        bands.append(band)
    return tuple(bands)


def _find_band(operands: Operands, position: int, outliers: int, kept: int) -> _Band:
    context = operands.context
    counts = tuple(count for count in (outliers, outliers + kept) if 0 < count < operands.numel)
    found = dict(zip(counts, cutoffs_of(operands, position, counts, context), strict=True)) if counts else {}
    if outliers == operands.numel:  # gamma 1: one border, with nothing on its kept side
        (everything,) = cutoffs_of(operands, position, (outliers,), context)
        return _Band(everything, everything)
    return _Band(found.get(outliers), found.get(outliers + kept))


def _banded_deltas(
    base: Tensor, models: Sequence[Tensor], bands: Sequence[_Band], positions: Sequence[int], context: TensorContext
) -> list[Tensor]:
    """Return the task vectors of `positions`, without what lies outside their bands."""
    deltas = []
    for position in positions:
        delta, band = torch.sub(models[position], base), bands[position]
        if band.upper is not None or band.lower is not None:
            delta.mul_(band.mask(delta, context.offset))
        deltas.append(delta if band.factor == 1 else delta.mul_(band.factor))
    return deltas


def _cut_to_bands(
    voters: Sequence[int], density: Sequence[float], measured: Sequence[_Band], **others: object
) -> list[Thinning]:
    return [measured[position].thinning for position in voters]


def _unless_outliers_go(values: Values, source: Source | None) -> Source | None:
    return source if source is None or source == "base" or values["gamma"][source] == 0 else None


def _linear_copy(values: Values, count: int, base_given: bool) -> Source | None:
    return _unless_outliers_go(values, linear_copy(values, count, base_given))


def _elected_copy(values: Values, count: int, base_given: bool) -> Source | None:
    return _unless_outliers_go(values, elected_copy(values, count, base_given))


def _band_dead_knobs(values: Values) -> list[str]:
    dead = []
    pairs = list(zip(values["density"], values["gamma"], strict=True))
    if all(1 - gamma < density < 1 for density, gamma in pairs):
        dead.append("density: gamma leaves less than that, so that any density up to 1 keeps the same")
    if restores_l1(values["rescale"]) and all(density == 1 and gamma == 0 for density, gamma in pairs):
        dead.append("rescale: density 1 and gamma 0 drop nothing")
    return dead


def _linear_dead_knobs(values: Values, count: int) -> list[str]:
    weight = values["weight"]
    dead = zeroed(weight, values["lambda"]) or cancelled_weight(weight, values["normalize"])
    return dead + _band_dead_knobs(values)


def _ties_dead_knobs(values: Values, count: int) -> list[str]:
    return elected_dead_knobs(values, count) + _band_dead_knobs(values)


@method(
    "breadcrumbs",
    parameters=(WEIGHT, DENSITY, GAMMA, LAMBDA, NORMALIZE_BY_SUM, RESCALE_SELECTED),
    reference="arXiv:2312.06795",
    elementwise=True,
    dead_knobs=_linear_dead_knobs,
    measure=_bands,
    copy_of=_linear_copy,
    kernel=summed_in_one_pass(_cut_to_bands),
)
def breadcrumbs(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    gamma: tuple[float, ...],
    lambda_: float,
    normalize: bool,
    rescale: str | bool,
    measured: tuple[_Band, ...],
    context: TensorContext,
) -> Tensor:
    """Drop both tails, then task arithmetic: θ₀ + λΣwᵢ·(mᵢ∘δᵢ), mᵢ the band of each task vector.

    Per tensor, the ⌊gamma·n⌋ largest magnitudes go; of the others the ⌊density·n⌋ largest stay. Equal magnitudes rank
    by index, the lower one higher. `normalize` divides by Σw. One task vector: its band, scaled; two or n: the sum of
    theirs. In the paper's terms the lower share β is 1 − density − gamma. Where density + gamma is above 1, mergekit
    keeps the density and drops fewer outliers (none at density 1); here the outliers go.
    """
    voters = taking_part(weight, density)
    applied = scales(weight, normalize, lambda_, context)
    deltas = _banded_deltas(base, models, measured, voters, context)
    return add_scaled(base, deltas, [applied[position] for position in voters])


@method(
    "breadcrumbs_ties",
    parameters=(WEIGHT, DENSITY, GAMMA, LAMBDA, NORMALIZE, ELECT, RESCALE_SELECTED),
    reference="arXiv:2312.06795, arXiv:2306.01708",
    elementwise=True,
    dead_knobs=_ties_dead_knobs,
    measure=_bands,
    copy_of=_elected_copy,
    kernel=elected_in_one_pass(_cut_to_bands),
)
def breadcrumbs_ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    gamma: tuple[float, ...],
    lambda_: float,
    normalize: str | bool,
    elect: str,
    rescale: str | bool,
    measured: tuple[_Band, ...],
    context: TensorContext,
) -> Tensor:
    """Drop both tails as `breadcrumbs` does, then elect signs and merge as `ties` does instead of adding.

    One task vector: nothing to elect, so this is `breadcrumbs`; two or n: the (weighted) mean of the kept elements that
    agree.
    """
    voters = taking_part(weight, density)
    return merge_elected(
        base,
        _banded_deltas(base, models, measured, voters, context),
        [weight[position] for position in voters],
        elect=elect,
        normalize=normalizes(normalize, len(models)),
        lambda_=lambda_,
    )
