"""torch, imported when something of it is first used: that takes longer than merging a model of a billion parameters.

A merge by compiled loops (`methods.kernels`) needs nothing of torch, and whatever such a merge imports takes torch from
here. Everything else may import it as usual. What torch is used for, this module does not know.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _LazyTorch:
        """Stands for the module; what was asked for once is found at once from then on."""

        def __getattr__(self, name: str) -> Any:
            found = getattr(_imported(), name)
            setattr(self, name, found)
            return found

    torch = _LazyTorch()

_lock = threading.RLock()
_when_imported: list[Callable[[], None]] = []


def is_imported() -> bool:
    """Say whether torch is in use already, imported here or elsewhere."""
    module = sys.modules.get("torch")
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)


@contextmanager
def when_imported(action: Callable[[], None]) -> Iterator[None]:
    """Carry out the action right after torch is imported here, in the thread that asked for it, if that happens within.

    No other thread gets anything of torch from here before the action is over.
    """
    _when_imported.append(action)
    try:
        yield
    finally:
        _when_imported.remove(action)


def _imported() -> Any:
    with _lock:  # whoever imports it now is done with the actions, too
        new = not is_imported()
        import torch

        if new:
            for action in tuple(_when_imported):
                action()
        return torch
