"""Documents as token ids, made once, in parallel, and kept memory-mapped under what decides them.

Every document ends with the tokenizer's end-of-sequence token. Nothing is cut: a document of any length is one row.
Special tokens that are spelled out in a text stay text. How documents become rows to train on is `packing`'s business.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dapt_merge.atomic import atomic_folder
from dapt_merge.corpus.documents import DocumentStore
from dapt_merge.corpus.parallel import ordered_map, usable_cores
from dapt_merge.errors import InputError

_FORMAT = "2"
_DOCUMENTS_AT_ONCE = 200
_WORTH_PROCESSES = 2000


@dataclass(frozen=True)
class TokenStore:
    """The documents of a corpus as token ids, memory-mapped.

    Attributes:
        lengths: tokens of each document, its end-of-sequence token too, int64 [documents].
        sources: the number of each document's source, int32 [documents].
        highest_id: the highest id that occurs.
        fingerprint: of the documents and the tokenizer.
    """

    lengths: np.ndarray
    sources: np.ndarray
    highest_id: int
    fingerprint: str
    _values: tuple[np.ndarray, ...]
    _chunks: np.ndarray
    _starts: np.ndarray

    def document(self, index: int) -> np.ndarray:
        """Return the token ids of a document, int32, its end-of-sequence token last; a view."""
        start = int(self._starts[index])
        return self._values[self._chunks[index]][start : start + int(self.lengths[index])]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return `"xxh3:<32 hex digits>"` of what decides a text's token ids and the document separator."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = [type(tokenizer).__name__, tokenizer.eos_token_id, tokenizer.bos_token_id]
    special += [getattr(tokenizer, "add_bos_token", None), getattr(tokenizer, "add_eos_token", None)]
    return f"xxh3:{xxhash.xxh3_128(f'{special}{state}'.encode()).hexdigest()}"


def tokens_fingerprint(documents_fingerprint: str, tokenizer: Any) -> str:
    """Return what names the tokens of a corpus."""
    key = f"{_FORMAT}\0{documents_fingerprint}\0{tokenizer_fingerprint(tokenizer)}"
    return f"xxh3:{xxhash.xxh3_128_hexdigest(key.encode())}"


def require_separator(tokenizer: Any) -> None:
    """Raise InputError when a tokenizer has nothing to put between documents."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end-of-sequence token to put between documents",
            where=getattr(tokenizer, "name_or_path", None),
            remedy="Set eos_token in its tokenizer_config.json.",
        )


def store_tokens(
    documents: DocumentStore,
    tokenizer: Any,
    cache_folder: Path,
    *,
    processes: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> TokenStore:
    """Tokenise the documents, or open the tokens made before.

    Args:
        documents: of the corpus.
        tokenizer: a `transformers` tokenizer; the tokens that it puts before a text (a beginning-of-sequence mark) are
            kept, its end-of-sequence token ends every document.
        cache_folder: where tokens are kept.
        processes: how many tokenise at once (default: one for each usable core).
        on_progress: called with ("tokenising", done, total) documents.

    Raises:
        InputError: a tokenizer without an end-of-sequence token.
    """
    require_separator(tokenizer)
    fingerprint = tokens_fingerprint(documents.fingerprint, tokenizer)
    folder = cache_folder / f"tokens-{fingerprint.removeprefix('xxh3:')}"
    if not (folder / "about.json").is_file():
        with atomic_folder(folder, overwrite=True) as temporary:
            _write(documents, tokenizer, temporary, processes, on_progress or (lambda *_: None))
    return _opened(folder, np.asarray(documents.sources), fingerprint)


def _write(
    documents: DocumentStore, tokenizer: Any, folder: Path, processes: int | None, on_progress: Callable[..., None]
) -> None:
    import pyarrow

    rows = documents.rows().select_columns(["text"])
    total, done, highest = len(rows), 0, 0
    on_progress("tokenising", 0, total)
    many = total >= _WORTH_PROCESSES
    starts = range(0, total, _DOCUMENTS_AT_ONCE)
    schema = pyarrow.schema({"input_ids": pyarrow.list_(pyarrow.int32())})
    with pyarrow.ipc.new_stream(str(folder / "tokens.arrow"), schema) as writer:
        count = (processes or usable_cores()) if many else 1
        for values, offsets in ordered_map(_token_rows, starts, count, _prepare_process, (rows, tokenizer, count)):
            column = pyarrow.ListArray.from_arrays(offsets, values)
            writer.write_batch(pyarrow.record_batch([column], schema=schema))
            highest = max(highest, int(values.max()))
            done += len(offsets) - 1
            on_progress("tokenising", done, total)
    (folder / "about.json").write_text(json.dumps({"highest_id": highest}), encoding="utf-8")


_rows: Any
_tokenizer: Any


def _prepare_process(rows: Any, tokenizer: Any, processes: int) -> None:
    global _rows, _tokenizer
    _rows, _tokenizer = rows, tokenizer
    if processes > 1:
        # Each process has a core of its own; the tokenizer's threads would fight over them.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _token_rows(start: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise a stretch of documents; return their ids laid end to end, and where each starts (and the last ends)."""
    texts = _rows[start : start + _DOCUMENTS_AT_ONCE]["text"]
    # Split special tokens: "<|im_end|>" in a web text is six characters of text, not the end of a turn.
    found = _tokenizer(texts, return_attention_mask=False, split_special_tokens=True, verbose=False)["input_ids"]
    end = _tokenizer.eos_token_id
    parts = [np.array(ids if ids and ids[-1] == end else [*ids, end], dtype=np.int32) for ids in found]
    return np.concatenate(parts), np.cumsum([0, *(len(part) for part in parts)], dtype=np.int32)


def _opened(folder: Path, sources: np.ndarray, fingerprint: str) -> TokenStore:
    import pyarrow

    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    with pyarrow.memory_map(str(folder / "tokens.arrow")) as file:
        columns = [batch.column(0) for batch in pyarrow.ipc.open_stream(file)]
    offsets = [column.offsets.to_numpy() for column in columns]
    return TokenStore(
        lengths=np.concatenate([np.diff(found) for found in offsets]).astype(np.int64),
        sources=sources,
        highest_id=about["highest_id"],
        fingerprint=fingerprint,
        _values=tuple(column.values.to_numpy() for column in columns),
        _chunks=np.repeat(np.arange(len(columns), dtype=np.int32), [len(column) for column in columns]),
        _starts=np.concatenate([found[:-1] for found in offsets]).astype(np.int64),
    )


def encoded_documents(texts: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    """Yield the token ids of texts, one after another, the end-of-sequence token last where the tokenizer has one."""
    for text in texts:
        if text.strip():
            ids = list(tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"])
            end = tokenizer.eos_token_id
            yield ids if end is None or (ids and ids[-1] == end) else [*ids, end]
