"""How fast this machine merged last, by method, and copied: what the next merge is estimated by and held against.

The idea: the time of a merge is that of moving its bytes, at a rate that depends on the method, the dtypes, the threads
and the machine, disk included, and on whether the disk is waited for. Every merge that is large enough to tell leaves
its rate in a small file in the user's cache; of a few, the median counts, since a machine may be busy. The speed of
copying is kept beside them, for a day. Nothing else is kept there. What this module does not know: what a rate is used
for.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from dapt_merge.atomic import write_text
from dapt_merge.errors import InputError
from dapt_merge.merging.plan import MergePlan

# Below this a merge's time is that of opening and closing files.
_TELLING_BYTES = 256 * 2**20
_MOST_KEPT = 100
_OF_EACH = 5
_DAY_SECONDS = 24 * 60 * 60


def remember(plan: MergePlan, threads: int, moved_bytes: int, seconds: float, *, flush: bool = False) -> None:
    """Keep the rate of a merge that is done, unless it was too small to tell or the cache cannot be written."""
    if moved_bytes < _TELLING_BYTES or seconds <= 0:
        return
    kept = _read()
    key = _key(plan, threads, flush)
    rates = [*_rates(kept.pop(key, None)), moved_bytes / seconds][-_OF_EACH:]
    _write({**kept, key: rates})


def recalled(plan: MergePlan, threads: int, *, flush: bool = False) -> float | None:
    """Return the bytes a second that the last merges of this kind read and wrote here; None without one."""
    found = _rates(_read().get(_key(plan, threads, flush)))
    return statistics.median(found) if found else None


def remember_copying(kind: str, seconds_per_byte: float) -> None:
    """Keep how long copying of some kind takes for a byte, unless the cache cannot be written."""
    kept = _read()
    kept.pop(f"copying {kind}", None)
    _write({**kept, f"copying {kind}": {"seconds_per_byte": seconds_per_byte, "at": time.time()}})


def recalled_copying(kind: str) -> float | None:
    """Return the seconds a byte that copying of this kind took within the last day; None when nobody tried."""
    match _read().get(f"copying {kind}"):
        case {"seconds_per_byte": int() | float() as found, "at": int() | float() as at}:
            return float(found) if found > 0 and 0 <= time.time() - at < _DAY_SECONDS else None
    return None


def _rates(kept: object) -> list[float]:
    return (
        [float(rate) for rate in kept if isinstance(rate, int | float) and rate > 0] if isinstance(kept, list) else []
    )


def _key(plan: MergePlan, threads: int, flush: bool) -> str:
    """Name what the speed depends on: method, number of checkpoints, dtypes, threads, who waits for the disk."""
    dtypes = sorted({info.dtype.value for c in plan.checkpoints.values() for info in c.tensors.values()})
    out = "mixed" if plan.main_dtype is None else plan.main_dtype.value
    scope = plan.recipe.parameters.get("trim_scope", "tensor")
    parts = (plan.recipe.merge_method, str(scope), f"{len(plan.checkpoints)} models", "+".join(dtypes), out)
    return " ".join((*parts, f"{threads} threads", waiting(flush)))


def waiting(flush: bool) -> str:
    """Say in a word whether a merge waits for the disk."""
    return "flushed" if flush else "unflushed"


def _write(kept: dict[str, Any]) -> None:
    newest = dict(list(kept.items())[-_MOST_KEPT:])
    with contextlib.suppress(OSError, InputError):
        write_text(_file(), json.dumps(newest, indent=1) + "\n")


def _read() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dapt-merge" / "merge_rates.json"
