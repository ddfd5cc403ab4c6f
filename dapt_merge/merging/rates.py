"""How fast this machine merged last, by method: what an estimate of the next merge goes by.

The idea: the time of a merge is that of moving its bytes, at a rate that depends on the method, the dtypes, the threads
and the machine, disk included. Every merge that is large enough to tell leaves its rate in a small file in the user's
cache; of a few, the median counts, since a machine may be busy. Nothing else is kept there. What this module does not
know: what a rate is used for.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from pathlib import Path
from typing import Any

from dapt_merge.atomic import write_text
from dapt_merge.checkpoints.dtypes import dtype_name
from dapt_merge.errors import InputError
from dapt_merge.merging.plan import MergePlan

# Below this a merge's time is that of opening and closing files.
_TELLING_BYTES = 256 * 2**20
_MOST_KEPT = 100
_OF_EACH = 5


def remember(plan: MergePlan, threads: int, moved_bytes: int, seconds: float) -> None:
    """Keep the rate of a merge that is done, unless it was too small to tell or the cache cannot be written."""
    if moved_bytes < _TELLING_BYTES or seconds <= 0:
        return
    kept = _read()
    key = _key(plan, threads)
    kept[key] = [*_rates(kept.pop(key, None)), moved_bytes / seconds][-_OF_EACH:]
    newest = dict(list(kept.items())[-_MOST_KEPT:])
    with contextlib.suppress(OSError, InputError):
        write_text(_file(), json.dumps(newest, indent=1) + "\n")


def recalled(plan: MergePlan, threads: int) -> float | None:
    """Return the bytes a second that the last merges of this kind read and wrote here; None without one."""
    found = _rates(_read().get(_key(plan, threads)))
    return statistics.median(found) if found else None


def _rates(kept: object) -> list[float]:
    return (
        [float(rate) for rate in kept if isinstance(rate, int | float) and rate > 0] if isinstance(kept, list) else []
    )


def _key(plan: MergePlan, threads: int) -> str:
    """Name what the speed depends on: method, number of checkpoints, their dtypes and the output's, threads."""
    dtypes = sorted({dtype_name(info.dtype) for c in plan.checkpoints.values() for info in c.tensors.values()})
    out = "mixed" if plan.main_dtype is None else dtype_name(plan.main_dtype)
    scope = plan.recipe.parameters.get("trim_scope", "tensor")
    parts = (plan.recipe.merge_method, str(scope), f"{len(plan.checkpoints)} models", "+".join(dtypes), out)
    return " ".join((*parts, f"{threads} threads"))


def _read() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dapt-merge" / "merge_rates.json"
