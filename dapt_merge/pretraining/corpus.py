"""A corpus: JSON lines or plain text in, token ids with an end-of-sequence mark after every document out.

Tokens are kept in an Arrow file under a fingerprint of the text, the options and the tokenizer, and read from there
memory-mapped; a changed file is tokenised again. Nothing is cut: a document of any length is kept whole. Special
tokens that are spelled out in a text stay text. How documents become training blocks is `packing`'s business.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dapt_merge.atomic import atomic_folder
from dapt_merge.errors import InputError, nearest
from dapt_merge.pretraining.config import CorpusSource

JSON_LINES = (".jsonl", ".ndjson")
PLAIN_TEXT = (".txt", ".text", ".md")
_REMEDIES = {
    ".gz": "Unpack it first: gunzip FILE.",
    ".zst": "Unpack it first: zstd -d FILE.",
    ".json": "Write one JSON object a line: jq -c '.[]' FILE > FILE.jsonl.",
    ".parquet": "Convert it: datasets.Dataset.from_parquet(FILE).to_json('corpus.jsonl').",
    ".csv": "Convert it: datasets.Dataset.from_csv(FILE).to_json('corpus.jsonl').",
}
_DOCUMENTS_AT_ONCE = 1000
_CACHE_FORMAT = "1"


def corpus_files(source: CorpusSource) -> list[Path]:
    """Return the files of a source, sorted by name when it is a folder.

    Raises:
        InputError: nothing is there, a folder holds no `.jsonl` or `.txt`, a file is of another kind.
    """
    path = source.path.expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in JSON_LINES + PLAIN_TEXT)
        if not files:
            raise InputError(
                "the corpus folder holds no .jsonl or .txt file", where=path, remedy="Name the folder that holds them."
            )
        return files
    if not path.is_file():
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(
            f"there is no such corpus file.{nearest(path.name, siblings)}",
            where=path,
            remedy="Correct the path under 'corpus'.",
        )
    if path.suffix.lower() not in JSON_LINES + PLAIN_TEXT:
        raise InputError(
            f"a corpus file ends in {', '.join(JSON_LINES + PLAIN_TEXT)}; this one ends in '{path.suffix}'",
            where=path,
            remedy=_REMEDIES.get(path.suffix.lower(), "Convert it to JSON lines or plain text."),
        )
    return [path]


def read_documents(file: Path, text_field: str = "text", document: str = "file") -> Iterator[str]:
    """Yield the text of every document of a file, blank ones included.

    Raises:
        InputError: not UTF-8, binary, not JSON, no such field or no text in it; it names the file and the line.
    """
    if file.suffix.lower() in JSON_LINES:
        for number, line in _lines(file):
            if line.strip():
                yield _text_of(line, text_field, file, number)
    elif document == "file":
        yield "".join(line for _, line in _lines(file))
    elif document == "line":
        yield from (line for _, line in _lines(file))
    else:
        paragraph: list[str] = []
        for _, line in _lines(file):
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                yield "".join(paragraph)
                paragraph = []
        if paragraph:
            yield "".join(paragraph)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if number == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise _wrong_encoding(file, number, "it looks like UTF-16", "utf-16")
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if b"\0" in raw:
                raise InputError(
                    f"the file is binary, not text (a zero byte in line {number})",
                    where=f"{file}, line {number}",
                    remedy="Give UTF-8 text: .jsonl or .txt.",
                )
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                found = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
                raise _wrong_encoding(file, number, found, "latin1") from None


def _wrong_encoding(file: Path, line: int, found: str, likely: str) -> InputError:
    return InputError(
        f"the file is not UTF-8 text: {found}",
        where=f"{file}, line {line}",
        remedy=f"Convert it, for example: iconv -f {likely} -t utf-8 '{file.name}' > 'utf8-{file.name}'.",
    )


def _text_of(line: str, field: str, file: Path, number: int) -> str:
    where = f"{file}, line {number}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"the line is not valid JSON: {error.msg} at column {error.colno}",
            where=where,
            remedy="Correct or remove that line; every line is one JSON object.",
        ) from None
    if not isinstance(record, dict):
        raise InputError(
            f"the line holds a {type(record).__name__}, expected a JSON object",
            where=where,
            remedy=f'Write every document as {{"{field}": "…"}}.',
        )
    if field not in record:
        raise InputError(
            f"the line has no field '{field}'.{nearest(field, list(record))}",
            where=where,
            remedy=f"Set 'text_field' to the field that holds the text; here are: {', '.join(record) or 'none'}.",
        )
    text = record[field]
    if not isinstance(text, str):
        raise InputError(
            f"the field '{field}' holds a {type(text).__name__}, expected a text",
            where=where,
            remedy="Correct that line, or set 'text_field' to another field.",
        )
    return text


def content_fingerprint(source: CorpusSource) -> str:
    """Return `"xxh3:<32 hex digits>"` of the bytes of a source's files and of the options that decide its documents."""
    total = xxhash.xxh3_128(f"{source.text_field}\0{source.document}".encode())
    for file in corpus_files(source):
        total.update(f"\0{file.suffix.lower()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while part := stream.read(2**20):
                total.update(part)
    return f"xxh3:{total.hexdigest()}"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return `"xxh3:<32 hex digits>"` of what decides a text's token ids and the document separator."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = [type(tokenizer).__name__, tokenizer.eos_token_id, tokenizer.bos_token_id]
    special += [getattr(tokenizer, "add_bos_token", None), getattr(tokenizer, "add_eos_token", None)]
    return f"xxh3:{xxhash.xxh3_128(f'{special}{state}'.encode()).hexdigest()}"


@dataclass(frozen=True)
class TokenisedCorpus:
    """The documents of one source as token ids, memory-mapped. `lengths` counts the end-of-sequence token too."""

    lengths: np.ndarray
    empty_documents: int
    highest_id: int
    chunks: tuple[np.ndarray, ...]
    chunk_documents: np.ndarray
    starts: np.ndarray

    @property
    def documents(self) -> int:
        """How many documents hold text."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """How many tokens there are, separators included."""
        return int(self.lengths.sum())

    def document(self, index: int) -> np.ndarray:
        """Return the token ids of a document, int32, its end-of-sequence token last; a view."""
        chunk = int(np.searchsorted(self.chunk_documents, index, side="right")) - 1
        start = int(self.starts[index] - self.starts[self.chunk_documents[chunk]])
        return self.chunks[chunk][start : start + int(self.lengths[index])]


def tokenise(
    source: CorpusSource,
    tokenizer: Any,
    cache_folder: Path | None = None,
    on_documents: Callable[[int], None] | None = None,
) -> TokenisedCorpus:
    """Tokenise a source, or take its tokens from the cache.

    Args:
        source: where the texts are.
        tokenizer: a `transformers` tokenizer; the tokens that it puts before a text (a beginning-of-sequence mark) are
            kept, its end-of-sequence token ends every document.
        cache_folder: where token files are kept (default: `dapt-merge` in the cache folder of `datasets`).
        on_documents: called with the number of documents done so far.

    Raises:
        InputError: an unreadable source (see `read_documents`), one without any text, a tokenizer without an
            end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end-of-sequence token to put between documents",
            where=getattr(tokenizer, "name_or_path", None),
            remedy="Set eos_token in its tokenizer_config.json.",
        )
    if cache_folder is None:
        import datasets

        cache_folder = Path(datasets.config.HF_DATASETS_CACHE) / "dapt-merge"
    key = f"{_CACHE_FORMAT}\0{content_fingerprint(source)}\0{tokenizer_fingerprint(tokenizer)}"
    folder = cache_folder.expanduser() / xxhash.xxh3_128(key.encode()).hexdigest()
    if not (folder / "about.json").is_file():
        with atomic_folder(folder, overwrite=True) as temporary:
            _write_tokens(source, tokenizer, temporary, on_documents)
    return _read_tokens(folder)


def _write_tokens(
    source: CorpusSource, tokenizer: Any, folder: Path, on_documents: Callable[[int], None] | None
) -> None:
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({"input_ids": List(Value("int32"))})
    empty, done, highest_id = 0, 0, 0
    with ArrowWriter(features=features, path=str(folder / "tokens.arrow")) as writer:
        texts = (
            text for file in corpus_files(source) for text in read_documents(file, source.text_field, source.document)
        )
        while batch := list(islice(texts, _DOCUMENTS_AT_ONCE)):
            kept = [text for text in batch if text.strip()]
            empty += len(batch) - len(kept)
            rows = _token_rows(kept, tokenizer) if kept else []
            if rows:
                writer.write_batch({"input_ids": rows})
                highest_id = max(highest_id, max(max(row) for row in rows))
            done += len(batch)
            if on_documents:
                on_documents(done)
        if done == empty:
            raise InputError(
                "the corpus is empty: no document holds any text", where=source.path, remedy="Give one that does."
            )
        writer.finalize()
    (folder / "about.json").write_text(
        json.dumps({"empty_documents": empty, "highest_id": highest_id}), encoding="utf-8"
    )


def _token_rows(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    # Split special tokens: "<|im_end|>" in a web text is six characters of text, not the end of a turn.
    rows = tokenizer(list(texts), return_attention_mask=False, split_special_tokens=True, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [row if row and row[-1] == end else [*row, end] for row in rows]


def _read_tokens(folder: Path) -> TokenisedCorpus:
    from datasets import Dataset

    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    column = Dataset.from_file(str(folder / "tokens.arrow")).data.column("input_ids")
    lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]).astype(np.int64)
    return TokenisedCorpus(
        lengths=lengths,
        empty_documents=about["empty_documents"],
        highest_id=about["highest_id"],
        chunks=tuple(chunk.flatten().to_numpy() for chunk in column.chunks),
        chunk_documents=np.cumsum([0, *(len(chunk) for chunk in column.chunks)])[:-1],
        starts=np.cumsum(lengths) - lengths,
    )
