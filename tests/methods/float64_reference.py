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


def trimmed(delta: np.ndarray, density: float) -> np.ndarray:
    """The ⌊density·n⌋ (at least one) largest magnitudes; equal ones by lower index."""
    flat = delta.reshape(-1)
    kept = max(1, int(density * flat.size)) if density > 0 else 0
    order = sorted(range(flat.size), key=lambda index: (-abs(flat[index]), index))
    out = np.zeros_like(flat)
    out[order[:kept]] = flat[order[:kept]]
    return out.reshape(delta.shape)


def elected(deltas: Sequence[np.ndarray], weights: Sequence[float], elect: str, normalize: bool) -> np.ndarray:
    """The merged task vector of TIES, one element at a time."""
    out = np.zeros(deltas[0].size)
    for index in range(out.size):
        entries = [(delta.reshape(-1)[index], weight) for delta, weight in zip(deltas, weights, strict=True)]
        ballots = {
            "weighted": [weight * delta for delta, weight in entries],
            "unweighted": [delta for delta, _ in entries],
            "count": [math.copysign(1, weight * delta) if delta else 0 for delta, weight in entries],
        }[elect]
        direction = 1 if sum(ballots) >= 0 else -1
        agreeing = [entry for entry, ballot in zip(entries, ballots, strict=True) if ballot * direction > 0]
        weight_sum = sum(weight for _, weight in agreeing)
        divisor = weight_sum if normalize and weight_sum != 0 else 1
        out[index] = sum(weight * delta for delta, weight in agreeing) / divisor
    return out.reshape(deltas[0].shape)


def spherical(base: np.ndarray, model: np.ndarray, t: float) -> np.ndarray:
    unit_base, unit_model = base / np.linalg.norm(base), model / np.linalg.norm(model)
    angle = np.arccos(np.clip((unit_base * unit_model).sum(), -1, 1))
    return (np.sin((1 - t) * angle) * base + np.sin(t * angle) * model) / np.sin(angle)


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
