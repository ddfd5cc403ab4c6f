"""Outputs that appear under their final name only when they are complete.

The idea: write into a hidden sibling of the target (same file system, so that the rename is atomic), flush it to the
disk, rename. A killed process leaves at most such a sibling; the next writer of the same target removes it once its
owner is gone. What this module does not know: what is written.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dapt_merge.errors import InputError


@contextmanager
def atomic_folder(final: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `final` when the block ends without an exception.

    Raises:
        InputError: `final` exists and `overwrite` is false; its parent is not writable; the disk is full.
    """
    final = Path(final)
    refuse_existing(final, overwrite)
    with disk_errors_explained(final):
        temporary = _fresh_sibling(final)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            _sync_tree(temporary)
            _replace(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def atomic_file(final: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path; the file written there becomes `final` when the block ends without an exception.

    Raises:
        InputError: `final` exists and `overwrite` is false; its parent is not writable; the disk is full.
    """
    final = Path(final)
    refuse_existing(final, overwrite)
    with disk_errors_explained(final):
        temporary = _fresh_sibling(final)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _sync(temporary)
            _replace(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(final: str | Path, text: str, *, overwrite: bool = True) -> None:
    """Write `text` as UTF-8 to `final`, whole or not at all."""
    with atomic_file(final, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")


def refuse_existing(final: str | Path, overwrite: bool) -> None:
    """Raise InputError when an output exists and may not be replaced; call it before any long work starts."""
    if os.path.lexists(final) and not overwrite:
        raise InputError(
            "the output exists already", where=final, remedy="Choose another name, or pass --overwrite to replace it."
        )


@contextmanager
def disk_errors_explained(target: str | Path) -> Iterator[None]:
    """Turn the operating system's disk errors on `target` into an InputError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                "the disk is full; nothing was left under the final name",
                where=target,
                remedy="Free space on that file system, or choose an output on another one.",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise InputError(
                f"cannot write here ({error.strerror})", where=target, remedy="Choose a folder you may write to."
            ) from error
        raise


def _fresh_sibling(final: Path) -> Path:
    """Name this process's temporary sibling of `final`, and remove those whose process is gone."""
    prefix = f".{final.name}.partial-"
    if final.parent.is_dir():
        for stale in final.parent.glob(f"{prefix}*"):
            owner = stale.name[len(prefix) :]
            if owner == str(os.getpid()) or not (owner.isdigit() and Path(f"/proc/{owner}").exists()):
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    return final.parent / f"{prefix}{os.getpid()}"


def _replace(temporary: Path, final: Path) -> None:
    if final.is_dir() and not final.is_symlink():
        # A non-empty folder cannot be renamed over: the old one steps aside first, and goes only after the new is in.
        aside = final.parent / f".{final.name}.replaced-{os.getpid()}"
        os.rename(final, aside)
        os.rename(temporary, final)
        shutil.rmtree(aside)
    else:
        os.replace(temporary, final)
    _sync(final.parent)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
