"""Tensors that are computed when they are read (adapters, means of a run), kept where they are read again and again.

A search reads every tensor hundreds of times. What fits into a share of the free memory is kept after its first
reading, the same tensors every time: with a fixed order of reading, throwing out the oldest would throw out all. The
rest is computed anew, so that memory stays bounded whatever the model's size. The values are the same either way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from dapt_merge.checkpoints.checkpoint import Checkpoint
from dapt_merge.tensors.stored import StoredTensor

_SHARE_OF_FREE_MEMORY = 0.25


def keep_computed(checkpoints: Mapping[str, Checkpoint], budget_bytes: int | None = None) -> dict[str, Checkpoint]:
    """Return the checkpoints, those with computed tensors keeping as many of them as fit into the budget together.

    Args:
        checkpoints: reference → checkpoint.
        budget_bytes: for all of them (default: a quarter of the memory that is free).
    """
    room = int(free_memory_bytes() * _SHARE_OF_FREE_MEMORY) if budget_bytes is None else budget_bytes
    found = {}
    for key, checkpoint in checkpoints.items():
        chosen = []
        for name in (name for name in checkpoint.tensors if name in checkpoint.computed):
            if checkpoint.tensors[name].nbytes <= room:
                room -= checkpoint.tensors[name].nbytes
                chosen.append(name)
        found[key] = checkpoint.with_reader(_keeping(checkpoint.stored_as, chosen)) if chosen else checkpoint
    return found


def _keeping(read: Callable[[str], StoredTensor], names: Iterable[str]) -> Callable[[str], StoredTensor]:
    wanted, kept = frozenset(names), dict[str, StoredTensor]()

    def read_or_recall(name: str) -> StoredTensor:
        if name not in wanted:
            return read(name)
        # Two threads may compute one tensor at once; both get the same bits, and one copy stays.
        return kept[name] if name in kept else kept.setdefault(name, read(name))

    return read_or_recall


def free_memory_bytes() -> int:
    """Return how much memory can be taken without swapping: what the system says, else half of all there is."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return 2 * 2**30
