"""Documents out of JSON lines and plain text, as they are or gzipped, line by line; what cannot be read is named."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dapt_merge.corpus.records import Document, checked_text, file_label, no_field
from dapt_merge.errors import InputError

JSON_LINES = (".jsonl", ".ndjson")
PLAIN_TEXT = (".txt", ".text", ".md")
# Memory is bounded by the longest document; one beyond this is a file without line ends, not a document.
LONGEST_DOCUMENT_BYTES = 64 * 2**20
_DISGUISES = {
    b"\x1f\x8b": ("a gzip file", "Name it FILE.gz."),
    b"PAR1": ("a Parquet file", "Name it FILE.parquet."),
    b"PK\x03\x04": ("a zip archive", "Unpack it first: unzip FILE."),
    b"%PDF": ("a PDF file", "Extract its text first, for example: pdftotext FILE."),
    b"\xff\xfe": ("UTF-16 text", "Convert it, for example: iconv -f utf-16 -t utf-8 FILE > utf8-FILE."),
    b"\xfe\xff": ("UTF-16 text", "Convert it, for example: iconv -f utf-16 -t utf-8 FILE > utf8-FILE."),
}
_CONTROL = re.compile(rb"[\x01-\x08\x0e-\x1a\x7f]")


def kind_by_name(file: Path) -> str:
    """Return what kind of file it is by name; gzip only wraps JSON lines and text."""
    suffix = file.suffix.lower()
    if suffix == ".gz":
        inner = Path(file.stem).suffix.lower()
        return inner if inner in JSON_LINES + PLAIN_TEXT else suffix
    return suffix


def json_lines(file: Path, text_field: str) -> Iterator[Document]:
    """Yield the document of every line that is not blank."""
    label = file_label(file)
    for number, line in _lines(file):
        if line.strip():
            yield Document(_text_of_line(line, text_field, file, number), label, number)


def plain_text(file: Path, document: str) -> Iterator[Document]:
    """Yield the documents of a text file; `document` as in `CorpusSource`."""
    if document == "line":
        label = file_label(file)
        for number, line in _lines(file):
            yield Document(line.rstrip("\r\n"), label, number)
    else:
        yield from _joined_lines(file, whole=document == "file")


def _joined_lines(file: Path, *, whole: bool) -> Iterator[Document]:
    """Yield a text file whole, or its paragraphs."""
    gathered: list[str] = []
    first, size, label = 0, 0, file_label(file)
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
        raise unreadable(file, error) from None


def unreadable(file: Path, error: OSError) -> InputError:
    """Return the error that the system does not let a file be read."""
    return InputError(
        f"the file cannot be read ({error.strerror or error})", where=file, remedy="Check the file and its rights."
    )


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
        remedy = (
            "Write one JSON object a line: jq -c '.[]' OLD > NEW.jsonl." if kind_by_name(file) in JSON_LINES else ""
        )
        raise _too_long(file, number, remedy or "Break it into lines, one document or paragraph each.")
    if b"\0" in raw:
        raise _binary("a zero byte", where)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if _CONTROL.search(raw):
            raise _binary("control characters, and not UTF-8", where) from None
        raise InputError(
            f"the file is not UTF-8 text: byte 0x{raw[error.start]:02x} at column {error.start + 1}",
            where=where,
            remedy=f"Convert it, for example: iconv -f latin1 -t utf-8 '{file.name}' > 'utf8-{file.name}'.",
        ) from None


def _binary(sign: str, where: str) -> InputError:
    return InputError(
        f"the file is binary, not text ({sign} in this line)", where=where, remedy="Give UTF-8 text: .jsonl or .txt."
    )


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
            f"the line is not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}",
            where=where,
            remedy=_remedy(line, number, "Correct or remove that line; every line is one JSON object."),
        ) from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"the line is not usable JSON: {error}", where=where, remedy="Correct that line.") from None
    if not isinstance(record, dict):
        raise InputError(
            f"the line holds a {type(record).__name__}, expected a JSON object",
            where=where,
            remedy=_remedy(line, number, f'Write every document as {{"{field}": "…"}}.'),
        )
    if field not in record:
        raise no_field(field, list(record), where)
    return checked_text(record[field], field, where)


def _remedy(line: str, number: int, otherwise: str) -> str:
    """Return what to do about a line that is no JSON object: the first one tells how the whole file is written."""
    if number == 1 and line.startswith("["):
        return "The file is one JSON list; write its objects one a line: jq -c '.[]' OLD > NEW.jsonl."
    if number == 1 and line.rstrip() == "{":
        return "Its objects lie over several lines; write each on one: jq -c . OLD > NEW.jsonl."
    if number == 1 and not line.lstrip().startswith("{"):
        return "Every line is one JSON object; if this is plain text, name it .txt."
    return otherwise
