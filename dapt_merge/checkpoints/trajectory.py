"""The checkpoints of one run, and their mean as a checkpoint of its own, computed tensor by tensor when it is read.

Averaging the end of a run stands in for decaying its learning rate (arXiv 2505.12082, 2507.17634). The mean is float32:
it is rounded only with the merge that it goes into. What this module does not know: recipes and merge methods.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from dapt_merge.checkpoints.checkpoint import Checkpoint, TensorInfo
from dapt_merge.errors import InputError
from dapt_merge.tensors.dtypes import at_least_float32
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def run_checkpoints(run: Path) -> list[Path]:
    """Return the complete `checkpoint-STEP` folders of a run by step; those without a number come last."""

    def step(folder: Path) -> float:
        digits = folder.name.removeprefix("checkpoint-")
        return int(digits) if digits.isdigit() else math.inf

    # A full model, or an adapter beside the base that it names.
    whole = ("config.json", "adapter_config.json")
    found = [folder for folder in run.glob("checkpoint-*") if any((folder / name).is_file() for name in whole)]
    return sorted(found, key=lambda folder: (step(folder), folder.name))


def mean_weights(count: int, *, window: int | None = None, decay: float | None = None) -> list[float]:
    """Return each checkpoint's share of the mean, oldest first; the shares add to 1.

    Args:
        count: how many checkpoints there are.
        window: only the last so many, equally; None: all.
        decay: instead: each checkpoint has this times the share of the one after it.

    Example:
        >>> mean_weights(4, window=2), mean_weights(2, decay=0.5)
        ([0.0, 0.0, 0.5, 0.5], [0.3333333333333333, 0.6666666666666666])
    """
    used = count if window is None else min(window, count)
    raw = [0.0] * (count - used) + [1.0] * used if decay is None else [decay ** (count - 1 - i) for i in range(count)]
    return [share / math.fsum(raw) for share in raw]


class AveragedCheckpoint(Checkpoint):
    """The weighted mean of checkpoints of one run; reading a tensor reads it from each of them, one at a time.

    Args:
        label: its name in errors and reports.
        members: the checkpoints, oldest first; configuration and companions are the last one's.
        weights: each one's share; they add to 1, and those with share 0 are not read.

    Raises:
        InputError: the members differ in their tensors' names or shapes.

    Example:
        >>> from dapt_merge.checkpoints import open_checkpoint
        >>> run = [open_checkpoint({"w": torch.tensor([value])}, "step") for value in (1.0, 3.0)]
        >>> AveragedCheckpoint("mean", run, [0.5, 0.5]).read("w")
        tensor([2.])
    """

    def __init__(self, label: str, members: Sequence[Checkpoint], weights: Sequence[float]) -> None:
        last = members[-1]
        self._members = [(member, share) for member, share in zip(members, weights, strict=True) if share]
        for member, _ in self._members:
            _refuse_other_tensors(member, last)
        infos = [_averaged(info) for info in last.tensors.values()]
        super().__init__(label, self._mean, infos, folder=last.folder, config=last.config, aliases=last.aliases)
        from_files = all(info.file is not None for member, _ in self._members for info in member.tensors.values())
        self.computed = frozenset(self.tensors) if from_files else frozenset()

    def digest(self, name: str) -> bytes:
        """Return the hash of what the mean of a tensor is computed from: shares and contents, in order."""
        total = xxhash.xxh3_128()
        for member, share in self._members:
            total.update(share.hex().encode() + member.digest(name))
        return total.digest()

    def _mean(self, name: str) -> Tensor:
        """Return θₙ + Σwᵢ(θᵢ − θₙ): near the end of a run all steps are small, and so is their rounding."""
        last = self._members[-1][0].read(name)
        if not last.is_floating_point():
            return last
        anchor = last.to(self.tensors[name].dtype.torch_dtype)
        moved = torch.zeros_like(anchor)
        for member, share in self._members[:-1]:
            moved.add_(torch.sub(member.read(name).to(anchor.dtype), anchor).mul_(share))
        return moved.add_(anchor)


def _averaged(info: TensorInfo) -> TensorInfo:
    dtype = at_least_float32(info.dtype) if info.dtype.is_floating_point else info.dtype
    return TensorInfo(info.name, dtype, info.shape, info.elements * dtype.itemsize)


def _refuse_other_tensors(member: Checkpoint, last: Checkpoint) -> None:
    shapes = {name: info.shape for name, info in member.tensors.items()}
    if shapes != {name: info.shape for name, info in last.tensors.items()}:
        raise InputError(
            f"the tensors of {member.label} and {last.label} differ in name or shape, so they have no mean",
            where=member.label,
            remedy="Average checkpoints of one run.",
        )
