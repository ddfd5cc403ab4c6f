"""How much may be left in the page cache for the kernel to write later, without anyone being made to wait for it.

The idea: the kernel begins to write on its own when what it holds reaches a limit, and slows writers down at a higher
one. Below the first limit, and within a share of the memory that is available, bytes cost a copy and nothing more. What
this module does not know: who writes, and whether the disk could keep up without it. Where nothing can be read of all
this (another system than Linux), the room is none.
"""

from __future__ import annotations

from pathlib import Path

_SHARE_OF_AVAILABLE = 4
# In a group of processes with a bound of its own, the inputs' pages count as well.
_SHARE_OF_GROUP = 8
_MEMORY = Path("/proc/meminfo")
_LIMITS = Path("/proc/sys/vm")
_GROUP = Path("/sys/fs/cgroup/memory.max")


def page_cache_room() -> int:
    """Return how many bytes fit into the page cache before the kernel begins to write them of its own accord."""
    try:
        memory = _memory_bytes()
        dirtyable = memory["MemFree"] + memory["Active(file)"] + memory["Inactive(file)"]
        limit = _limit("dirty_background_bytes") or dirtyable * _limit("dirty_background_ratio") // 100
        room = min(limit - memory["Dirty"] - memory["Writeback"], memory["MemAvailable"] // _SHARE_OF_AVAILABLE)
    except (OSError, ValueError, KeyError):
        return 0
    return max(0, min(room, _group_bytes(room)))


def _memory_bytes() -> dict[str, int]:
    rows = (line.split() for line in _MEMORY.read_text(encoding="ascii").splitlines())
    return {row[0].rstrip(":"): 1024 * int(row[1]) for row in rows if len(row) == 3}


def _limit(name: str) -> int:
    return int((_LIMITS / name).read_text(encoding="ascii"))


def _group_bytes(otherwise: int) -> int:
    try:
        return int(_GROUP.read_text(encoding="ascii")) // _SHARE_OF_GROUP
    except (OSError, ValueError):  # no group, or one without a bound ("max")
        return otherwise
