"""Room for a tensor that is computed once and read often: in memory while small, else in a file that has no name.

A mapped file is page cache: the system writes it out and takes the memory back when it needs it. The file is unlinked
from the start, so that nothing is left of it whatever ends the process. What is kept there this module does not know.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from typing import TYPE_CHECKING

from dapt_merge.errors import InputError
from dapt_merge.tensors.dtypes import Dtype
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

IN_MEMORY_BYTES = 64 * 2**20


def scratch_tensor(shape: tuple[int, ...], dtype: Dtype) -> Tensor:
    """Return a tensor to be filled; beyond 64 MiB it lies in an unlinked file in the temporary folder (`TMPDIR`).

    Raises:
        InputError: the temporary folder has no room for it.

    Example:
        >>> scratch_tensor((2, 3), Dtype.BFLOAT16).shape
        torch.Size([2, 3])
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes <= IN_MEMORY_BYTES:
        return torch.empty(shape, dtype=dtype.torch_dtype)
    try:
        with tempfile.TemporaryFile(prefix="dapt-merge-") as file:
            # Reserved, not only sized: a full disk would else end the process when a page is written.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:
                file.truncate(nbytes)
            mapped = mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        raise InputError(
            f"there is no room for {nbytes / 1e9:.1f} GB of aligned embeddings ({error.strerror})",
            where=tempfile.gettempdir(),
            remedy="Free some space there, or set TMPDIR to a folder on a larger disk.",
        ) from error
    return torch.frombuffer(mapped, dtype=dtype.torch_dtype).reshape(shape)
