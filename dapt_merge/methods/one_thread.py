"""Matrix algebra on one thread, so that a result does not depend on how many the machine has.

The idea: a library that splits a product or a decomposition over threads adds in another order and rounds differently.
Work on many tensors at once is shared out by whole tensors anyway. What this module does not know: any formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dapt_merge.tensors.lazy_torch import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread within; also a decorator.

    Example:
        >>> with one_thread():
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
