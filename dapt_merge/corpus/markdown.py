"""Markdown for texts of all kinds: tables that any text keeps whole, and code that shows what cannot be seen."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], alignment: str) -> str:
    """Return a table; `alignment` holds an `l` or `r` for every column."""
    rule = ["---:" if side == "r" else "---" for side in alignment]
    cells = [[cell(part) for part in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *cells]) + "\n"


def cell(text: str) -> str:
    """Return a text that stays within its cell of a table."""
    return text.replace("\\|", "|").replace("|", "\\|").replace("\n", "⏎")


def code(text: str) -> str:
    """Return a text as code, with something to see for every character that cannot be seen."""
    return f"`{''.join(map(_visible, text))}`"


def _visible(character: str) -> str:
    """Return a character, or what stands for one that cannot be seen."""
    if character in "\n`":
        return {"\n": "⏎", "`": "ˋ"}[character]
    kind = unicodedata.category(character)
    if kind == "Cc":
        return chr(0x2400 + ord(character)) if ord(character) < 32 else f"[U+{ord(character):04X}]"
    if kind.startswith("M"):
        return f"◌{character}"
    return f"[U+{ord(character):04X}]" if kind in ("Cf", "Zl", "Zp", "Co", "Cn") or character == "\u00a0" else character


def counted_documents(count: int) -> str:
    """Return `1 document`, `2 documents`."""
    return f"{count:,} document" if count == 1 else f"{count:,} documents"
