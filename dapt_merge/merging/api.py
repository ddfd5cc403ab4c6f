"""The Python way to merge: name the models and the method, then save, load, or look at single tensors.

    merged = merge("base/", "dapt/", method="ties", weight=0.6, density=0.3)
    merged.save("out/")

Only headers are read until a result is asked for. What the parameters mean, the recipe knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapt_merge.checkpoints.checkpoint import Checkpoint, CheckpointSource
from dapt_merge.checkpoints.opening import open_checkpoint
from dapt_merge.checkpoints.threads import map_in_threads
from dapt_merge.checkpoints.writer import DEFAULT_SHARD_BYTES
from dapt_merge.errors import InputError, nearest
from dapt_merge.merging.live import model_from_config
from dapt_merge.merging.plan import MergePlan, TensorJob, plan_merge
from dapt_merge.merging.report import MergeReport, TensorOutcome, build_report
from dapt_merge.merging.resident import fill_model
from dapt_merge.merging.stream import merge_to_disk
from dapt_merge.merging.tensor import MergedTensor, merge_tensor
from dapt_merge.merging.trimming import settle_cutoffs
from dapt_merge.recipe import Recipe, load_recipe, make_recipe
from dapt_merge.tensors.dtypes import Dtype, parse_dtype
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def merge(
    base: CheckpointSource | None = None,
    dapt: CheckpointSource | Sequence[CheckpointSource] | None = None,
    method: str | None = None,
    *,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    seed: int | None = None,
    out_dtype: str | torch.dtype | None = None,
    **parameters: Any,
) -> LazyMerge:
    """Plan a merge; nothing is computed yet.

    Args:
        base: the base: a path, hub id, `PreTrainedModel`, state dict or open checkpoint.
        dapt: the DAPT checkpoint, or a list of them.
        method: linear, slerp, ties, …
        recipe: instead of the three above: a Recipe, the path of a recipe file, or a mapping of its keys.
        seed: of the random methods (default 0, or the recipe's).
        out_dtype: float32, bfloat16, float16 or float64 (default: the recipe's, else each tensor's dtype in the base).
        parameters: the method's, for example `weight=0.6`; a list gives one value to each DAPT checkpoint.

    Raises:
        InputError: inputs that cannot be opened or do not belong together, unknown methods or parameters.

    Example:
        >>> base, dapt = {"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([1.0, 2.0])}
        >>> merge(base, dapt, "linear", weight=0.5)["w"]
        tensor([0.5000, 2.0000])
    """
    opened: dict[str, Checkpoint] = {}
    if recipe is not None:
        if base is not None or dapt is not None or method is not None or parameters:
            raise InputError(
                "a recipe is given together with base, dapt, method or parameters",
                where="merge()",
                remedy="Give one or the other; change a recipe with load_recipe(path, ['key=value']).",
            )
        settled = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    else:
        settled, opened = _from_arguments(base, dapt, method, parameters)
    changes: dict[str, Any] = {} if seed is None else {"seed": seed}
    if out_dtype is not None:
        changes["out_dtype"] = parse_dtype(out_dtype).value
    if changes:
        settled = Recipe.model_validate(settled.model_dump() | changes)
    return LazyMerge(plan_merge(settled, opened))


class LazyMerge(Mapping[str, "Tensor"]):
    """A planned merge: a mapping from tensor names to merged tensors, each computed when it is asked for."""

    def __init__(self, plan: MergePlan) -> None:
        self.plan = plan
        self._jobs = {job.name: job for job in plan.jobs}
        self._report: MergeReport | None = None

    def save(
        self,
        out: str | Path,
        overwrite: bool = False,
        *,
        threads: int | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        on_progress: Callable[[int, int], None] | None = None,
        flush: bool = False,
    ) -> MergeReport:
        """Stream the merge into a Hugging Face folder; see `merge_to_disk`."""
        self._report = merge_to_disk(
            self.plan,
            out,
            overwrite=overwrite,
            threads=threads,
            shard_bytes=shard_bytes,
            on_progress=on_progress,
            flush=flush,
        )
        return self._report

    def to_model(self, dtype: str | torch.dtype | None = None) -> PreTrainedModel:
        """Return the merge as a model in memory, ready for evaluation.

        Args:
            dtype: of its parameters (default: the dtype of most of the output).

        Raises:
            InputError: the base has no configuration, or one that transformers cannot build without foreign code.
        """
        wanted = self.plan.main_dtype if dtype is None else parse_dtype(dtype)
        model = model_from_config(self.plan.config_from, (wanted or Dtype.FLOAT32).torch_dtype)
        self._report = fill_model(model, self.plan)
        return model

    def report(self) -> MergeReport:
        """Return the report of the last `save` or `to_model`; before any, of a merge that keeps no tensor."""
        if self._report is None:
            started = time.monotonic()
            outcomes = map_in_threads(
                lambda job: TensorOutcome.of(job, self._merged(job.name)), self.plan.jobs, lambda job: job.elements
            )
            inputs = {reference: c.fingerprint() for reference, c in self.plan.checkpoints.items()}
            seconds = time.monotonic() - started
            self._report = build_report(self.plan, outcomes, output=None, inputs=inputs, seconds=seconds)
        return self._report

    def keys(self) -> KeysView[str]:
        """The names of the merged tensors; a head tied to the embedding is not among them."""
        return self._jobs.keys()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._jobs:
            raise KeyError(f"no tensor '{name}'.{nearest(name, tuple(self._jobs))}")
        # Through the same pool as a whole merge: a sum over several cores would round differently.
        tensor = map_in_threads(lambda job: self._merged(job.name).tensor, [self._jobs[name]], lambda job: 1)[0]
        return tensor.clone()  # an exact end point is the input's own memory, which nobody may write to

    def __iter__(self) -> Iterator[str]:
        return iter(self._jobs)

    def __len__(self) -> int:
        return len(self._jobs)

    def __repr__(self) -> str:
        return f"LazyMerge({self.plan.recipe.merge_method}, {', '.join(self.plan.checkpoints)}, {len(self)} tensors)"

    @cached_property
    def _settled(self) -> dict[str, TensorJob]:
        return {job.name: job for job in settle_cutoffs(self.plan).jobs}

    def _merged(self, name: str) -> MergedTensor:
        return merge_tensor(self._settled[name], self.plan.read, self.plan.recipe.seed)


def _from_arguments(
    base: CheckpointSource | None,
    dapt: CheckpointSource | Sequence[CheckpointSource] | None,
    method: str | None,
    parameters: Mapping[str, Any],
) -> tuple[Recipe, dict[str, Checkpoint]]:
    if base is None or dapt is None or method is None:
        raise InputError(
            "base, dapt and method are all needed", where="merge()", remedy="Give the three, or recipe=… alone."
        )
    several: list[Any] = list(dapt) if isinstance(dapt, list | tuple) else [dapt]
    opened: dict[str, Checkpoint] = {}
    labels: list[str] = []
    for position, source in enumerate([base, *several]):
        fallback = "base" if position == 0 else "dapt" if len(several) == 1 else f"dapt-{position}"
        label = None if isinstance(source, str | Path) else fallback
        checkpoint = open_checkpoint(source, label, base=opened[labels[0]] if labels else None)
        by_path = isinstance(source, str | Path) or checkpoint.label not in opened
        labels.append(checkpoint.label if by_path else fallback)
        opened[labels[-1]] = checkpoint
    return make_recipe(labels[0], labels[1:], method, **parameters), opened
