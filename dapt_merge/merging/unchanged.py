"""Inputs that stay as they are while they are read: a merge of half the old file and half the new is nobody's model.

The idea: weight files are mapped, not copied, so whoever changes one changes what is being merged. Their identity is
noted at the start and looked at again before every tensor and at the end. What this module does not know: how tensors
are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from dapt_merge.errors import InputError

Identity: TypeAlias = tuple[int, int, int, int]


def identity(file: Path) -> Identity:
    """Return what changes when a file is replaced or written to: inode, size, times of content and of status."""
    status = os.stat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class Unchanged:
    """Files as they are when this object is made.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     Unchanged([Path(file.name)]).check()
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._noted = {file: identity(file) for file in dict.fromkeys(files)}

    def check(self) -> None:
        """Look again.

        Raises:
            InputError: a file is gone, or another than it was.
        """
        for file, noted in self._noted.items():
            try:
                found = identity(file)
            except OSError as error:
                raise InputError(
                    f"an input vanished while it was being merged ({error.strerror})",
                    where=file,
                    remedy="Bring it back, and run the same command again.",
                ) from error
            # Another link to the file, or one fewer, changes the time of its status and nothing that is read.
            if found[:3] != noted[:3]:
                raise InputError(
                    "an input was changed while it was being merged",
                    where=file,
                    remedy="Wait until it is complete, and run the same command again.",
                )
