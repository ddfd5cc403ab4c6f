"""Which tensors compiled loops can read and write where they lie.

The idea: a loop is given an address and a code for how numbers are stored there; nothing is converted or copied first.
"""

from __future__ import annotations

import torch
from torch import Tensor

STORED_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # as in `kernels`


def fits(tensor: Tensor) -> bool:
    """Say whether compiled loops can read or write a tensor where it lies.

    Example:
        >>> fits(torch.ones(2, 3)), fits(torch.ones(2, 3).T), fits(torch.ones(2, dtype=torch.float64))
        (True, False, False)
    """
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in STORED_CODES
        and tensor.is_contiguous()
        and tensor.data_ptr() % tensor.element_size() == 0
    )


def place_of(tensor: Tensor) -> tuple[int, int]:
    """Return the address of a fitting tensor's first element, and the code of its dtype."""
    return tensor.data_ptr(), STORED_CODES[tensor.dtype]
