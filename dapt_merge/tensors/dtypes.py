"""The dtypes of stored numbers by name: as recipes, config.json and torch call them, and as safetensors headers do.

A name is enough to plan a merge and to write a header, and for the compiled loops; torch's own object for it is there
for whoever computes with torch.
"""

from __future__ import annotations

from enum import StrEnum

from dapt_merge.errors import InputError, nearest
from dapt_merge.tensors.lazy_torch import torch


class Dtype(StrEnum):
    """A dtype by the name that torch and config.json have for it.

    Attributes:
        itemsize: bytes of one number.
        is_floating_point: whether its numbers are floating-point ones, float8 included.

    Example:
        >>> Dtype.of(torch.bfloat16), Dtype.BFLOAT16.itemsize, Dtype.BFLOAT16.torch_dtype
        (<Dtype.BFLOAT16: 'bfloat16'>, 2, torch.bfloat16)
        >>> f"{Dtype.BFLOAT16}", Dtype("int64").is_floating_point
        ('bfloat16', False)
    """

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT8_E4M3FN = "float8_e4m3fn"
    FLOAT8_E5M2 = "float8_e5m2"
    INT64 = "int64"
    INT32 = "int32"
    INT16 = "int16"
    INT8 = "int8"
    UINT8 = "uint8"
    BOOL = "bool"

    itemsize: int
    is_floating_point: bool

    def __init__(self, name: str) -> None:
        widths = {"64": 8, "32": 4, "16": 2}
        self.itemsize = widths.get(name[-2:], 1)
        self.is_floating_point = "float" in name

    @classmethod
    def of(cls, dtype: Dtype | torch.dtype) -> Dtype:
        """Return the dtype that a torch dtype is.

        Raises:
            ValueError: it is none of these (complex numbers, packed integers, unsigned ones of several bytes).
        """
        if isinstance(dtype, Dtype):
            return dtype
        found = _OF_TORCH.get(dtype)
        if found is None:
            found = _OF_TORCH[dtype] = cls(str(dtype).removeprefix("torch."))
        return found

    @property
    def torch_dtype(self) -> torch.dtype:
        """Torch's object for it."""
        found: torch.dtype = getattr(torch, self.value)
        return found


_OF_TORCH: dict[torch.dtype, Dtype] = {}  # asked for many times a tensor

# Packed integers are left out on purpose, and float8 stands apart: its numbers mean nothing without their scales.
SAFETENSORS_DTYPES: dict[str, Dtype] = {
    "F64": Dtype.FLOAT64,
    "F32": Dtype.FLOAT32,
    "F16": Dtype.FLOAT16,
    "BF16": Dtype.BFLOAT16,
    "I64": Dtype.INT64,
    "I32": Dtype.INT32,
    "I16": Dtype.INT16,
    "I8": Dtype.INT8,
    "U8": Dtype.UINT8,
    "BOOL": Dtype.BOOL,
}
FLOAT8_DTYPES: dict[str, Dtype] = {"F8_E4M3": Dtype.FLOAT8_E4M3FN, "F8_E5M2": Dtype.FLOAT8_E5M2}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

OUTPUT_DTYPES: dict[str, Dtype] = {
    "float32": Dtype.FLOAT32,
    "bfloat16": Dtype.BFLOAT16,
    "float16": Dtype.FLOAT16,
    "float64": Dtype.FLOAT64,
    "fp32": Dtype.FLOAT32,
    "bf16": Dtype.BFLOAT16,
    "fp16": Dtype.FLOAT16,
    "fp64": Dtype.FLOAT64,
}


def parse_dtype(name: str | torch.dtype) -> Dtype:
    """Return the floating dtype that weights can be written in.

    Raises:
        InputError: the name is none of float32, bfloat16, float16, float64 and their short forms.

    Example:
        >>> parse_dtype("bf16")
        <Dtype.BFLOAT16: 'bfloat16'>
    """
    text = str(name).removeprefix("torch.")
    if text not in OUTPUT_DTYPES:
        raise InputError(
            f"unknown dtype '{text}'.{nearest(text, tuple(OUTPUT_DTYPES))}",
            remedy="Use one of float32, bfloat16, float16, float64.",
        )
    return OUTPUT_DTYPES[text]


def at_least_float32(dtype: Dtype | torch.dtype) -> Dtype:
    """Return the dtype to compute in with numbers of a floating dtype: float32, or their own where that is wider.

    Example:
        >>> at_least_float32(Dtype.BFLOAT16), at_least_float32(Dtype.FLOAT64)
        (<Dtype.FLOAT32: 'float32'>, <Dtype.FLOAT64: 'float64'>)
    """
    return Dtype.FLOAT64 if Dtype.of(dtype) == Dtype.FLOAT64 else Dtype.FLOAT32
