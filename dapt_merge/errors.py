"""What a user is told when something is wrong: what, where, and what to do.

Every error that a user can cause or meet (a wrong path, a truncated file, a full disk, a dead run) is one of
these two classes, so that the command line prints three short lines instead of a traceback. Anything else that
escapes is a bug in this package.
"""

from __future__ import annotations

from pathlib import Path


class DaptMergeError(Exception):
    """The work failed after it was rightly asked for (exit code 1).

    Args:
        what: one sentence that states the fault and the values involved ("found …, expected …").
        where: the file, key or tensor that it was found in.
        remedy: the next thing for the user to do, as an imperative sentence.

    Example:
        >>> print(DaptMergeError("the checkpoint has no tensors", where="out/", remedy="Train first."))
        the checkpoint has no tensors
          where: out/
          what to do: Train first.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | Path | None = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.remedy = remedy

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.remedy:
            lines.append(f"  what to do: {self.remedy}")
        return "\n".join(lines)


class InputError(DaptMergeError):
    """The command, a file or a value that was given cannot be used (exit code 2)."""

    exit_code = 2


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return `" Did you mean 'x'?"` for the closest known word, or an empty string when none is close.

    Example:
        >>> nearest("wieght", ["weight", "density"])
        " Did you mean 'weight'?"
    """
    import difflib

    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""
