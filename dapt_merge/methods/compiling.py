"""Word that the loops of `kernels` are being compiled, which happens once after an installation and takes a while.

What is compiled is kept on disk by numba; this module only hears of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def tell_of_compiling(tell: Callable[[], None]) -> None:
    """Call `tell` when the first of the compiled loops is not on disk yet and has to be made."""
    from numba.core import event

    told: list[bool] = []

    class Told(event.Listener):  # type: ignore[misc]
        def on_start(self, found: Any) -> None:
            if not told:
                told.append(True)
                tell()

        def on_end(self, found: Any) -> None:
            pass

    event.register("numba:compile", Told())
