"""Loops as machine code: compiled at the first call and kept, by a numba that is loaded without what loops never use.

The idea: when numba first compiles or loads a loop, it imports `scipy.linalg` to learn whether matrix products could be
compiled, which takes a tenth of a second. Our loops have none. Left out is only that question: whoever does compile a
matrix product makes numba ask again, at that place. What this module does not know: what is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[Function], Function]:
    """Compile a function at its first call, and let it run beside other threads.

    The code is kept beside the function's file or in the user's cache folder, and only in memory where neither can be
    written to.

    Args:
        options: of `numba.njit`.

    Example:
        >>> @compiled()
        ... def twice(number):
        ...     return 2 * number
        >>> twice(21)
        42
    """

    def decorator(function: Function) -> Function:
        try:
            return numba.njit(function, cache=True, nogil=True, **options)  # type: ignore[no-any-return]
        except RuntimeError:  # no folder can be written to
            return numba.njit(function, nogil=True, **options)  # type: ignore[no-any-return]

    return decorator


def _load_without_scipy() -> None:
    """Import the part of numba that asks for scipy, and let the answer be yes; nothing is done where none asks."""
    try:
        from numba.np import linalg

        ask = linalg.ensure_blas
    except (ImportError, AttributeError):
        return
    linalg.ensure_blas = lambda: None
    try:
        import_module("numba.np.arraymath")
    finally:
        linalg.ensure_blas = ask


_load_without_scipy()
