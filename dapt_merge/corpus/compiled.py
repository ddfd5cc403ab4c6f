"""Loops over arrays as machine code; what they compute is the business of the modules that hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile at the first call; keep the code beside the function's file or in the user's cache, else in memory."""
    try:
        return numba.njit(function, cache=True, nogil=True)  # type: ignore[no-any-return]
    except RuntimeError:  # no folder can be written to
        return numba.njit(function, nogil=True)  # type: ignore[no-any-return]
