"""Packing: documents of any length laid end to end into rows of one length, none of their tokens lost.

A document that does not fit into what is left of a row goes on in the next one; each of its pieces is read by itself,
as far as attention and targets go. There is no padding, and no row is without its whole number of tokens. Which
documents, and how often, is `mixing`'s business; the rows are written once, in training order, memory-mapped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dapt_merge.corpus.config import CorpusConfig
from dapt_merge.corpus.mixing import Mix, interleaved, reading_order
from dapt_merge.corpus.tokens import TokenStore

_TOKENS_AT_ONCE = 2**20
_DATA = "data-00000-of-00001.arrow"


@dataclass(frozen=True)
class Layout:
    """The documents of all rows, laid end to end.

    Attributes:
        documents: indices into the token store, in reading order, int64 [reads].
        read: tokens of each that are read, int64 [reads].
        replay: which of them are replay, bool [reads].
    """

    documents: np.ndarray
    read: np.ndarray
    replay: np.ndarray


def lay_out(config: CorpusConfig, store: TokenStore, mix: Mix) -> Layout:
    """Decide the order of all documents."""
    chosen, reads, replay = [], [], []
    for number, (source, tokens) in enumerate(zip(config.sources, mix.tokens, strict=True)):
        documents = np.flatnonzero(store.sources == number)
        order, read = reading_order(store.lengths[documents], tokens, (config.seed, number))
        chosen.append(documents[order])
        reads.append(read)
        replay.append(np.full(len(order), source.role == "replay"))
    order = interleaved(reads)
    return Layout(np.concatenate(chosen)[order], np.concatenate(reads)[order], np.concatenate(replay)[order])


@dataclass(frozen=True)
class PackedCounts:
    """What packing did.

    Attributes:
        documents_read: documents laid down, repeated ones as often as they are read.
        documents_in_pieces: those of them that lie in more than one row.
        pieces: of all documents.
        targets: tokens that are predicted: all but the first of each piece.
        separators: end-of-sequence tokens among them.
    """

    documents_read: int
    documents_in_pieces: int
    pieces: int
    targets: int
    separators: int


def write_rows(
    layout: Layout,
    store: TokenStore,
    folder: Path,
    *,
    sequence_length: int,
    fingerprint: str,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> PackedCounts:
    """Write the rows as a data set folder of `datasets`: `input_ids`, `starts` (of pieces), `replay_tokens`.

    Args:
        layout: of the documents; its tokens are a whole number of rows.
        store: their tokens.
        folder: an empty folder.
        sequence_length: tokens in a row.
        fingerprint: of the data set, for `datasets`.
        on_progress: called with ("packing", rows done, rows in all).
    """
    import pyarrow

    ends = np.cumsum(layout.read)
    begins = ends - layout.read
    rows = int(ends[-1]) // sequence_length
    replay = _tokens_until(layout, np.arange(rows + 1) * sequence_length)
    schema = pyarrow.schema(
        {
            "input_ids": pyarrow.list_(pyarrow.int32()),
            "starts": pyarrow.list_(pyarrow.int32()),
            "replay_tokens": pyarrow.int32(),
        }
    )
    at_once = max(1, _TOKENS_AT_ONCE // sequence_length)
    pieces = 0
    with pyarrow.ipc.new_stream(str(folder / _DATA), schema) as writer:
        for first in range(0, rows, at_once):
            count = min(at_once, rows - first)
            ids = _tokens_between(layout, store, begins, first * sequence_length, (first + count) * sequence_length)
            starts = _starts(begins, first, count, sequence_length)
            pieces += sum(map(len, starts))
            offsets = np.arange(count + 1, dtype=np.int32) * sequence_length
            columns = [
                pyarrow.ListArray.from_arrays(offsets, ids),
                pyarrow.array(starts, type=schema.field("starts").type),
                np.diff(replay[first : first + count + 1]).astype(np.int32),
            ]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))
            if on_progress:
                on_progress("packing", first + count, rows)
    _describe(folder, fingerprint)
    crosses = begins // sequence_length != (ends - 1) // sequence_length
    whole = layout.read == store.lengths[layout.documents]
    return PackedCounts(
        documents_read=len(layout.documents),
        documents_in_pieces=int(crosses.sum()),
        pieces=pieces,
        targets=rows * sequence_length - pieces,
        separators=int(whole.sum()),
    )


def _tokens_until(layout: Layout, positions: np.ndarray) -> np.ndarray:
    """Return how many of the tokens before each position are replay, int64."""
    ends = np.concatenate([[0], np.cumsum(layout.read)])
    replay = np.concatenate([[0], np.cumsum(layout.read * layout.replay)])
    return np.interp(positions, ends, replay).round().astype(np.int64)


def _tokens_between(layout: Layout, store: TokenStore, begins: np.ndarray, start: int, end: int) -> np.ndarray:
    """Return the tokens of the stretch [start, end) of all documents laid end to end, int32."""
    ids = np.empty(end - start, dtype=np.int32)
    first = int(np.searchsorted(begins, start, side="right")) - 1
    last = int(np.searchsorted(begins, end, side="left"))
    some = slice(first, last)
    stretch = zip(begins[some].tolist(), layout.read[some].tolist(), layout.documents[some].tolist(), strict=True)
    for begin, read, document in stretch:
        low, high = max(begin, start), min(begin + read, end)
        ids[low - start : high - start] = store.document(document)[low - begin : high - begin]
    return ids


def _starts(begins: np.ndarray, first: int, count: int, length: int) -> list[np.ndarray]:
    """Return, for each row, where the pieces in it start."""
    edges = np.arange(first, first + count + 1) * length
    places = np.searchsorted(begins, edges)
    starts = []
    for row in range(count):
        inside = begins[places[row] : places[row + 1]] - edges[row]
        starts.append(np.union1d([0], inside).astype(np.int32))
    return starts


def _describe(folder: Path, fingerprint: str) -> None:
    """Write the two files that make a folder one that `datasets.load_from_disk` opens."""
    from datasets import Features, List, Value

    features = Features(
        {"input_ids": List(Value("int32")), "starts": List(Value("int32")), "replay_tokens": Value("int32")}
    )
    state: dict[str, Any] = {
        "_data_files": [{"filename": _DATA}],
        "_fingerprint": fingerprint.removeprefix("xxh3:"),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    about = {"citation": "", "description": "", "features": features.to_dict(), "homepage": "", "license": ""}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps(about), encoding="utf-8")
