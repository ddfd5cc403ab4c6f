"""Several processes of one run (`torchrun`, `accelerate launch`): who writes, and how they agree.

Training itself is divided by accelerate; this is for what happens around it: one process tokenises and writes while the
others wait, and what one of them decides (to stop, where to write) all of them do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from dapt_merge.atomic import atomic_folder

T = TypeVar("T")

# The others wait this long for the one that tokenises.
_PATIENCE = timedelta(hours=24)


def process_count() -> int:
    """Return how many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Say whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def connect() -> None:
    """Join the other processes, if there are any and it was not done before."""
    import torch
    import torch.distributed as group

    if process_count() == 1 or group.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # gloo beside nccl: what processes agree on are small objects on the CPU.
    group.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)


def agreed(value: T) -> T:
    """Return the main process's value in all of them."""
    import torch.distributed as group

    if process_count() == 1:
        return value
    box = [value]
    group.broadcast_object_list(box, src=0)
    return box[0]


def wait_for_all() -> None:
    """Return when every process has come here."""
    agreed(None)
    import torch.distributed as group

    if process_count() > 1:
        group.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process go through the block before the others."""
    if not is_main():
        agreed(None)
    yield
    if is_main():
        agreed(None)


@contextmanager
def shared_folder(final: Path) -> Iterator[Path]:
    """Yield one temporary folder to all processes; it becomes `final`, replacing it, when all have left the block."""
    if is_main():
        with atomic_folder(final, overwrite=True) as folder:
            agreed(folder)
            yield folder
            wait_for_all()
    else:
        yield agreed(final)
        wait_for_all()
    wait_for_all()
