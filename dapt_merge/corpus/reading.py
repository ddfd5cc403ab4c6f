"""Documents out of files of many kinds, one after another, in bounded memory; what cannot be read is named.

JSON lines, plain text (both also gzipped), Parquet, folders of these, folders of `datasets` and data sets of the hub
all become the same thing: a text, the file it is in, and its line or row there. Nothing is repaired or left out here;
blank documents come too, so that somebody can count them.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import xxhash

from dapt_merge.corpus.config import CorpusSource
from dapt_merge.errors import InputError, nearest

JSON_LINES = (".jsonl", ".ndjson")
PLAIN_TEXT = (".txt", ".text", ".md")
PARQUET = (".parquet",)
READABLE = JSON_LINES + PLAIN_TEXT + PARQUET
# Memory is bounded by the longest document; one beyond this is a file without line ends, not a document.
LONGEST_DOCUMENT_BYTES = 64 * 2**20
_ROWS_AT_ONCE = 1000
_REMEDIES = {
    ".zst": "Unpack it first: zstd -d FILE.",
    ".json": "Write one JSON object a line: jq -c '.[]' FILE > FILE.jsonl.",
    ".csv": "Convert it: datasets.Dataset.from_csv(FILE).to_json('corpus.jsonl').",
    ".pdf": "Extract its text first, for example: pdftotext FILE.",
    ".arrow": "Name the folder that it is in: the one that save_to_disk wrote.",
}
_DISGUISES = {
    b"\x1f\x8b": ("a gzip file", "Name it FILE.gz."),
    b"PAR1": ("a Parquet file", "Name it FILE.parquet."),
    b"PK\x03\x04": ("a zip archive", "Unpack it first: unzip FILE."),
    b"%PDF": ("a PDF file", "Extract its text first, for example: pdftotext FILE."),
    b"\xff\xfe": ("UTF-16 text", "Convert it, for example: iconv -f utf-16 -t utf-8 FILE > utf8-FILE."),
    b"\xfe\xff": ("UTF-16 text", "Convert it, for example: iconv -f utf-16 -t utf-8 FILE > utf8-FILE."),
}


class Document(NamedTuple):
    """A text and where it stands.

    Attributes:
        text: as it is in the file.
        file: the file, or the data set.
        number: its line (JSON lines, plain text), its row (from 1 on) elsewhere.
    """

    text: str
    file: str
    number: int

    @property
    def place(self) -> str:
        """`file:line`."""
        return f"{self.file}:{self.number}"


def read_source(source: CorpusSource) -> Iterator[Document]:
    """Yield every document of a source, blank ones included, always in the same order.

    Raises:
        InputError: nothing is there, or it cannot be read: it names the file, the line or row, and the remedy.
    """
    if source.path is None:
        yield from _hub_rows(source)
        return
    path = source.path.expanduser()
    if is_dataset_folder(path):
        yield from _dataset_rows(source, path)
        return
    for file in source_files(source):
        yield from read_file(file, source.text_field, source.document)


def source_files(source: CorpusSource) -> list[Path]:
    """Return the files of a source of files, in the order in which they are read.

    Raises:
        InputError: nothing is there, a folder holds no readable file, a file is of another kind.
    """
    assert source.path is not None
    path = source.path.expanduser()
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if _suffix(file) in READABLE
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not files:
            raise InputError(
                f"the corpus folder holds no readable file ({', '.join(READABLE)})",
                where=path,
                remedy="Name the folder that holds them.",
            )
        return files
    if not path.is_file():
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(
            f"there is no such corpus file.{nearest(path.name, siblings)}",
            where=path,
            remedy="Correct the path under 'corpus'.",
        )
    if _suffix(path) not in READABLE:
        raise InputError(
            f"a corpus file ends in {', '.join(READABLE)}; this one ends in '{path.suffix}'",
            where=path,
            remedy=_REMEDIES.get(path.suffix.lower(), "Convert it to JSON lines or plain text."),
        )
    return [path]


def _suffix(file: Path) -> str:
    """Return what kind of file it is by name; gzip only wraps JSON lines and text."""
    suffix = file.suffix.lower()
    if suffix == ".gz":
        inner = Path(file.stem).suffix.lower()
        return inner if inner in JSON_LINES + PLAIN_TEXT else suffix
    return suffix


def read_file(file: Path, text_field: str = "text", document: str = "file") -> Iterator[Document]:
    """Yield the documents of one file; arguments as in `CorpusSource`.

    Raises:
        InputError: not what its name says, not UTF-8, binary, not JSON, no such field, no text in it, a document
            longer than 64 MiB; it names the file and the line.
    """
    kind, label = _suffix(file), _label(file)
    if kind in PARQUET:
        yield from _parquet_rows(file, text_field)
    elif kind in JSON_LINES:
        for number, line in _lines(file):
            if line.strip():
                yield Document(_text_of_line(line, text_field, file, number), label, number)
    elif document == "line":
        for number, line in _lines(file):
            yield Document(line.rstrip("\r\n"), label, number)
    else:
        yield from _joined_lines(file, whole=document == "file")


def _label(file: Path) -> str:
    """Return the file's path as text that UTF-8 can hold, whatever bytes its name is made of."""
    return str(file).encode("utf-8", "replace").decode()


def _joined_lines(file: Path, *, whole: bool) -> Iterator[Document]:
    """Yield a text file whole, or its paragraphs."""
    gathered: list[str] = []
    first, size, label = 0, 0, _label(file)
    for number, line in _lines(file):
        if whole or line.strip():
            first = first if gathered else number
            gathered.append(line)
            size += len(line)
            if size > LONGEST_DOCUMENT_BYTES:
                raise _too_long(file, first, "Set 'document' to 'paragraph' or 'line'.")
        elif gathered:
            yield Document("".join(gathered), label, first)
            gathered, size = [], 0
    if gathered or whole:
        yield Document("".join(gathered), label, max(first, 1))


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        with _opened(file) as stream:
            number = 0
            while raw := stream.readline(LONGEST_DOCUMENT_BYTES + 1):
                number += 1
                yield number, _decoded(raw, file, number)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"the gzip file is broken: {error}", where=file, remedy="Fetch or make it again; check it with gzip -t."
        ) from None
    except OSError as error:
        raise InputError(
            f"the file cannot be read ({error.strerror or error})", where=file, remedy="Check the file and its rights."
        ) from None


def _opened(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb")  # type: ignore[return-value]


def _decoded(raw: bytes, file: Path, number: int) -> str:
    where = f"{file}, line {number}"
    if number == 1:
        for start, (kind, remedy) in _DISGUISES.items():
            if raw.startswith(start):
                raise InputError(
                    f"the file's content is {kind}, not UTF-8 text",
                    where=where,
                    remedy=remedy.replace("FILE", file.name),
                )
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    if len(raw) > LONGEST_DOCUMENT_BYTES:
        remedy = "Write one JSON object a line: jq -c '.[]' FILE > FILE.jsonl." if _suffix(file) in JSON_LINES else ""
        raise _too_long(file, number, remedy or "Break it into lines, one document or paragraph each.")
    if b"\0" in raw:
        raise InputError(
            f"the file is binary, not text (a zero byte in line {number})",
            where=where,
            remedy="Give UTF-8 text: .jsonl or .txt.",
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the file is not UTF-8 text: byte 0x{raw[error.start]:02x} at column {error.start + 1}",
            where=where,
            remedy=f"Convert it, for example: iconv -f latin1 -t utf-8 '{file.name}' > 'utf8-{file.name}'.",
        ) from None


def _too_long(file: Path, number: int, remedy: str) -> InputError:
    return InputError(
        f"a document is longer than {LONGEST_DOCUMENT_BYTES // 2**20} MiB: the line or file has no end where one "
        "was expected",
        where=f"{file}, line {number}",
        remedy=remedy,
    )


def _text_of_line(line: str, field: str, file: Path, number: int) -> str:
    where = f"{file}, line {number}"
    try:
        # Without its end, so that a value that is missing is told in its column and not on the next line.
        record = json.loads(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"the line is not valid JSON: {error.msg} at column {error.colno}",
            where=where,
            remedy="Correct or remove that line; every line is one JSON object.",
        ) from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"the line is not usable JSON: {error}", where=where, remedy="Correct that line.") from None
    if not isinstance(record, dict):
        raise InputError(
            f"the line holds a {type(record).__name__}, expected a JSON object",
            where=where,
            remedy=f'Write every document as {{"{field}": "…"}}.',
        )
    if field not in record:
        raise _no_field(field, list(record), where)
    return _checked_text(record[field], field, where)


def _no_field(field: str, known: list[str], where: str) -> InputError:
    return InputError(
        f"there is no field '{field}'.{nearest(field, known)}",
        where=where,
        remedy=f"Set 'text_field' to the field that holds the text; here are: {', '.join(known) or 'none'}.",
    )


def _checked_text(text: Any, field: str, where: str) -> str:
    if not isinstance(text, str):
        raise InputError(
            f"the field '{field}' holds a {type(text).__name__}, expected a text",
            where=where,
            remedy="Correct that record, or set 'text_field' to another field.",
        )
    return text


def _parquet_rows(file: Path, field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file, memory_map=True) as table:
            if field not in table.schema_arrow.names:
                raise _no_field(field, list(table.schema_arrow.names), str(file))
            number = 0
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield Document(_checked_text(value, field, f"{file}, row {number}"), _label(file), number)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"the Parquet file cannot be read ({_first_line(error)})", where=file, remedy="Fetch or make it again."
        ) from None


def is_dataset_folder(path: Path) -> bool:
    """Say whether `datasets` wrote this folder with `save_to_disk`."""
    return path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _dataset_rows(source: CorpusSource, path: Path) -> Iterator[Document]:
    import datasets

    try:
        rows = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a broken folder makes of pyarrow, json or datasets
        raise InputError(
            f"the data set folder cannot be opened ({_first_line(error)})", where=path, remedy="Save it again."
        ) from None
    if isinstance(rows, datasets.DatasetDict):
        if source.split not in rows:
            raise InputError(
                f"the data set has no split '{source.split}'.{nearest(source.split, list(rows))}",
                where=path,
                remedy=f"Set 'split' to one of: {', '.join(rows)}.",
            )
        rows = rows[source.split]
    if source.text_field not in rows.column_names:
        raise _no_field(source.text_field, rows.column_names, str(path))
    yield from _rows(rows.select_columns([source.text_field]), source.text_field, str(path))


def _hub_rows(source: CorpusSource) -> Iterator[Document]:
    label = f"{source.hub} ({source.split})"
    rows = _hub_dataset(source)
    if rows.column_names is not None and source.text_field not in rows.column_names:
        raise _no_field(source.text_field, rows.column_names, label)
    yield from _rows(rows, source.text_field, label)


def _hub_dataset(source: CorpusSource) -> Any:
    """Open a hub data set as a stream; offline, from the cache of `datasets`, memory-mapped."""
    import datasets

    try:
        return datasets.load_dataset(source.hub, source.subset, split=source.split, streaming=not is_offline())
    except Exception as error:  # the network, the hub, a loading script, a missing split: the user can mend each
        offline = " (offline: HF_HUB_OFFLINE is set)" if is_offline() else ""
        raise InputError(
            f"the hub data set cannot be opened{offline}: {type(error).__name__}: {_first_line(error)}",
            where=source.place,
            remedy="Check its name, subset and split; offline, load it once with the network on.",
        ) from None


def is_offline() -> bool:
    """Say whether the hub may not be asked."""
    import datasets

    return bool(datasets.config.HF_HUB_OFFLINE)


def _rows(rows: Any, field: str, label: str) -> Iterator[Document]:
    for number, row in enumerate(rows, start=1):
        if field not in row:
            raise _no_field(field, list(row), f"{label}, row {number}")
        yield Document(_checked_text(row[field], field, f"{label}, row {number}"), label, number)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def content_fingerprint(source: CorpusSource) -> str:
    """Return `"xxh3:<32 hex digits>"` of what a source's documents are made of, and of the options that decide them.

    Files are told by their bytes, not by their names; a hub data set by the version that the hub names.
    """
    total = xxhash.xxh3_128(f"{source.text_field}\0{source.document}".encode())
    if source.path is None:
        total.update(f"\0{source.hub}\0{source.subset}\0{source.split}\0{_hub_version(source)}".encode())
        return f"xxh3:{total.hexdigest()}"
    path = source.path.expanduser()
    if is_dataset_folder(path):
        total.update(f"\0{source.split}".encode())
        files = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        files = source_files(source)
    for file in files:
        total.update(f"\0{_suffix(file)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while part := stream.read(2**20):
                total.update(part)
    return f"xxh3:{total.hexdigest()}"


def _hub_version(source: CorpusSource) -> str:
    import datasets

    try:
        builder = datasets.load_dataset_builder(source.hub, source.subset)
    except Exception as error:  # see _hub_dataset
        raise InputError(
            f"the hub data set cannot be opened: {type(error).__name__}: {_first_line(error)}",
            where=source.place,
            remedy="Check its name and subset; offline, load it once with the network on.",
        ) from None
    return f"{builder.config_id}\0{builder.hash}\0{builder.config.version}"


def bytes_of(source: CorpusSource) -> int:
    """Return the size of a source's files in bytes; 0 where it is not known."""
    if source.path is None:
        return 0
    path = source.path.expanduser()
    files = [file for file in path.rglob("*") if file.is_file()] if is_dataset_folder(path) else source_files(source)
    return sum(os.stat(file).st_size for file in files)
