"""Numba loaded without scipy's linear algebra, which it imports only to see whether it is there: a tenth of a second.

The idea: when numba first compiles or loads a loop, it imports `scipy.linalg` to learn whether matrix products could be
compiled. Our loops have none. Left out is only that question: whoever does compile a matrix product makes numba ask
again, at that place. What this module does not know: what is compiled.
"""

from __future__ import annotations

from importlib import import_module


def load_without_scipy() -> None:
    """Import the part of numba that asks for scipy, and let the answer be yes; nothing is done where none asks.

    Example:
        >>> load_without_scipy()
    """
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
