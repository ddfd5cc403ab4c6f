"""A document, and what a record must be to become one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dapt_merge.errors import InputError, nearest


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


def file_label(file: Path) -> str:
    """Return the file's path as text that UTF-8 can hold, whatever bytes its name is made of."""
    return str(file).encode("utf-8", "replace").decode()


def no_field(field: str, known: list[str], where: str) -> InputError:
    """Return the error that a record has no such field, but others."""
    return InputError(
        f"there is no field '{field}'.{nearest(field, known)}",
        where=where,
        remedy=f"Set 'text_field' to the field that holds the text; here are: {', '.join(known) or 'none'}.",
    )


def checked_text(text: Any, field: str, where: str) -> str:
    """Return what a field holds.

    Raises:
        InputError: it is no text.
    """
    if not isinstance(text, str):
        raise InputError(
            f"the field '{field}' holds {'null' if text is None else f'a {type(text).__name__}'}, expected a text",
            where=where,
            remedy="Correct that record, or set 'text_field' to another field.",
        )
    return text
