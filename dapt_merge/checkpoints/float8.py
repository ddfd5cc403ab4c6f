"""Weights kept in float8 beside their scales, read as the numbers that they stand for.

    W = q · s       one s for the matrix, for each row, or for each block (usually 128 × 128)

Both names for s in use multiply (`weight_scale`, and DeepSeek's `weight_scale_inv`). A matrix is computed when it is
read, in float32, and stays as coarse as it was; it is merged into bfloat16 unless the recipe says otherwise. Scales of
activations are of no use to a merge and are left out. Other quantisations this module does not know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dapt_merge.checkpoints.checkpoint import Checkpoint, TensorInfo
from dapt_merge.errors import InputError
from dapt_merge.tensors.dtypes import FLOAT8_DTYPES, Dtype
from dapt_merge.tensors.lazy_torch import torch
from dapt_merge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

_SCALES = ("_scale_inv", "_scale")
_OF_ACTIVATIONS = re.compile(r"\.(?:(?:input|output|activation|input_activation|[qkv])_scale)$")


def can_be_dequantised(quantisation: Mapping[str, Any]) -> bool:
    """Say whether a `quantization_config` describes float8 weights with scales beside them.

    Example:
        >>> can_be_dequantised({"quant_method": "fp8"}), can_be_dequantised({"quant_method": "awq", "bits": 4})
        (True, False)
    """
    method = quantisation.get("quant_method")
    return method == "fp8" or (method == "compressed-tensors" and quantisation.get("format") == "float-quantized")


def dequantised_checkpoint(stored: Checkpoint, quantisation: Mapping[str, Any]) -> Checkpoint:
    """Return the checkpoint with float32 matrices in place of float8 ones and their scales.

    Args:
        stored: the checkpoint as its files have it.
        quantisation: the `quantization_config` that it came with.

    Raises:
        InputError: a float8 tensor has no scale beside it, or one of a shape that does not fit.
    """
    scales: dict[str, str] = {}
    for name, info in stored.tensors.items():
        if info.dtype in FLOAT8_DTYPES.values():
            scales[name] = _scale_of(name, stored)
            _block(info, stored.tensors[scales[name]], quantisation, stored.label)
    unused = {name for name in stored.tensors if _OF_ACTIVATIONS.search(name)} | set(scales.values())
    infos = [
        replace(info, dtype=Dtype.FLOAT32, nbytes=4 * info.elements, stored_dtype=Dtype.BFLOAT16)
        if name in scales
        else info
        for name, info in stored.tensors.items()
        if name not in unused
    ]

    def read(name: str) -> Tensor | StoredTensor:
        if name not in scales:
            return stored.stored_as(name)
        scale = scales[name]
        block = _block(stored.tensors[name], stored.tensors[scale], quantisation, stored.label)
        return dequantised(stored.stored_as(name).tensor, stored.stored_as(scale).tensor, block)

    remark = f"{stored.label} is kept in float8: its matrices are read as float32, and stay as coarse as they were"
    made = Checkpoint(
        stored.label,
        read,
        infos,
        folder=stored.folder,
        config={key: value for key, value in stored.config.items() if key != "quantization_config"},
        aliases=stored.aliases,
        remarks=(*stored.remarks, remark),
    )
    made.computed = frozenset(scales)
    return made


def dequantised(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Return q·s in float32.

    Args:
        weight: q, out × in.
        scale: s, one number for each block, the blocks in rows.
        block: rows and columns of a block.

    Example:
        >>> dequantised(torch.ones(2, 3).to(torch.float8_e4m3fn), torch.tensor([[2.0, 5.0]]), (2, 2))
        tensor([[2., 2., 5.],
                [2., 2., 5.]])
    """
    result = torch.empty(weight.shape, dtype=torch.float32)
    table = scale.float().reshape(-(-weight.shape[0] // block[0]), -1)
    for number, factors in enumerate(table):
        run = slice(number * block[0], (number + 1) * block[0])
        by_column = factors.repeat_interleave(block[1])[: weight.shape[1]]
        torch.mul(weight[run].float(), by_column, out=result[run])
    return result


def _scale_of(name: str, stored: Checkpoint) -> str:
    found = next((name + ending for ending in _SCALES if name + ending in stored.tensors), None)
    if found is None:
        raise InputError(
            f"'{name}' is in float8, and no scale is stored beside it",
            where=stored.label,
            remedy="Copy the checkpoint again, or use it in bfloat16.",
        )
    return found


def _block(info: TensorInfo, scale: TensorInfo, quantisation: Mapping[str, Any], label: str) -> tuple[int, int]:
    """Return rows and columns of the blocks that one scale holds for, as the shapes say."""
    if len(info.shape) == 2:
        rows, columns = info.shape
        stated = quantisation.get("weight_block_size")
        candidates = [(rows, columns), (1, columns), *([tuple(stated)] if isinstance(stated, list) else [(128, 128)])]
        for block in candidates:
            counts = (-(-rows // block[0]), -(-columns // block[1]))
            if scale.shape == counts or (scale.elements == counts[0] and counts[1] == 1 and len(scale.shape) < 2):
                return int(block[0]), int(block[1])
    raise InputError(
        f"'{info.name}' is {info.shape} in float8 with scales of shape {scale.shape}, which is no form known here",
        where=label,
        remedy="Use the checkpoint in bfloat16.",
    )
