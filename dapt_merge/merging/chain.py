"""Recipes that use each other's outputs, carried out one after another; only the last output is kept.

The others lie in a temporary folder beside it while they are needed. Each is an ordinary merge; the order is settled in
`recipe.chain`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dapt_merge.atomic import disk_errors_explained, refuse_existing
from dapt_merge.checkpoints.checkpoint import Checkpoint
from dapt_merge.checkpoints.opening import open_checkpoint
from dapt_merge.merging.mergekit_engine import merge_with_mergekit
from dapt_merge.merging.plan import plan_merge
from dapt_merge.merging.report import MergeReport
from dapt_merge.merging.stream import merge_to_disk
from dapt_merge.recipe import NamedRecipe


def merge_chain(
    chain: Sequence[NamedRecipe],
    out: str | Path,
    *,
    engine: Literal["native", "mergekit"] = "native",
    overwrite: bool = False,
    threads: int | None = None,
    measure_copy: bool = False,
    device: str = "cpu",
    flush: bool = False,
    on_warnings: Callable[[Iterable[str], str | None], None] = lambda warnings, name: None,
    on_progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge recipes in the order given, and write the last one's output as `out`.

    Args:
        chain: from `load_recipes`: each after those that it uses.
        out: the folder to create. Its `recipe.yaml` holds all recipes; its report is the last one's, with the other
            outputs among the inputs, by content, and how they were made.
        engine: whose code merges: ours, or mergekit's (see `mergekit_engine`), which tells no progress.
        overwrite: replace an existing output, once the new one is complete.
        threads, measure_copy, device, flush: see `merge_to_disk`; outputs on the way are never waited for.
        on_warnings: called with (warnings, recipe's name) before and after each merge.
        on_progress: called with (elements merged, elements in all) of the recipe at work.

    Raises:
        InputError: as `plan_merge` and `merge_to_disk`. Outputs on the way are removed in any case.
    """
    refuse_existing(out, overwrite)
    made: dict[str, Checkpoint] = {}
    account: list[dict[str, Any]] = []
    steps: Path | None = None
    try:
        for number, step in enumerate(chain):
            is_last = number == len(chain) - 1
            if not is_last and steps is None:
                steps = _folder_beside(Path(out))
            target = Path(out) if is_last or steps is None else steps / f"{number}"
            kept: dict[str, Any] = {
                "overwrite": overwrite and is_last,
                "recipe_text": _all_recipes(chain) if is_last and len(chain) > 1 else None,
                "steps": account,
            }
            if engine == "mergekit":
                report = merge_with_mergekit(step.recipe, target, given=_folders(made), **kept)
            else:
                plan = plan_merge(step.recipe, made)
                on_warnings(plan.warnings, step.name)
                report = merge_to_disk(
                    plan,
                    target,
                    threads=threads,
                    measure_copy=measure_copy,
                    device=device,
                    flush=flush and is_last,
                    on_progress=on_progress,
                    **kept,
                )
            on_warnings(report.warnings, step.name)
            if not is_last and step.name is not None:
                made[step.name] = open_checkpoint(target, step.name)
                account.append(report.as_step(step.name))
        return report
    finally:
        if steps is not None:
            shutil.rmtree(steps, ignore_errors=True)


def _folders(made: Mapping[str, Checkpoint]) -> dict[str, Path]:
    return {name: checkpoint.folder for name, checkpoint in made.items() if checkpoint.folder is not None}


def _folder_beside(out: Path) -> Path:
    parent = out.resolve().parent
    with disk_errors_explained(out):
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{out.name}.steps-", dir=parent))


def _all_recipes(chain: Sequence[NamedRecipe]) -> str:
    return "---\n".join(("" if s.name is None else f"name: {s.name}\n") + s.recipe.to_yaml() for s in chain)
