"""Inputs read and hashed while the libraries load: importing them keeps one core busy for a while, the others idle.

The idea: a thread walks through the weight files that a command names, so that they lie in the page cache when the work
begins, and remembers the hash of every tensor's bytes, which the work would have to compute, and the map of the file,
whose pages the work would have to ask for again. It is a head start and nothing else: a file that cannot be read is
passed over, since whoever opens it properly will say what is wrong, and hash and map count only for the very file that
they were taken from. What this module does not know: torch, checkpoints, recipes.
"""

from __future__ import annotations

import mmap
import os
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from dapt_merge.tensors.safetensors_header import entries

_AHEAD_BYTES = 2 * 2**20
_TEXTS = (".yaml", ".yml", ".json")
_OUTPUT_FLAGS = ("-o", "--out")
_FileKey: TypeAlias = tuple[int, int, int, int]

_digests: dict[tuple[_FileKey, str], bytes] = {}
_maps: dict[_FileKey, mmap.mmap] = {}
_stopping = threading.Event()


def start_for_arguments(arguments: Sequence[str]) -> None:
    """Begin to read what the words after a command may name: model folders, weight files, recipes with their models.

    What an output's name may stand for is left alone.
    """
    words = [word for before, word in zip(["", *arguments], arguments, strict=False) if before not in _OUTPUT_FLAGS]
    places = [Path(word.rpartition("=")[2]) for word in words if not word.startswith(("-o", "--out="))]
    start([found for place in places for found in (_named_in(place) if place.suffix in _TEXTS else [place])])


def start(sources: Iterable[str | Path]) -> None:
    """Begin to read, in a thread, the weights of those sources that are model folders or safetensors files."""
    files = [file for source in sources for file in _weight_files(Path(source).expanduser())]
    if files:
        _stopping.clear()
        threading.Thread(target=_read, args=(list(dict.fromkeys(files)),), name="prefetch", daemon=True).start()


def stop() -> None:
    """End the reading ahead: from now on the work itself decides what is read."""
    _stopping.set()


def known_digest(file: Path, name: str) -> bytes | None:
    """Return the XXH3 128-bit digest of a tensor's bytes if it was taken from the file as it is now."""
    if not _digests:
        return None
    try:
        return _digests.get((_file_key(os.stat(file)), name))
    except OSError:
        return None


def mapped(file: Path) -> mmap.mmap | None:
    """Return the private and writable map of a file, if there is one of the file as it is now."""
    if not _maps:
        return None
    try:
        return _maps.get(_file_key(os.stat(file)))
    except OSError:
        return None


def _named_in(recipe: Path) -> list[Path]:
    """Return the models that a recipe file may mean: every word in it that could be a folder or a weight file."""
    try:
        words = dict.fromkeys(re.findall(r"[^\s'\"\[\]{},+]+", recipe.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return []
    return [place for word in words for place in (Path(word), recipe.parent / word) if "/" in word or "." not in word]


def _weight_files(source: Path) -> list[Path]:
    if source.suffix == ".safetensors" and source.is_file():
        return [source]
    return sorted(source.glob("model*.safetensors")) if source.is_dir() else []


def _file_key(status: os.stat_result) -> _FileKey:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read(files: list[Path]) -> None:
    import xxhash

    for file in files:
        try:
            with open(file, "rb", buffering=0) as opened:
                key = _file_key(os.fstat(opened.fileno()))
                found = _maps[key] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
                with memoryview(found) as content:
                    for entry in entries(content):
                        _ask_for(opened.fileno(), entry.begin, entry.end)
                        if _stopping.is_set():
                            return
                        with content[entry.begin : entry.end] as stored:
                            _digests[key, entry.name] = xxhash.xxh3_128(stored).digest()
        except (OSError, ValueError, TypeError, KeyError):
            continue


def _ask_for(descriptor: int, begin: int, end: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, begin, end - begin + _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
