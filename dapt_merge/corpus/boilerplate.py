"""Lines that many documents repeat: counted over the whole corpus on disk, then taken out of every document.

A footer, a notice or a menu is told by nothing in the line itself, only by how many documents it stands in. A first
pass writes one 64-bit hash a line and document into files by their leading bits, which are then counted one by one, so
the memory needed is a small part of the hashes and never the lines. A document that is a single line is text, however
often it occurs: that is `duplicates`' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from dapt_merge.corpus.config import Boilerplate

_PARTS_BITS = 6
_HELD_HASHES = 2**18


class LineCounter:
    """Counts in how many documents each line stands; see the module.

    Args:
        folder: an empty folder for the hashes.
        settings: from how many documents on a line is boilerplate, and which lines are long enough to be.
    """

    def __init__(self, folder: Path, settings: Boilerplate) -> None:
        self._folder, self._settings = folder, settings
        self._held: list[int] = []

    def add(self, text: str) -> None:
        """Count the lines of one document, each once."""
        lines = text.splitlines()
        if len(lines) > 1:
            self._held.extend({line_hash(line) for line in lines if _counts(line, self._settings)})
        if len(self._held) >= _HELD_HASHES:
            self._write()

    def _write(self) -> None:
        hashes = np.sort(np.array(self._held, dtype=np.uint64))
        edges = np.arange(2**_PARTS_BITS, dtype=np.uint64) << np.uint64(64 - _PARTS_BITS)
        for part, chunk in enumerate(np.split(hashes, np.searchsorted(hashes, edges)[1:])):
            with (self._folder / f"lines-{part:02}").open("ab") as file:
                chunk.tofile(file)
        self._held.clear()

    def repeated(self) -> np.ndarray:
        """Return the sorted hashes of the lines that are boilerplate, uint64."""
        self._write()
        found = []
        for file in sorted(self._folder.glob("lines-*")):
            hashes, counts = np.unique(np.fromfile(file, dtype=np.uint64), return_counts=True)
            found.append(hashes[counts >= self._settings.documents])
            file.unlink()
        return np.concatenate(found)


def line_hash(line: str) -> int:
    """Return the 64-bit hash of a line, blind to case and to spaces at its ends."""
    return xxhash.xxh3_64_intdigest(line.strip().casefold().encode("utf-8", "surrogatepass"))


def _counts(line: str, settings: Boilerplate) -> bool:
    return len(line.strip()) >= settings.minimum_characters


def without_boilerplate(text: str, repeated: np.ndarray, settings: Boilerplate) -> tuple[str, Sequence[str]]:
    """Return a text without its repeated lines, and these lines.

    Args:
        text: a document.
        repeated: sorted hashes, from `LineCounter.repeated`.
        settings: those that the hashes were counted with.
    """
    lines = text.splitlines()
    if len(lines) < 2 or not len(repeated):
        return text, ()
    hashes = np.array([line_hash(line) if _counts(line, settings) else 0 for line in lines], dtype=np.uint64)
    places = np.searchsorted(repeated, hashes).clip(max=len(repeated) - 1)
    is_repeated = (repeated[places] == hashes) & (hashes != 0)
    if not is_repeated.any():
        return text, ()
    kept = "\n".join(line for line, gone in zip(lines, is_repeated, strict=True) if not gone)
    return kept, [line.strip() for line, gone in zip(lines, is_repeated, strict=True) if gone]
