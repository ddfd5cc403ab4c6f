"""A scorer without a model: what a recipe scores is a formula, so that a study runs in milliseconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dapt_merge.evaluation.items import TaskItems
from dapt_merge.recipe import Recipe, recipe_fingerprint, resolve
from dapt_merge.study.scoring import RecipeScores

SUITE = "name: {name}\naxis: {axis}\ntasks: [{name}_task]\n"


class FormulaScorer:
    """Domain: bits per byte fall with the weight. General: accuracy falls faster with it, and with a high density."""

    def __init__(
        self, fail_when=lambda recipe: False, seconds: float = 0.0, version: str = "1", base: str = "b"
    ) -> None:
        self.scored: list[str] = []
        self.fail_when = fail_when
        self.seconds = seconds
        self.version = version
        self.base = base

    def fingerprints(self) -> Mapping[str, str]:
        return _Prints(self.base)

    def dtype_name(self) -> str:
        return "float32"

    def tasks(self) -> dict[str, dict[str, str]]:
        return {name: {f"{name}_task": self.version} for name in ("domain", "general", "extra")}

    def score(self, recipe: Recipe, on_progress=None) -> RecipeScores:
        time.sleep(self.seconds)
        if self.fail_when(recipe):
            raise RuntimeError("out of memory, as it were")
        values = resolve(recipe, "model.layers.0.mlp.up_proj.weight", 0, 1).values
        weight = values["t"] if "t" in values else values["weight"][0]
        density = values.get("density", (1.0,))[0]
        self.scored.append(recipe.to_yaml())
        if on_progress:
            on_progress(20, 20)
        items = {
            "domain_task": _items("domain_task", "bits_per_byte", False, 2.0 - weight * (0.9 + 0.1 * density)),
            "general_task": _items("general_task", "acc", True, 0.8 - 0.3 * weight**2 * density),
            "extra_task": _items("extra_task", "acc", True, 0.5),
        }
        prints = {reference: f"content of {Path(reference).name}" for reference in recipe.references()}
        return RecipeScores(items, recipe_fingerprint(recipe, prints))


class _Prints(dict):
    def __init__(self, base: str) -> None:
        self.base = base

    def __missing__(self, path: str) -> str:
        return f"{self.base}:{Path(path).name}"


def _items(task: str, metric: str, higher: bool, mean: float) -> TaskItems:
    spread = np.linspace(-0.1, 0.1, 20)
    return TaskItems(task, "1", metric, higher, tuple(f"{i:02d}" for i in range(20)), mean + spread, np.ones(20))


def study_files(folder: Path, checkpoints: int = 2) -> dict:
    """Write folders and suites that a study needs to exist, and return a study's mapping over them."""
    for name in ("base", *(f"run/checkpoint-{10 * (index + 1)}" for index in range(checkpoints))):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text("{}")
    for name, axis in (("domain", "domain"), ("general", "general"), ("extra", "general")):
        (folder / f"{name}.yaml").write_text(SUITE.format(name=name, axis=axis))
    return {
        "base": str(folder / "base"),
        "checkpoints": str(folder / "run"),
        "space": {
            "method": ["linear", "ties"],
            "checkpoint": "all",
            "weight": {"low": 0.0, "high": 1.0},
            "density": {"low": 0.1, "high": 1.0},
        },
        "objectives": {
            "domain": {"suite": str(folder / "domain.yaml"), "metric": "bits_per_byte"},
            "general": {"suite": str(folder / "general.yaml"), "metric": "acc"},
        },
        "record": [str(folder / "extra.yaml")],
        "budget": {"trials": 6},
        "output": str(folder / "out"),
    }
