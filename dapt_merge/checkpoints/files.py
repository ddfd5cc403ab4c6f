"""One safetensors file, mapped and described, and JSON files. They are data from strangers: nothing is unpickled.

What a set of such files means (a model, its shards, an adapter) this module does not know.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dapt_merge.checkpoints.checkpoint import TensorInfo
from dapt_merge.checkpoints.dtypes import FLOAT8_DTYPES, SAFETENSORS_DTYPES
from dapt_merge.errors import InputError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def map_file(file: Path) -> Any:
    """Return a safetensors handle; its tensors are views into a private memory map of the file."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"the file is truncated or not safetensors ({error})",
            where=file,
            remedy="Copy or download it again, and compare its size with the source.",
        ) from error


def read_header(file: Path, handle: Any, *, float8: bool = False) -> list[TensorInfo]:
    """Return what a mapped file's header says of its tensors.

    Args:
        file: where it lies.
        handle: from `map_file`.
        float8: the checkpoint says how its float8 numbers are scaled, so that they may be among them.

    Raises:
        InputError: a tensor in a dtype that cannot be merged (float8 without a word on its scales, packed integers).
    """
    known = SAFETENSORS_DTYPES | (FLOAT8_DTYPES if float8 else {})
    infos = []
    for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
        stored = handle.get_slice(name)
        dtype = known.get(stored.get_dtype())
        if dtype is None:
            raise InputError(
                f"tensor '{name}' is stored as {stored.get_dtype()}, which cannot be merged",
                where=file,
                remedy="Use the checkpoint in float32, bfloat16 or float16; one in float8 needs its config.json, which "
                "says how it is scaled (quantization_config).",
            )
        shape = tuple(stored.get_shape())
        infos.append(TensorInfo(name, dtype, shape, math.prod(shape) * dtype.itemsize, file))
    return infos


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or say why there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"not readable as JSON ({error})", where=path, remedy="Copy it again.") from error
    if not isinstance(data, dict):
        raise InputError("expected a JSON object", where=path, remedy="Copy it again from its source.")
    return data
