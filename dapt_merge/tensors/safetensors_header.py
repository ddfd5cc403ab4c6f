"""What a safetensors file says of its tensors: name, dtype, shape, and which of its bytes are theirs.

The format is eight bytes of length, a JSON object, and the data. Whether a file keeps to it as a whole, the safetensors
library says (`checkpoints.files`); this is for whoever needs the places of the bytes, before or without that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

_LARGEST_HEADER_BYTES = 100 * 2**20  # as in safetensors itself


class Entry(NamedTuple):
    """One tensor: its bytes are begin…end−1 of the file, and `dtype` is the format's name for its dtype."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def entries(content: memoryview) -> Iterator[Entry]:
    """Yield the tensors in the order of their bytes.

    Args:
        content: the whole file.

    Raises:
        ValueError, TypeError, KeyError: the content is not of the format.
    """
    length = int.from_bytes(content[:8], "little")
    if length > _LARGEST_HEADER_BYTES:
        raise ValueError("no header")
    header = json.loads(bytes(content[8 : 8 + length]))
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        if not 0 <= begin <= end <= len(content):
            raise ValueError("a tensor lies outside the file")
        yield Entry(name, entry["dtype"], tuple(entry["shape"]), begin, end)
