"""Inputs of one merge in small pieces of its arithmetic's dtype, and sums that no thread count can change.

The idea: read each input once, in runs of elements small enough that conversion, arithmetic and the check for
non-finite values all happen in cache. What this module does not know: any formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dapt_merge.errors import InputError
from dapt_merge.methods.contract import Source, TensorContext
from dapt_merge.tensors.dtypes import Dtype
from dapt_merge.tensors.lazy_torch import torch
from dapt_merge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

PIECE_ELEMENTS = 1 << 18  # 1 MiB of float32 per operand: the fastest of 2¹⁵…2²⁰ where it was tried
ACCELERATOR_PIECE_ELEMENTS = 1 << 26  # there launches cost more than memory traffic; 256 MiB per operand
_SUM_ROW_ELEMENTS = 1 << 10


class Piece(NamedTuple):
    """One run of elements: where it starts in the flattened tensor, and its values. Never write to them."""

    start: int
    base: Tensor | None
    models: tuple[Tensor, ...]


@dataclass(frozen=True)
class Operands:
    """The inputs of one merge, in their stored dtypes; with `whole_rows`, no piece of them cuts a row.

    `arithmetic` is what they are converted to to be computed with: float32, or float64 (see `arithmetic_dtype`).
    """

    base: StoredTensor | None
    models: tuple[StoredTensor, ...]
    context: TensorContext
    piece_elements: int | None = None
    whole_rows: bool = False
    arithmetic: Dtype = Dtype.FLOAT32

    def __post_init__(self) -> None:
        if self.piece_elements is not None and self.piece_elements % _SUM_ROW_ELEMENTS:
            raise ValueError(
                f"a piece must hold a multiple of {_SUM_ROW_ELEMENTS} elements, or sums would depend on it"
            )

    @property
    def numel(self) -> int:
        """Number of elements of the merged tensor."""
        return self.models[0].numel

    @property
    def row_elements(self) -> int:
        """Length of a row, the last dimension; a vector or a single number is one row. 1 when pieces may cut rows."""
        shape = self.models[0].shape
        return shape[-1] if self.whole_rows and shape else 1

    @property
    def inputs(self) -> tuple[StoredTensor, ...]:
        """The base, if there is one, and the models."""
        return self.models if self.base is None else (self.base, *self.models)

    def whole(self) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Return base and models as full tensors of the arithmetic's dtype (the inputs themselves where they have it).

        Raises:
            InputError: as for `pieces`.
        """
        base = None if self.base is None else self._widened(self.base.tensor, "base")
        return base, tuple(self._widened(model.tensor, position) for position, model in enumerate(self.models))

    def pieces(self) -> Iterator[Piece]:
        """Yield the tensor in order, every input converted to the arithmetic's dtype.

        Raises:
            InputError: a value is NaN or infinite; the error names the tensor and the checkpoint.
        """
        base = None if self.base is None else self.base.tensor.reshape(-1)
        models = [model.tensor.reshape(-1) for model in self.models]
        for run in self._runs():
            yield Piece(
                run.start,
                None if base is None else self._widened(base[run], "base"),
                tuple(self._widened(model[run], position) for position, model in enumerate(models)),
            )

    def deltas(self, position: int) -> Iterator[Tensor]:
        """Yield the task vector δ = θᵢ − θ₀ of one model, piece by piece; the pieces are the caller's to overwrite."""
        assert self.base is not None
        base, model = self.base.tensor.reshape(-1), self.models[position].tensor.reshape(-1)
        for run in self._runs():
            yield torch.sub(self._widened(model[run], position), self._widened(base[run], "base"))

    def _runs(self) -> Iterator[slice]:
        default = PIECE_ELEMENTS if self.models[0].is_on_cpu else ACCELERATOR_PIECE_ELEMENTS
        # Borders fall between the groups that `partial_sums` adds up, whatever the piece size.
        group = _group_elements(self.row_elements)
        elements = max(1, (self.piece_elements or default) // group) * group
        return (slice(start, start + elements) for start in range(0, self.numel, elements))

    def _widened(self, run: Tensor, source: Source) -> Tensor:
        values = run.to(self.arithmetic.torch_dtype)
        refuse_non_finite(values, source, self.context)  # after the conversion, which a float64 can overflow
        return values


def arithmetic_dtype(inputs: Iterable[Dtype], out_dtype: Dtype) -> Dtype:
    """Return what a merge computes in unless told: float64 where an input or the output holds that much, else float32.

    Example:
        >>> arithmetic_dtype([Dtype.BFLOAT16, Dtype.FLOAT32], Dtype.BFLOAT16)
        <Dtype.FLOAT32: 'float32'>
    """
    return Dtype.FLOAT64 if Dtype.FLOAT64 in (out_dtype, *inputs) else Dtype.FLOAT32


def dtypes_of(*tensors: StoredTensor | None) -> list[Dtype]:
    """Return the dtypes of the tensors that there are."""
    return [tensor.dtype for tensor in tensors if tensor is not None]


def refuse_non_finite(values: Tensor, source: Source, context: TensorContext) -> None:
    """Raise InputError when an input holds NaN or infinity."""
    if values.numel() and not is_finite(values):
        found = "NaN" if bool(torch.isnan(values).any()) else "infinite values"
        raise InputError(
            f"{context.label(source)} holds {found}, which would spread through the merge",
            where=f"tensor {context.name}",
            remedy="Use a checkpoint whose training did not diverge, or exclude it.",
        )


def is_finite(values: Tensor) -> bool:
    """Say whether no element is NaN or infinite (one pass, no temporary; `values` is not empty)."""
    low, high = torch.aminmax(values)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def partial_sums(values: Tensor, row_elements: int = 1) -> list[float]:
    """Return the sums of a 1-d float64 tensor over short fixed runs, to be added with `math.fsum`.

    A run is always added by one thread, and `fsum` rounds only once, so that the total depends neither on the number
    of threads nor on the piece size. `row_elements` is that of the operands which the values come from.
    """
    group = _group_elements(row_elements)
    whole = values.numel() - values.numel() % group
    last = values[whole:]
    sums: list[float] = row_sums(values[:whole].view(-1, group)).flatten().tolist()
    return [*sums, last.sum().item()] if last.numel() else sums


def row_sums(rows: Tensor) -> Tensor:
    """Return the sum of each row of a 2-d float64 tensor: in short runs, so that no thread count changes it."""
    runs = rows.shape[1] // _SUM_ROW_ELEMENTS
    whole = runs * _SUM_ROW_ELEMENTS
    tail = rows[:, whole:].sum(dim=1)
    if not runs:
        return tail
    return rows[:, :whole].reshape(len(rows), runs, _SUM_ROW_ELEMENTS).sum(dim=2).sum(dim=1).add_(tail)


def _group_elements(row_elements: int) -> int:
    """Several short rows, or one long one: what no border between pieces cuts, and what is added up at once."""
    return row_elements * max(1, _SUM_ROW_ELEMENTS // row_elements)
