"""A checkpoint seen with the rows of another vocabulary: embedding, head and its bias gathered by token.

The tables are filled a run of rows at a time, in the dtype that the rows have, and kept for as long as the checkpoint
is (`scratch`): no table is ever held in float32 for being read. Whatever has no row for each token is the checkpoint's
own, untouched. Which row is which, `alignment` says.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dapt_merge.checkpoints.alignment import MEAN, MEAN_OF_OWN, ZERO, Alignment
from dapt_merge.checkpoints.checkpoint import Checkpoint, TensorInfo
from dapt_merge.checkpoints.companions import with_moved_ids
from dapt_merge.checkpoints.groups import vocabulary_axis
from dapt_merge.checkpoints.scratch import scratch_tensor
from dapt_merge.tensors.dtypes import Dtype, at_least_float32
from dapt_merge.tensors.lazy_torch import torch
from dapt_merge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK_ELEMENTS = 1 << 21


def aligned_checkpoints(checkpoints: Mapping[str, Checkpoint], alignment: Alignment) -> dict[str, Checkpoint]:
    """Return reference → checkpoint with the output's rows; nothing is gathered until a table is read."""
    key = alignment.fingerprint()
    return {label: AlignedCheckpoint(checkpoints, label, alignment, key) for label in checkpoints}


class AlignedCheckpoint(Checkpoint):
    """One of several checkpoints with the vocabulary that an alignment gives them all.

    Its fingerprint and digests stay those of the checkpoint's own content: what the alignment adds, it says itself.
    """

    def __init__(self, checkpoints: Mapping[str, Checkpoint], label: str, alignment: Alignment, key: str) -> None:
        own = checkpoints[label]
        self._own, self._checkpoints, self._alignment, self._label_of_own = own, checkpoints, alignment, label
        places = alignment.places[label]
        self._axes = {
            name: axis
            for name, info in own.tensors.items()
            if (axis := vocabulary_axis(name)) is not None and axis < len(info.shape)
            # A table whose rows all stay where they are is read as it is stored.
            if info.shape[axis] != alignment.rows or not torch.equal(places, torch.arange(alignment.rows))
        }
        infos = [self._resized(info) if name in self._axes else info for name, info in own.tensors.items()]
        super().__init__(
            own.label,
            self._read,
            infos,
            folder=own.folder,
            config=_with_vocabulary(own.config, alignment.rows, alignment.moved_ids[label]),
            aliases=own.aliases,
            remarks=own.remarks,
        )
        self.vocabulary_key = key
        self.moved_ids = alignment.moved_ids[label]
        self.computed = own.computed - self._axes.keys()
        self._tables: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def stored_as(self, name: str) -> StoredTensor:
        """Return what is stored under exactly this name, with the rows that it is stored with."""
        return self._own.stored_as(name)

    def digest(self, name: str) -> bytes:
        """Return the hash of the tensor's bytes before its rows were aligned."""
        return self._own.digest(name)

    def fingerprint(self) -> str:
        """Return the fingerprint of the checkpoint's own content."""
        return self._own.fingerprint()

    def _read(self, name: str) -> Tensor | StoredTensor:
        if name not in self._axes:
            return self._own.stored(name)
        with self._lock:
            if name not in self._tables:
                self._tables[name] = self._gathered(name)
            return self._tables[name]

    def _resized(self, info: TensorInfo) -> TensorInfo:
        axis = self._axes[info.name]
        shape = (*info.shape[:axis], self._alignment.rows, *info.shape[axis + 1 :])
        dtype = self._dtype(info)
        nbytes = dtype.itemsize * math.prod(shape)
        return replace(
            info, dtype=dtype, shape=shape, nbytes=nbytes, file=None, stored_dtype=info.stored_dtype or info.dtype
        )

    def _dtype(self, info: TensorInfo) -> Dtype:
        """Return the narrowest dtype that holds every row as it is; means of several rows are float32 at least."""
        donors = self._alignment.donors[self._alignment.places[self._label_of_own] < 0].unique().tolist()
        dtype = at_least_float32(info.dtype) if MEAN in donors else info.dtype
        for donor in donors:
            other = self._donor(donor).tensors.get(info.name) if donor >= 0 else None
            if other is not None:
                dtype = Dtype.of(torch.promote_types(dtype.torch_dtype, other.dtype.torch_dtype))
        return dtype

    def _donor(self, position: int) -> Checkpoint:
        return list(self._checkpoints.values())[position]

    def _gathered(self, name: str) -> Tensor:
        info, axis = self.tensors[name], self._axes[name]
        result = scratch_tensor(info.shape, info.dtype)
        table = result.movedim(axis, 0)
        step = max(1, _CHUNK_ELEMENTS * table.shape[0] // max(1, table.numel()))
        for begin in range(0, table.shape[0], step):
            self._fill(table[begin : begin + step], slice(begin, begin + step), name, axis)
        padding = (self._alignment.donors == MEAN_OF_OWN) & (self._alignment.places[self._label_of_own] < 0)
        if bool(padding.any()):
            table[padding] = _mean_of_rows(table, self._alignment.tokens, step).to(info.dtype.torch_dtype)
        return result

    def _fill(self, target: Tensor, run: slice, name: str, axis: int) -> None:
        """Fill some rows: the model's own, then what the alignment gives for those that it lacks."""
        alignment = self._alignment
        missing = _copy_rows(target, self._own.read(name).movedim(axis, 0), alignment.places[self._label_of_own][run])
        if not bool(missing.any()):
            return
        donors = torch.where(missing, alignment.donors[run], torch.iinfo(torch.int64).min)
        target[missing] = 0
        for donor in donors[missing].unique().tolist():
            if donor == MEAN:
                self._add_mean(target, run, donors == MEAN, name, axis)
            elif donor not in (ZERO, MEAN_OF_OWN):
                wanted = torch.where(donors == donor, alignment.donor_rows[run], -1)
                _copy_rows(target, self._donor(donor).read(name).movedim(axis, 0), wanted)

    def _add_mean(self, target: Tensor, run: slice, wanted: Tensor, name: str, axis: int) -> None:
        count = torch.zeros(target.shape[0])
        for label, checkpoint in self._checkpoints.items():
            places = torch.where(wanted, self._alignment.places[label][run], -1)
            has = places >= 0
            if bool(has.any()):
                target[has] += checkpoint.read(name).movedim(axis, 0)[places[has]].to(target.dtype)
                count += has
        target[wanted] /= count[wanted].reshape(-1, *([1] * (target.dim() - 1)))


def _copy_rows(target: Tensor, source: Tensor, places: Tensor) -> Tensor:
    """Copy row `places[i]` of the source to row i where it has one; return which rows it has not."""
    has = (places >= 0) & (places < source.shape[0])
    if bool(has.all()) and bool((places.diff() == 1).all()):
        target.copy_(source[int(places[0]) : int(places[0]) + len(places)])
    elif bool(has.any()):
        target[has] = source[places[has]].to(target.dtype)
    return ~has


def _mean_of_rows(table: Tensor, tokens: Mapping[str, int], step: int) -> Tensor:
    """Return the mean of the rows that have a token: what a new padding row starts from."""
    total = torch.zeros(table.shape[1:], dtype=torch.float64)
    rows = torch.tensor(sorted(tokens.values()))
    for run in rows.split(step):
        total += table[run].double().sum(dim=0)
    return total / len(rows)


def _with_vocabulary(config: dict[str, Any], rows: int, moved_ids: Mapping[int, int | None]) -> dict[str, Any]:
    """Return the configuration with the number of rows and the ids of its special tokens brought up to date."""
    changed = with_moved_ids(config, moved_ids)
    if "vocab_size" in changed:
        changed["vocab_size"] = rows
    text = changed.get("text_config")
    return {**changed, "text_config": _with_vocabulary(text, rows, moved_ids)} if isinstance(text, dict) else changed
