"""Outputs that appear under their final name only when they are complete.

The idea: write into a hidden sibling of the target (same file system, so that the rename is atomic), flush it to the
disk (unless the caller leaves that to the kernel, as `cp` does), rename. A killed process leaves at most such a
sibling; the next writer of the same target removes it once its owner is gone, or goes on with it where both say that
they write the same. What this module does not know: what is written.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dapt_merge.errors import InputError

_LOCK_FILE = ".lock"


@contextmanager
def atomic_folder(
    final: str | Path, *, overwrite: bool = False, key: str | None = None, flush: bool = True
) -> Iterator[Path]:
    """Yield a temporary folder that becomes `final` when the block ends without an exception.

    Args:
        final: the folder to make.
        overwrite: replace it if it exists, once the new one is complete.
        key: a name for all that the content depends on. The folder yielded is empty, unless a process that was killed
            or interrupted has left one with the same key: then it is that one, with what lies in it.
        flush: wait for the disk before the folder gets its name. Without, it is whole for every process from then on,
            and a power cut within the next half minute or so can still leave it half empty.

    Raises:
        InputError: `final` exists and `overwrite` is false; its parent is not writable; the disk is full; another
            process is making the same folder with the same key.
    """
    final = Path(final)
    refuse_existing(final, overwrite)
    with disk_errors_explained(final), ExitStack() as held:
        temporary = _fresh_sibling(final, key)
        temporary.mkdir(parents=True, exist_ok=key is not None)
        if key is not None:
            held.enter_context(_locked(temporary, final))
        try:
            yield temporary
            (temporary / _LOCK_FILE).unlink(missing_ok=True)
            if flush:
                _sync_tree(temporary)
            refuse_existing(final, overwrite)  # which another process may have made in the meantime
            _replace(temporary, final, flush=flush)
        except BaseException as error:
            if key is None or not isinstance(error, KeyboardInterrupt):
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


def _fresh_sibling(final: Path, key: str | None = None) -> Path:
    """Name this process's temporary sibling of `final`, and remove those that nobody will go on with."""
    prefix = f".{final.name}.partial-"
    own = final.parent / f"{prefix}{os.getpid() if key is None else key}"
    if final.parent.is_dir():
        for other in final.parent.glob(f"{prefix}*"):
            if (key is None or other != own) and _is_abandoned(other, other.name[len(prefix) :]):
                shutil.rmtree(other) if other.is_dir() else other.unlink()
    return own


def _is_abandoned(sibling: Path, owner: str) -> bool:
    """Say whether the process that a temporary sibling belongs to is gone: by its number, or by the lock it holds."""
    if owner.isdigit() and not (sibling / _LOCK_FILE).exists():
        return owner == str(os.getpid()) or not Path(f"/proc/{owner}").exists()
    descriptor = _take_lock(sibling)
    if descriptor is None:
        return False
    os.close(descriptor)
    return True


@contextmanager
def _locked(folder: Path, final: Path) -> Iterator[None]:
    descriptor = _take_lock(folder)
    if descriptor is None:
        raise InputError(
            "another process is writing this output",
            where=final,
            remedy="Wait for it, or choose another name.",
        )
    try:
        yield
    finally:
        os.close(descriptor)


def _take_lock(folder: Path) -> int | None:
    """Return the descriptor that holds a folder's lock, which ends with the process; None while another holds it."""
    import fcntl

    try:
        descriptor = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # the folder has just got its final name
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _replace(temporary: Path, final: Path, *, flush: bool = True) -> None:
    if final.is_dir() and not final.is_symlink():
        # A non-empty folder cannot be renamed over: the old one steps aside first, and goes only after the new is in.
        aside = final.parent / f".{final.name}.replaced-{os.getpid()}"
        os.rename(final, aside)
        os.rename(temporary, final)
        shutil.rmtree(aside)
    else:
        os.replace(temporary, final)
    if flush:
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
