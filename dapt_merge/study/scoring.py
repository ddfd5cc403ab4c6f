"""Recipes scored on one live model: merged in memory, never through the disk, and no recipe twice.

The idea: the base is loaded once, its weights are overwritten by each trial's merge, and lm-eval's tasks and requests
are built once. Item scores go to the study's item store under the recipe's fingerprint, so that equal recipes, a trial
that was killed half-way, and a later report all share them. What this module does not know: spaces and trials.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from dapt_merge.evaluation.items import TaskItems
    from dapt_merge.evaluation.suites import Suite
    from dapt_merge.recipe import Recipe

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RecipeScores:
    """What one recipe scored: per-item records, the store's key, and what the merge had to say."""

    items: Mapping[str, TaskItems]
    model_key: str
    notes: Mapping[str, Any] = field(default_factory=dict)
    merge_seconds: float = 0.0
    score_seconds: float = 0.0


class RecipeScorer(Protocol):
    """What a study needs of the thing that scores its recipes."""

    def fingerprints(self) -> Mapping[str, str]:
        """Return the content fingerprint of every checkpoint by its path."""

    def dtype_name(self) -> str:
        """Return the dtype that the model is evaluated in."""

    def tasks(self) -> Mapping[str, Mapping[str, str]]:
        """Return the version of each task of each suite: suite → task → version."""

    def score(self, recipe: Recipe, on_progress: Progress | None = None) -> RecipeScores:
        """Merge and score."""


class LiveModel:
    """The base model in memory, ready to become any recipe over the given checkpoints.

    Opening reads headers only; the model and the tasks are loaded by the first call that needs them.

    Args:
        base: folder of the base.
        checkpoints: folders of the DAPT checkpoints.
        suites: what every recipe is scored on.
        items_path: the item store's file, None for none.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        device: a torch device; None takes the first GPU, or the CPU.
    """

    def __init__(
        self,
        base: str,
        checkpoints: Sequence[str],
        suites: Sequence[Suite],
        items_path: Path | None = None,
        *,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        limit: int | None = None,
    ) -> None:
        from dapt_merge.checkpoints import open_checkpoint

        self.base = base
        self.suites = list(suites)
        self.checkpoints = {folder: open_checkpoint(folder) for folder in (base, *checkpoints)}
        self._items_path = items_path
        self._device = device
        self._dtype = evaluation_dtype(dtype, device)
        self._options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "limit": limit}
        self._loaded: tuple[Any, Any, Any] | None = None

    def fingerprints(self) -> dict[str, str]:
        """Return the content fingerprint of every checkpoint by its path; reads them whole the first time."""
        return {folder: checkpoint.fingerprint() for folder, checkpoint in self.checkpoints.items()}

    def dtype_name(self) -> str:
        """Return the dtype that the model is evaluated in."""
        return self._dtype

    def tasks(self) -> dict[str, dict[str, str]]:
        """Return the version of each task of each suite (groups and tags resolved): suite → task → version."""
        scorer = self._load()[1]
        return {
            suite.name: {task: scorer.versions[task] for task in scorer.suite_tasks[suite.name]}
            for suite in self.suites
        }

    def score(self, recipe: Recipe, on_progress: Progress | None = None) -> RecipeScores:
        """Merge `recipe` into the live model and score it, unless an equal recipe has been scored before.

        Raises:
            InputError: the merge or a task refuses its input.
        """
        from dapt_merge.recipe import recipe_fingerprint

        inputs = {reference: self.checkpoints[reference].fingerprint() for reference in recipe.references()}
        model_key = recipe_fingerprint(recipe, inputs)
        merger, scorer, store = self._load()
        started = time.monotonic()
        # With every item in the store the weights are not needed, and stay as they are.
        notes = {} if _all_stored(scorer, store, model_key) else _merge_notes(merger.apply(recipe))
        merged = time.monotonic()
        items = scorer.score(model_key, store, on_progress)
        if scorer.truncated:
            notes["truncated"] = dict(scorer.truncated)
        return RecipeScores(items, model_key, notes, merged - started, time.monotonic() - merged)

    def _load(self) -> tuple[Any, Any, Any]:
        """Load the model, build the merger and the tasks; once."""
        if self._loaded is None:
            from dapt_merge.evaluation import ItemStore, Scorer, load_causal_lm, load_tokenizer
            from dapt_merge.merging import ResidentMerger

            model = load_causal_lm(self.base, dtype=self.dtype_name(), device=self._device)
            tokenizer = load_tokenizer(self.base)
            merger = ResidentMerger(model, self.checkpoints)
            scorer = Scorer(self.suites, model, tokenizer, **self._options)
            store = None if self._items_path is None else ItemStore(self._items_path)
            self._loaded = merger, scorer, store
        return self._loaded


def _all_stored(scorer: Any, store: Any, model_key: str) -> bool:
    return store is not None and all(
        store.get_all(model_key, task, version, settings=scorer.settings) for task, version in scorer.versions.items()
    )


def _merge_notes(report: Any) -> dict[str, Any]:
    """Keep of a merge report what tells trials apart: fallbacks, updates lost to rounding, warnings."""
    plain = report.to_dict()
    return {key: plain[key] for key in ("fallbacks", "lost_share", "warnings") if plain.get(key)}


def evaluation_dtype(dtype: str, device: str | None) -> str:
    """Return the dtype that `auto` stands for: bfloat16 on a GPU and on CPUs with fast units for it, else float32.

    A merge evaluated in bfloat16 has passed the same rounding as one exported in bfloat16.
    """
    import torch

    if dtype != "auto":
        return dtype
    if (device is None and torch.cuda.is_available()) or (device or "").startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if fast else "float32"
