"""How far each method is from its formula in float64, in bfloat16 and float32: ours, mergekit's, the best there is.

    python benchmarks/accuracy.py            # prints the tables; some seconds on one core
    python benchmarks/accuracy.py --write    # and keeps them in benchmarks/accuracy/, as Markdown and JSON

A matrix of a real model's size and statistics (rms 0.05), two task vectors that are small, as those of continued
pre-training are. The error is that of the merged tensor, relative to the norm of the exact update: 1 means that as much
was lost as was merged. The best there is, is the exact result rounded to the output's dtype. The formulas in float64
are those of the tests, written apart from the package. Random methods get one mask for all three.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "methods"))
import float64_reference as exact

RESULTS = Path(__file__).parent / "accuracy"
SHAPE = (512, 576)
WEIGHTS = (0.3141, 0.4693)  # in no small ratio: with 0.3 and 0.45 the coarse steps of bfloat16 often cancel in a vote
SEED, NAME = 3, "layers.0.weight"
Formula = Callable[[np.ndarray, list[np.ndarray], list[np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Case:
    """A method, its parameters, and its formula: (base, models, masks) → the merged tensor, all float64.

    Attributes:
        count: how many DAPT checkpoints take part.
        base: whether the base takes part as the base.
        unlike: parameters that have to be said differently to mergekit.
        probabilities: for a random method, (task vector) → each element's probability of being kept.
    """

    method: str
    values: dict[str, Any]
    formula: Formula
    count: int = 2
    base: bool = True
    unlike: dict[str, Any] = field(default_factory=dict)
    probabilities: Callable[[np.ndarray], np.ndarray] | None = None


def _sum(base: np.ndarray, models: Sequence[np.ndarray], weights: Sequence[float] = WEIGHTS) -> np.ndarray:
    return base + sum(weight * (model - base) for weight, model in zip(weights, models, strict=True))


def _vote(base: np.ndarray, deltas: Sequence[np.ndarray], normalize: bool) -> np.ndarray:
    return base + exact.elected(deltas, WEIGHTS, "weighted", normalize)


def _dropped(base: np.ndarray, models: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Masked task vectors, each with its L1 norm restored."""
    deltas = [model - base for model in models]
    kept = [delta * mask for delta, mask in zip(deltas, masks, strict=True)]
    return [part * np.abs(delta).sum() / np.abs(part).sum() for part, delta in zip(kept, deltas, strict=True)]


def _cases() -> dict[str, Case]:
    weight = {"weight": WEIGHTS}
    t = WEIGHTS[1] / sum(WEIGHTS)
    half, band = {**weight, "density": 0.5}, {**weight, "density": 0.6, "gamma": 0.05}
    drop, rank = {**half, "rescale": "l1"}, {**half, "rescale": "l1", "epsilon": 0.2}

    def ranked(delta: np.ndarray) -> np.ndarray:
        return exact.rank_probabilities(delta, 0.5, 0.2)

    def even(delta: np.ndarray) -> np.ndarray:
        return np.full(delta.shape, 0.5)

    def bands(b: np.ndarray, m: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [exact.banded(x - b, 0.6, 0.05) for x in m]

    spoken = {"rescale": True}
    return {
        "linear": Case("linear", weight, lambda b, m, k: np.average(m, axis=0, weights=WEIGHTS), base=False),
        "slerp": Case("slerp", {"t": 0.3}, lambda b, m, k: _chord_or_arc(b, m[0], 0.3), 1),
        "nuslerp": Case("nuslerp", weight, lambda b, m, k: exact.arc(m[0], m[1], t), base=False),
        "nuslerp, rows": Case(
            "nuslerp", {**weight, "nuslerp_flatten": False}, lambda b, m, k: exact.arc(m[0], m[1], t, 1), base=False
        ),
        "nuslerp, task vectors": Case("nuslerp", weight, lambda b, m, k: b + exact.arc(m[0] - b, m[1] - b, t)),
        "multislerp": Case("multislerp", weight, lambda b, m, k: exact.mean_direction(m, WEIGHTS), base=False),
        "multislerp, task vectors": Case(
            "multislerp", weight, lambda b, m, k: b + exact.mean_direction([x - b for x in m], WEIGHTS)
        ),
        "karcher": Case("karcher", {}, lambda b, m, k: exact.karcher_mean(m), base=False),
        "task_arithmetic": Case("task_arithmetic", weight, lambda b, m, k: _sum(b, m)),
        "ties": Case("ties", half, lambda b, m, k: _vote(b, [exact.trimmed(x - b, 0.5) for x in m], True)),
        "dare_linear": Case(
            "dare_linear", drop, lambda b, m, k: _sum(b, [b + d for d in _dropped(b, m, k)]),
            unlike=spoken, probabilities=even,
        ),
        "dare_ties": Case(
            "dare_ties", {**drop, "normalize": False}, lambda b, m, k: _vote(b, _dropped(b, m, k), False),
            unlike=spoken, probabilities=even,
        ),
        "della_linear": Case(
            "della_linear", rank, lambda b, m, k: _sum(b, [b + d for d in _dropped(b, m, k)]),
            unlike=spoken, probabilities=ranked,
        ),
        "della": Case(
            "della", rank, lambda b, m, k: _vote(b, _dropped(b, m, k), True), unlike=spoken, probabilities=ranked
        ),
        "breadcrumbs": Case("breadcrumbs", band, lambda b, m, k: _sum(b, [b + d for d in bands(b, m)])),
        "breadcrumbs_ties": Case(
            "breadcrumbs_ties", {**band, "normalize": False}, lambda b, m, k: _vote(b, bands(b, m), False)
        ),
        "model_stock": Case("model_stock", {}, lambda b, m, k: exact.stocked(b, m, False)),
        "model_stock, filter-wise": Case(
            "model_stock", {"filter_wise": True}, lambda b, m, k: exact.stocked(b, m, True)
        ),
        "sce": Case("sce", {}, lambda b, m, k: b + exact.sce_update([x - b for x in m], 1.0)),
        "nearswap": Case("nearswap", {"t": 5e-4}, lambda b, m, k: b + np.clip(m[0] - b, -5e-4, 5e-4), 1),
        "ram": Case(
            "ram", {"epsilon": 3e-4}, lambda b, m, k: b + exact.reinforced_update([x - b for x in m], 3e-4)
        ),
        "ramplus_tl": Case(
            "ramplus_tl", {"epsilon": 3e-4},
            lambda b, m, k: b + exact.reinforced_update([x - b for x in m], 3e-4, 0.1, 0.2),
        ),
        "arcee_fusion": Case("arcee_fusion", {}, lambda b, m, k: exact.fused(b, m[0]), 1),
        "passthrough": Case("passthrough", {"scale": 0.7}, lambda b, m, k: 0.7 * m[0], 1, False),
    }  # fmt: skip


def _chord_or_arc(base: np.ndarray, model: np.ndarray, t: float) -> np.ndarray:
    cosine = (base * model).sum() / np.linalg.norm(base) / np.linalg.norm(model)
    return (1 - t) * base + t * model if abs(cosine) > 0.9995 else exact.arc(base, model, t)


CASES = _cases()


@dataclass(frozen=True)
class Errors:
    """‖result − exact‖ relative to ‖exact update‖: of the exact result rounded, of ours, of mergekit's."""

    rounding: float
    ours: float
    mergekit: float


def inputs(dtype: torch.dtype, step: float, shape: tuple[int, int]) -> list[Tensor]:
    """Return a base of rms 0.05 and two models around it whose task vectors have that rms and cosine 0.64."""
    generator = torch.Generator().manual_seed(SEED)
    base, common, one, two = (torch.randn(shape, generator=generator) for _ in range(4))
    deltas = [step * (0.8 * common + 0.6 * own) for own in (one, two)]
    return [tensor.to(dtype) for tensor in (0.05 * base, *(0.05 * base + delta for delta in deltas))]


def errors(name: str, dtype: torch.dtype, step: float, shape: tuple[int, int] = SHAPE) -> Errors:
    """Measure one method, with inputs, output and mergekit's arithmetic in `dtype` and task vectors of rms `step`."""
    case = CASES[name]
    base, *models = inputs(dtype, step, shape)
    models = models[: case.count]
    wide_base, wide_models = exact.wide(base), [exact.wide(model) for model in models]
    masks = _masks(case, [model - wide_base for model in wide_models])
    expected = case.formula(wide_base, wide_models, [exact.wide(mask) for mask in masks])
    results = torch.from_numpy(expected).to(dtype), _ours(case, base, models), _theirs(case, base, models, masks)
    update = np.linalg.norm(expected - wide_base)
    return Errors(*(float(np.linalg.norm(exact.wide(result.to(dtype)) - expected) / update) for result in results))


def _masks(case: Case, deltas: Sequence[np.ndarray]) -> list[Tensor]:
    from dapt_merge.methods.masks import keep_mask

    if case.probabilities is None:
        return []
    masks = []
    for stream, delta in enumerate(deltas):
        probabilities = torch.from_numpy(case.probabilities(delta)).reshape(-1)
        masks.append(keep_mask(SEED, NAME, stream, 0, delta.size, probabilities).view(delta.shape))
    return masks


def _ours(case: Case, base: Tensor, models: list[Tensor]) -> Tensor:
    from dapt_merge.methods.apply import combine
    from dapt_merge.methods.contract import TensorContext
    from dapt_merge.methods.registry import get_method

    context = TensorContext(NAME, seed=SEED)
    method = get_method(case.method)
    return combine(method, base if case.base else None, models, case.values, context, out_dtype=base.dtype)


def _theirs(case: Case, base: Tensor, models: list[Tensor], masks: list[Tensor]) -> Tensor:
    from mergekit.merge_methods.api import merge_tensors

    tensors, start = ([base, *models], 1) if case.base else (models, 0)
    values = {**case.values, **case.unlike}
    for key in {"weight", "density", "gamma", "epsilon"}.intersection(values):
        each = values[key] if isinstance(values[key], tuple) else [values[key]] * len(models)
        if case.method == "linear":
            values[key] = list(each)
        elif not (key == "epsilon" and case.method.startswith("ram")):
            values[key] = dict(enumerate(each, start=start))
    with _drawing(masks):
        return merge_tensors(
            tensors, case.method, parameters=values, ids=list(range(len(tensors))),
            base_index=0 if case.base else None, dtype=base.dtype,
        )  # fmt: skip


@contextmanager
def _drawing(masks: list[Tensor]) -> Iterator[None]:
    """Give mergekit these masks, in order, in place of those that it would draw."""
    drawn, before = iter(masks), torch.bernoulli
    torch.bernoulli = lambda probabilities: next(drawn).to(probabilities.dtype)
    try:
        yield
    finally:
        torch.bernoulli = before


# title → dtype of everything, rms of the task vectors
SETTINGS = {
    "bfloat16, task vectors of rms 1e-3": (torch.bfloat16, 1e-3),
    "bfloat16, task vectors of rms 1e-2": (torch.bfloat16, 1e-2),
    "float32, task vectors of rms 1e-3": (torch.float32, 1e-3),
}
TIE = 2.0**-12
TIE_IN_FLOAT32 = 0.01


def verdict(found: Errors, tie: float = TIE) -> str:
    """Say which is nearer, or that the two cannot be told apart: a tie, in bfloat16 within 2⁻¹² of the error.

    Where both calculate in float32 or better, they round the same values to bfloat16, but for the few that lie within
    float32's rounding of a midpoint between two neighbours. Those are equally near, up to 2⁻¹³ of their distance (some
    four roundings of 2⁻²⁴ against a distance of 2⁻⁹), so that the errors can differ by that much, in favour of either.
    In float32 every rounding on the way shows, and a tie is what differs by less than one in a hundred.
    """
    if abs(found.ours - found.mergekit) <= tie * found.mergekit:
        return "tie"
    return "ours" if found.ours < found.mergekit else "mergekit"


def page(measured: dict[str, dict[str, Errors]], versions: dict[str, str]) -> Iterator[str]:
    """Yield the measurements as Markdown."""
    yield "# Accuracy against float64"
    yield (
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}. A {SHAPE[0]}×{SHAPE[1]} matrix of "
        "rms 0.05; ‖result − exact‖ / ‖exact update‖, where *rounding* is the exact result rounded to the output "
        "dtype: the least that any arithmetic can have. `python benchmarks/accuracy.py --write` makes this page again; "
        "`tests/methods/test_accuracy.py` asserts that in bfloat16 ours is never the larger error."
    )
    for setting, rows in measured.items():
        yield from (
            "",
            f"## {setting}",
            "",
            "| method | rounding | ours | mergekit | nearer |",
            "|---|---|---|---|---|",
        )
        tie = TIE_IN_FLOAT32 if SETTINGS[setting][0] == torch.float32 else TIE
        for name, found in rows.items():
            yield f"| {name} | {found.rounding:.3g} | {found.ours:.3g} | {found.mergekit:.3g} | {verdict(found, tie)} |"


def main() -> None:
    """Print the page; with --write, keep it and the numbers."""
    from importlib.metadata import version

    measured = {title: {name: errors(name, *setting) for name in CASES} for title, setting in SETTINGS.items()}
    versions = {name: version(name) for name in ("dapt-merge", "mergekit", "torch")}
    text = "\n".join(page(measured, versions)) + "\n"
    print(text, end="")
    if "--write" in sys.argv[1:]:
        from dapt_merge.atomic import write_text

        RESULTS.mkdir(exist_ok=True)
        numbers = {title: {name: asdict(found) for name, found in rows.items()} for title, rows in measured.items()}
        write_text(RESULTS / "float64.md", text)
        content = {"versions": versions, "shape": SHAPE, "errors": numbers}
        write_text(RESULTS / "float64.json", json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
