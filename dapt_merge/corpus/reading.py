"""Documents out of files of many kinds, one after another, in bounded memory; what cannot be read is named.

JSON lines, plain text (both also gzipped: `text_files`), Parquet, folders of these, folders of `datasets` and data sets
of the hub (`tables`) all become the same thing: a text, the file it is in, and its line or row there. Nothing is
repaired or left out here; blank documents come too, so that somebody can count them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import xxhash

from dapt_merge.corpus.config import CorpusSource
from dapt_merge.corpus.records import Document
from dapt_merge.corpus.tables import dataset_rows, hub_rows, hub_version, is_dataset_folder, parquet_rows
from dapt_merge.corpus.text_files import JSON_LINES, PLAIN_TEXT, json_lines, kind_by_name, plain_text, unreadable
from dapt_merge.errors import InputError, nearest

PARQUET = (".parquet",)
READABLE = JSON_LINES + PLAIN_TEXT + PARQUET
_REMEDIES = {
    ".zst": "Unpack it first: zstd -d FILE.",
    ".json": "Write one JSON object a line: jq -c '.[]' OLD.json > NEW.jsonl.",
    ".csv": "Convert it: datasets.Dataset.from_csv(FILE).to_json('corpus.jsonl').",
    ".pdf": "Extract its text first, for example: pdftotext FILE.",
    ".arrow": "Name the folder that it is in: the one that save_to_disk wrote.",
}


def read_source(source: CorpusSource) -> Iterator[Document]:
    """Yield every document of a source, blank ones included, always in the same order.

    Raises:
        InputError: nothing is there, or it cannot be read: it names the file, the line or row, and the remedy.
    """
    if source.path is None:
        yield from hub_rows(source)
        return
    path = source.path.expanduser()
    if is_dataset_folder(path):
        yield from dataset_rows(source, path)
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
            if kind_by_name(file) in READABLE
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
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"the corpus file is a link to nothing ({os.readlink(path)})", where=path, remedy="Link it again."
        )
    if not path.is_file():
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(
            f"there is no such corpus file.{nearest(path.name, siblings)}",
            where=path,
            remedy="Correct the path of the source.",
        )
    if kind_by_name(path) not in READABLE:
        raise InputError(
            f"a corpus file ends in {', '.join(READABLE)}; this one ends in '{path.suffix}'",
            where=path,
            remedy=_REMEDIES.get(path.suffix.lower(), "Convert it to JSON lines or plain text."),
        )
    return [path]


def read_file(file: Path, text_field: str = "text", document: str = "file") -> Iterator[Document]:
    """Yield the documents of one file; arguments as in `CorpusSource`.

    Raises:
        InputError: not what its name says, not UTF-8, binary, not JSON, no such field, no text in it, a document
            longer than 64 MiB; it names the file and the line.
    """
    kind = kind_by_name(file)
    if kind in PARQUET:
        yield from parquet_rows(file, text_field)
    elif kind in JSON_LINES:
        yield from json_lines(file, text_field)
    else:
        yield from plain_text(file, document)


def content_fingerprint(source: CorpusSource) -> str:
    """Return `"xxh3:<32 hex digits>"` of what a source's documents are made of, and of the options that decide them.

    Files are told by their bytes, not by their names; a hub data set by the version that the hub names.
    """
    total = xxhash.xxh3_128(f"{source.text_field}\0{source.document}".encode())
    if source.path is None:
        total.update(f"\0{source.hub}\0{source.subset}\0{source.split}\0{hub_version(source)}".encode())
        return f"xxh3:{total.hexdigest()}"
    path = source.path.expanduser()
    if is_dataset_folder(path):
        total.update(f"\0{source.split}".encode())
        files = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        files = source_files(source)
    for file in files:
        total.update(f"\0{kind_by_name(file)}\0{file.stat().st_size}\0".encode())
        try:
            with file.open("rb") as stream:
                while part := stream.read(2**20):
                    total.update(part)
        except OSError as error:
            raise unreadable(file, error) from None
    return f"xxh3:{total.hexdigest()}"


def bytes_of(source: CorpusSource) -> int:
    """Return the size of a source's files in bytes; 0 where it is not known."""
    if source.path is None:
        return 0
    path = source.path.expanduser()
    files = [file for file in path.rglob("*") if file.is_file()] if is_dataset_folder(path) else source_files(source)
    return sum(os.stat(file).st_size for file in files)
