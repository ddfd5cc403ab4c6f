"""A corpus that was built: packed rows in training order, memory-mapped, and the manifest of what is in them.

The folder is an ordinary data set of `datasets` (`train/`, which `datasets.load_from_disk` opens too) beside
`manifest.json` and `manifest.md`. On disk a row holds its tokens and where the pieces of documents in it start;
targets and positions are made from these when a row is read. How rows come about is `packing`'s business.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dapt_merge.atomic import atomic_folder
from dapt_merge.errors import InputError

IGNORED = -100
MANIFEST = "manifest.json"
TRAIN = "train"


@dataclass(frozen=True)
class BuiltCorpus:
    """A built corpus.

    Attributes:
        folder: where it is.
        train: a memory-mapped `datasets.Dataset`; row i is the i-th sequence of training. `train[i]` holds int64
            tensors of [sequence_length]: `input_ids`, `labels` (−100 where nothing before a token could tell it) and,
            with `attention: document`, `position_ids` that start again at 0 in every document. `train[[i, j]]` holds
            the same with a leading dimension. transformers keeps documents apart by `position_ids` only with
            `use_cache=False`, without an `attention_mask` and, with flash attention, for one row at a time.
        manifest: `manifest.json`.
    """

    folder: Path
    train: Any
    manifest: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.train)

    @property
    def sequence_length(self) -> int:
        """Tokens in a row."""
        return int(self.manifest["packing"]["sequence_length"])

    @property
    def highest_id(self) -> int:
        """The highest token id, to compare with a model's vocabulary."""
        return int(self.manifest["tokens"]["highest_id"])

    @property
    def fingerprint(self) -> str:
        """`"xxh3:…"` of everything that decides the rows: texts, steps, tokenizer, shares, length, seed."""
        return str(self.manifest["fingerprint"])

    def tokens_by_role(self, rows: int) -> dict[str, int]:
        """Return how many tokens of the first `rows` rows are domain and how many are replay."""
        replay = int(self._replay_until[rows])
        return {"domain": rows * self.sequence_length - replay, "replay": replay}

    def copy_account(self, folder: Path) -> None:
        """Write the manifest and the lists of documents, without the rows, to a folder; what is there goes."""
        with atomic_folder(folder, overwrite=True) as temporary:
            for file in self.folder.iterdir():
                if file.is_file():
                    shutil.copyfile(file, temporary / file.name)

    @cached_property
    def _replay_until(self) -> np.ndarray:
        column = self.train.data.column("replay_tokens").to_numpy()
        return np.concatenate([[0], np.cumsum(column, dtype=np.int64)])


def open_corpus(folder: str | Path) -> BuiltCorpus:
    """Open a corpus that `build_corpus` wrote.

    Raises:
        InputError: the folder holds none.
    """
    import datasets

    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        rows = datasets.load_from_disk(str(folder / TRAIN))
        apart = manifest["packing"]["attention"] == "document"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"this is no built corpus ({str(error).strip().splitlines()[0]})",
            where=folder,
            remedy="Build one: dapt-merge corpus build CONFIG.yaml -o FOLDER.",
        ) from None
    return BuiltCorpus(folder, rows.with_transform(_Expansion(apart)), manifest)


@dataclass(frozen=True)
class _Expansion:
    """Makes what a model is given from what is stored; a class, so that loader processes can receive it."""

    documents_apart: bool

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        import torch

        ids = np.asarray(batch["input_ids"], dtype=np.int64)
        labels = ids.copy()
        expanded = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if self.documents_apart:
            positions = np.stack([positions_of(starts, ids.shape[1]) for starts in batch["starts"]])
            labels[positions == 0] = IGNORED
            expanded["position_ids"] = torch.from_numpy(positions)
        return expanded


def positions_of(starts: Any, length: int) -> np.ndarray:
    """Return each token's place in its piece, int64 [length].

    Args:
        starts: where the pieces start, ascending; the first is 0.
        length: tokens in the row.

    Example:
        >>> positions_of([0, 3], 5)
        array([0, 1, 2, 0, 1])
    """
    starts = np.asarray(starts, dtype=np.int64)
    sizes = np.diff(starts, append=length)
    return np.arange(length, dtype=np.int64) - np.repeat(starts, sizes)
