"""One safetensors file, mapped and described, and JSON files. They are data from strangers: nothing is unpickled.

What a set of such files means (a model, its shards, an adapter) this module does not know.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

from dapt_merge import prefetch
from dapt_merge.checkpoints.checkpoint import TensorInfo
from dapt_merge.errors import InputError
from dapt_merge.tensors.dtypes import FLOAT8_DTYPES, SAFETENSORS_DTYPES
from dapt_merge.tensors.safetensors_header import entries
from dapt_merge.tensors.stored import StoredTensor

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class MappedFile:
    """A safetensors file in memory, privately mapped: its tensors are views, and nothing is read until they are.

    Args:
        file: where it lies.
        float8: whoever opens it knows how float8 numbers in it are scaled, so that they may be among them.

    Raises:
        InputError: the file is torn or of another format; a tensor is in a dtype that cannot be merged (float8 without
            a word on its scales, packed integers).
    """

    def __init__(self, file: Path, *, float8: bool = False) -> None:
        content = _mapped(file)
        self._places: dict[str, tuple[TensorInfo, memoryview]] = {}
        known = SAFETENSORS_DTYPES | (FLOAT8_DTYPES if float8 else {})
        for name, stored_as, shape, begin, end in entries(content):
            dtype = known.get(stored_as)
            if dtype is None:
                raise InputError(
                    f"tensor '{name}' is stored as {stored_as}, which cannot be merged",
                    where=file,
                    remedy="Use the checkpoint in float32, bfloat16 or float16; one in float8 needs its config.json, "
                    "which says how it is scaled (quantization_config).",
                )
            self._places[name] = TensorInfo(name, dtype, shape, end - begin, file), content[begin:end]

    @property
    def tensors(self) -> list[TensorInfo]:
        """What the header says of the tensors, in the order of their bytes."""
        return [info for info, _ in self._places.values()]

    def stored(self, name: str) -> StoredTensor:
        """Return a tensor where it lies; never write to it."""
        info, memory = self._places[name]
        return StoredTensor(info.dtype, info.shape, memory)


def _mapped(file: Path) -> memoryview:
    """Map a file that the safetensors library takes for one of its format, header, places and length."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"), open(file, "rb") as opened:
            # Private and writable, which torch asks of memory that it looks at.
            return memoryview(prefetch.mapped(file) or mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"the file is truncated or not safetensors ({error})",
            where=file,
            remedy="Copy or download it again, and compare its size with the source.",
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or say why there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"not readable as JSON ({error})", where=path, remedy="Copy it again.") from error
    if not isinstance(data, dict):
        raise InputError("expected a JSON object", where=path, remedy="Copy it again from its source.")
    return data
