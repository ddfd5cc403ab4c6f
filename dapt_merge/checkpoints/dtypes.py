"""The names that dtypes have in recipes, in config.json and in safetensors headers, and the torch dtypes they mean.

Packed integers are left out on purpose, and float8 stands apart: its numbers mean nothing without their scales.
"""

from __future__ import annotations

import torch

from dapt_merge.errors import InputError, nearest

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOAT8_DTYPES: dict[str, torch.dtype] = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

OUTPUT_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """Return the floating dtype that weights can be written in.

    Raises:
        InputError: the name is none of float32, bfloat16, float16, float64 and their short forms.

    Example:
        >>> parse_dtype("bf16")
        torch.bfloat16
    """
    text = dtype_name(name) if isinstance(name, torch.dtype) else str(name)
    if text not in OUTPUT_DTYPES:
        raise InputError(
            f"unknown dtype '{text}'.{nearest(text, tuple(OUTPUT_DTYPES))}",
            remedy="Use one of float32, bfloat16, float16, float64.",
        )
    return OUTPUT_DTYPES[text]


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without its module, as config.json writes it.

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in with numbers of a floating dtype: float32, or their own where that is wider.

    Example:
        >>> at_least_float32(torch.bfloat16), at_least_float32(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)
