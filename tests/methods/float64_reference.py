"""The papers' formulas in plain float64 numpy, written apart from the package, and strategies for its inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from dapt_merge.methods.apply import combine
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.registry import get_method

SHAPES = [(), (1,), (7,), (5, 1), (1, 6), (4, 9), (3, 2, 5)]
WEIGHTS = st.floats(-2, 2).filter(lambda weight: abs(weight) > 1e-3)


def merge(name: str, base: Tensor | None, models: Sequence[Tensor], *, seed: int = 0, **values: object) -> Tensor:
    if "lambda_" in values:
        values["lambda"] = values.pop("lambda_")
    return combine(get_method(name), base, models, values, TensorContext("layer.weight", seed=seed))


def draw_tensors(
    seed: int, shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32, spread: float = 0.3
) -> list[Tensor]:
    """A base and models around it, in general position: no two magnitudes tie except by rounding to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    models = [base + spread * torch.randn(shape, generator=generator) for _ in range(count - 1)]
    return [tensor.to(dtype) for tensor in (base, *models)]


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def by_magnitude(values: np.ndarray) -> np.ndarray:
    """Positions in a flat array, largest magnitude first, equal ones by lower index."""
    return np.argsort(-np.abs(values), kind="stable")


def trimmed(delta: np.ndarray, density: float) -> np.ndarray:
    """The ⌊density·n⌋ (at least one) largest magnitudes; equal ones by lower index."""
    return banded(delta, density, 0.0)


def elected(deltas: Sequence[np.ndarray], weights: Sequence[float], elect: str, normalize: bool) -> np.ndarray:
    """The merged task vector of TIES: votes, the sign of their sum, the (weighted mean of) changes of that sign."""
    changes, scales = np.array(deltas), np.array(weights).reshape(-1, *[1] * np.ndim(deltas[0]))
    votes = {"weighted": scales * changes, "unweighted": changes, "count": np.sign(scales * changes)}[elect]
    direction = np.where(votes.sum(axis=0) >= 0, 1, -1)
    agreeing = votes * direction > 0
    weight_sum = (scales * agreeing).sum(axis=0)
    divisor = np.where(weight_sum == 0, 1, weight_sum) if normalize else 1
    return (scales * changes * agreeing).sum(axis=0) / divisor


def spherical(base: np.ndarray, model: np.ndarray, t: float) -> np.ndarray:
    unit_base, unit_model = base / np.linalg.norm(base), model / np.linalg.norm(model)
    angle = np.arccos(np.clip((unit_base * unit_model).sum(), -1, 1))
    return (np.sin((1 - t) * angle) * base + np.sin(t * angle) * model) / np.sin(angle)


def arc(one: np.ndarray, two: np.ndarray, t: float, axis: int | None = None) -> np.ndarray:
    """The point at t on the arc between two vectors: all elements, or those along an axis, each pair on its own."""
    cosine = (one * two).sum(axis=axis, keepdims=True)
    cosine = cosine / np.sqrt((one**2).sum(axis=axis, keepdims=True) * (two**2).sum(axis=axis, keepdims=True))
    angle = np.arccos(np.clip(cosine, -1, 1))
    return (np.sin((1 - t) * angle) * one + np.sin(t * angle) * two) / np.sin(angle)


def mean_direction(vectors: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """multislerp: the weighted mean of the unit vectors, stretched to the weighted mean length."""
    lengths = [np.linalg.norm(vector) for vector in vectors]
    mean = sum(w * v / length for w, v, length in zip(weights, vectors, lengths, strict=True)) / sum(weights)
    return np.average(lengths, weights=weights) * mean / np.linalg.norm(mean)


def karcher_mean(vectors: Sequence[np.ndarray], steps: int = 500) -> np.ndarray:
    """Gradient descent on the summed squared angles, with full vectors."""
    flat = np.array([vector.reshape(-1) for vector in vectors])
    lengths = np.linalg.norm(flat, axis=1)
    units = flat / lengths[:, None]
    mean = units.mean(0) / np.linalg.norm(units.mean(0))
    for _ in range(steps):
        logs = []
        for unit in units:
            away = unit - (unit @ mean) * mean
            angle = math.atan2(np.linalg.norm(away), unit @ mean)
            logs.append(angle * away / max(np.linalg.norm(away), 1e-300))
        step = 0.5 * np.mean(logs, axis=0)
        size = np.linalg.norm(step)
        if size < 1e-12:
            break
        mean = math.cos(size) * mean + math.sin(size) * step / size
    return (lengths.mean() * mean).reshape(vectors[0].shape)


def banded(delta: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """Breadcrumbs: without the ⌊gamma·n⌋ largest magnitudes, the ⌊density·n⌋ (at least one) largest of the rest."""
    flat = delta.reshape(-1)
    kept = by_magnitude(flat)[int(gamma * flat.size) :][: max(1, int(density * flat.size)) if density > 0 else 0]
    out = np.zeros_like(flat)
    out[kept] = flat[kept]
    return out.reshape(delta.shape)


def rank_probabilities(delta: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """DELLA: per row (last dimension), density − ε for the smallest magnitude to density + ε for the largest."""
    rows = delta.reshape(-1, delta.shape[-1] if delta.ndim else 1)
    if rows.shape[1] < 2:
        return np.full(delta.shape, density)
    places = np.argsort(-np.abs(rows), axis=1, kind="stable")
    out = np.empty(rows.shape)
    by_rank = density + epsilon - 2 * epsilon * np.arange(rows.shape[1]) / (rows.shape[1] - 1)
    np.put_along_axis(out, places, np.broadcast_to(by_rank, rows.shape), axis=1)
    return out.reshape(delta.shape)


def stocked(base: np.ndarray, models: Sequence[np.ndarray], filter_wise: bool) -> np.ndarray:
    """Model Stock, one row after the other (one row in all unless filter-wise)."""
    length = base.shape[-1] if filter_wise and base.ndim else base.size
    rows = [array.reshape(-1, length) for array in (base, *models)]
    out, count = np.empty_like(rows[0]), len(models)
    for row in range(len(out)):
        deltas = [array[row] - rows[0][row] for array in rows[1:]]
        norms = [np.linalg.norm(delta) for delta in deltas]
        pairs = [(i, j) for i in range(count) for j in range(i)]
        cosine = np.mean([deltas[i] @ deltas[j] / (norms[i] * norms[j]) for i, j in pairs])
        t = max(0.0, count * cosine / (1 + (count - 1) * cosine)) if cosine > 0 else 0.0
        out[row] = (1 - t) * rows[0][row] + t * np.mean([array[row] for array in rows[1:]], axis=0)
    return out.reshape(base.shape)


def sce_update(deltas: Sequence[np.ndarray], select_topk: float) -> np.ndarray:
    """SCE: select by variance, calculate weights by squares, erase minority signs."""
    flat = np.array([delta.reshape(-1) for delta in deltas])
    variances = flat.var(axis=0)
    differing = int((variances > 0).sum())
    order = by_magnitude(variances)
    if select_topk < 1:
        flat[:, order[max(1, int(select_topk * differing)) :] if differing else order] = 0
    weights = (flat**2).sum(axis=1)
    agreeing = (np.sign(flat) == np.where(flat.sum(axis=0) >= 0, 1, -1)) * weights[:, None]
    divisor = agreeing.sum(axis=0)
    return ((agreeing * flat).sum(axis=0) / np.where(divisor == 0, 1, divisor)).reshape(deltas[0].shape)


def reinforced_update(deltas: Sequence[np.ndarray], epsilon: float, r: float = 0, alpha: float = 0) -> np.ndarray:
    """RAM (r 0) and RAM+: one element at a time."""
    flat = np.array([delta.reshape(-1) for delta in deltas])
    touched = np.abs(flat) > epsilon
    alone = touched.sum(axis=0) == 1
    out = np.zeros(flat.shape[1])
    for model, mine in zip(flat, touched, strict=True):
        unique, shared = (mine & alone).sum(), (mine & ~alone).sum()
        factor = 1 + r * min(shared / unique, alpha) if unique else 1
        out += np.where(mine, np.where(alone, factor * model, model / np.maximum(touched.sum(axis=0), 1)), 0)
    return out.reshape(deltas[0].shape)


def fused(base: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Arcee Fusion: the model's elements whose importance is an outlier."""
    importances = importance(base, model)
    return np.where(importances >= outlier_threshold(importances), model, base)


def importance(base: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Arcee Fusion: |δ| times the divergence of the softmaxes of its row."""

    def probabilities(values: np.ndarray) -> np.ndarray:
        powers = np.exp(values - values.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True) + 1e-8

    p, q = probabilities(np.atleast_1d(model)), probabilities(np.atleast_1d(base))
    divergence = (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    return (np.abs(np.atleast_1d(model - base)) * divergence).reshape(base.shape)


def outlier_threshold(importances: np.ndarray) -> float:
    ascending = np.sort(importances.reshape(-1))
    lower, median, upper = (ascending[int(share * (ascending.size - 1))] for share in (0.25, 0.5, 0.75))
    return float(median + 1.5 * (upper - lower))


def assert_close(ours: Tensor, expected: np.ndarray | Tensor, inputs: Sequence[Tensor], relative: float = 1e-6) -> None:
    """Agreement relative to the largest magnitude that entered an element: results may cancel, operands do not."""
    expected = wide(expected) if isinstance(expected, Tensor) else expected
    scale = np.maximum(np.abs(expected), np.max([np.abs(wide(tensor)) for tensor in inputs], axis=0))
    difference = np.abs(wide(ours) - expected)
    assert ours.shape == expected.shape
    assert (difference <= relative * scale + 1e-30).all(), (difference / (scale + 1e-30)).max()


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal in every bit, signs of zeros too."""
    return left.dtype == right.dtype and left.shape == right.shape and raw(left) == raw(right)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
