"""One tensor merged by one method: the promises that hold whatever the method is.

Inputs are checked, values too; an end point is the input itself, bit for bit; everything else is computed in float32,
or in float64 where an input or the output is that wide or the caller asks, and rounded once. A method that declares a
`kernel` runs in compiled loops where float32 is computed and tensors lie in ordinary memory, and as its torch function
elsewhere, with the same bits. What this module does not know: any formula, where tensors come from, where they go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from dapt_merge.errors import DaptMergeError, InputError
from dapt_merge.methods.contract import Method, Source, TensorContext
from dapt_merge.methods.fused import Fused, Program
from dapt_merge.methods.pieces import Operands, arithmetic_dtype, dtypes_of, is_finite, refuse_non_finite
from dapt_merge.methods.rounding_loss import RoundingLoss, is_lossy, rounded_and_counted
from dapt_merge.tensors.dtypes import Dtype
from dapt_merge.tensors.lazy_torch import torch
from dapt_merge.tensors.stored import LOOP_CODES, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

MERGED_DTYPES = (Dtype.FLOAT32, Dtype.BFLOAT16, Dtype.FLOAT16, Dtype.FLOAT64)

Place: TypeAlias = Callable[[int, int], StoredTensor]
"""(begin, end) → where the elements begin…end−1 of the flattened result belong: 1-d, in the output's dtype.

Asked for in order and without gaps; what was placed may be carried away by the time that the next place is asked for.
"""


def combine(
    method: Method,
    base: Tensor | StoredTensor | None,
    models: Sequence[Tensor | StoredTensor],
    values: Mapping[str, object],
    context: TensorContext,
    *,
    out_dtype: Dtype | torch.dtype = Dtype.FLOAT32,
    arithmetic: Dtype | torch.dtype | None = None,
    piece_elements: int | None = None,
    compiled: bool = True,
) -> Tensor:
    """Merge one tensor.

    Args:
        method: from `registry.get_method`.
        base: θ₀, or None when the method does without.
        models: θ₁…θₙ, shaped like the base; float32, bfloat16, float16 or float64 (which may be mixed), or buffers of
            one integer or boolean dtype.
        values: parameters by their recipe names; per-model ones as one value per model, or one for all.
        context: the tensor's name, the seed; gets the notes.
        out_dtype: dtype of a computed result, rounded to nearest once.
        arithmetic: float32 or float64, to compute in (None: see `pieces.arithmetic_dtype`).
        piece_elements: elements handled at a time (a multiple of 1024); no result depends on it.
        compiled: use the method's compiled loops where it has some; no result depends on it.

    Returns:
        A new tensor of `out_dtype`; or, at an exact end point and for integer and boolean buffers, **the input tensor
        itself** in its own dtype: read it, do not write to it.

    Raises:
        InputError: a value or a number of models is not allowed; shapes differ; an input that takes part holds NaN or
            infinity; buffers disagree; the result overflows.

    Example:
        >>> from dapt_merge.methods.registry import get_method
        >>> base, dapt = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
        >>> combine(get_method("linear"), base, [dapt], {"weight": 0.5}, TensorContext("w"))
        tensor([1.5000, 3.0000])
    """
    merged: list[Tensor] = []
    written = Dtype.of(out_dtype)

    def place(begin: int, end: int) -> StoredTensor:
        if not merged:
            merged.append(torch.empty(models[0].shape, dtype=written.torch_dtype, device=models[0].device))
        return StoredTensor.of(merged[0].view(-1)[begin:end])

    result = combine_in_runs(
        method,
        base,
        models,
        values,
        context,
        place,
        out_dtype=written,
        arithmetic=None if arithmetic is None else Dtype.of(arithmetic),
        counted=False,
        piece_elements=piece_elements,
        compiled=compiled,
    )
    return result.tensor if isinstance(result, StoredTensor) else merged[0]


def combine_in_runs(
    method: Method,
    base: Tensor | StoredTensor | None,
    models: Sequence[Tensor | StoredTensor],
    values: Mapping[str, object],
    context: TensorContext,
    place: Place,
    *,
    out_dtype: Dtype,
    counted: bool,
    arithmetic: Dtype | None = None,
    run_elements: int | None = None,
    piece_elements: int | None = None,
    compiled: bool = True,
) -> StoredTensor | RoundingLoss | None:
    """Merge one tensor into the places that the caller names, run by run; otherwise as `combine`.

    Args:
        method, base, models, values, context, out_dtype, arithmetic, piece_elements, compiled: as for `combine`.
        place: see `Place`; on the device of the models.
        counted: count what rounding to a dtype narrower than the arithmetic's loses of the update (see
            `rounding_loss`); it changes no bit of the result.
        run_elements: largest run that is asked for (None: any).

    Returns:
        The input tensor itself where the result is one (nothing is placed then); else what rounding lost, or None when
        that was not counted.
    """
    complete = method.complete(values, len(models), f"tensor {context.name}")
    _check_count(method, base is not None, len(models), context)
    if method.placed is not None:
        complete = method.placed(complete, context)
    given = None if base is None or method.base == "unused" else _described(base, "base", context)
    stored = tuple(_described(model, position, context) for position, model in enumerate(models))
    _check_shapes(given, stored, context)
    if not stored[0].dtype.is_floating_point:
        return _agreed_buffer(given, stored, context)
    source = None if method.copy_of is None else method.copy_of(complete, len(stored), given is not None)
    if source is not None:
        return _copied(given, stored, source, context)
    arithmetic = arithmetic or arithmetic_dtype(dtypes_of(given, *stored), out_dtype)
    out = _Output(place, out_dtype, counted and is_lossy(arithmetic, out_dtype), run_elements or stored[0].numel)
    if not stored[0].numel:
        place(0, 0)
        return out.nothing_lost
    keywords = {("lambda_" if name == "lambda" else name): value for name, value in complete.items()}
    operands = Operands(given, stored, context, piece_elements, method.whole_rows, arithmetic)
    if method.measure is not None:
        keywords["measured"] = method.measure(operands, complete, context)
    if not method.elementwise:
        return _whole(method, operands, keywords, out)
    if compiled and method.kernel is not None and _fits(operands, out):
        return _run(method.kernel(operands, context=context, **keywords), method, operands, keywords, out)
    return _stream(method, operands, keywords, out)


@dataclass(frozen=True)
class _Output:
    """Where a result goes, in what dtype, whether losses are counted, and in runs of how many elements at most."""

    place: Place
    dtype: Dtype
    counted: bool
    run_elements: int

    @property
    def nothing_lost(self) -> RoundingLoss | None:
        return RoundingLoss() if self.counted else None

    def put(self, values: Tensor, begin: int, start: Tensor, method: Method, context: TensorContext) -> RoundingLoss:
        """Round a run of the result that begins at an element; `start` is what the update of that run starts from."""
        loss = RoundingLoss()
        for first in range(0, values.numel(), self.run_elements):
            run = slice(first, min(first + self.run_elements, values.numel()))
            placed = self.place(begin + run.start, begin + run.stop).tensor
            if self.counted:
                loss += rounded_and_counted(values[run], start[run], placed)
            else:
                placed.copy_(values[run])
            _refuse_overflow(placed, method, context)
        return loss


def _run(
    fused: Fused, method: Method, operands: Operands, keywords: dict[str, Any], out: _Output
) -> RoundingLoss | None:
    """Merge by compiled loops; they only notice that a value is not finite, the torch function then says which."""
    program = Program(fused, operands)
    elements = program.run_elements(out.run_elements)
    loss = RoundingLoss()
    for begin in range(0, operands.numel, elements):
        lost = program.carry_out(begin, out.place(begin, min(begin + elements, operands.numel)))
        if lost is None:
            return _stream(method, operands, keywords, replace(out, place=_nowhere(out.dtype)))
        loss += lost
    return loss if out.counted else None


def _nowhere(dtype: Dtype) -> Place:
    return lambda begin, end: StoredTensor.of(torch.empty(end - begin, dtype=dtype.torch_dtype))


def _fits(operands: Operands, out: _Output) -> bool:
    if operands.arithmetic != Dtype.FLOAT32 or out.dtype not in LOOP_CODES:
        return False
    # A row that is longer than a run would have to be ranked again for every run.
    return all(stored.loop_place for stored in operands.inputs) and operands.row_elements <= out.run_elements


def _stream(method: Method, operands: Operands, keywords: dict[str, Any], out: _Output) -> RoundingLoss | None:
    context = operands.context
    first = operands.models[0] if operands.base is None else operands.base
    flat, loss = first.tensor.reshape(-1), RoundingLoss()
    for begin, base, models in operands.pieces():
        merged = method.function(base, models, context=replace(context, offset=begin), **keywords)
        loss += out.put(merged, begin, flat[begin : begin + merged.numel()], method, context)
    return loss if out.counted else None


def _whole(method: Method, operands: Operands, keywords: dict[str, Any], out: _Output) -> RoundingLoss | None:
    context, shape = operands.context, operands.models[0].shape
    base, models = operands.whole()
    merged = method.function(base, models, context=context, **keywords)
    if merged.shape != shape:
        raise DaptMergeError(
            f"the method '{method.name}' returned shape {tuple(merged.shape)}, expected {tuple(shape)}",
            where=f"tensor {context.name}",
            remedy="Report this to the author of the method.",
        )
    first = operands.models[0] if operands.base is None else operands.base
    loss = out.put(merged.reshape(-1), 0, first.tensor.reshape(-1), method, context)
    return loss if out.counted else None


def _described(tensor: Tensor | StoredTensor, source: Source, context: TensorContext) -> StoredTensor:
    try:
        return StoredTensor.of(tensor)
    except ValueError:
        raise _unmergeable(str(tensor.dtype), source, context) from None


def _copied(
    base: StoredTensor | None, models: Sequence[StoredTensor], source: Source, context: TensorContext
) -> StoredTensor:
    stored = base if source == "base" else models[source]
    assert stored is not None
    if not stored.is_on_cpu or not stored.is_finite:
        refuse_non_finite(stored.tensor, source, context)
    return stored


def _agreed_buffer(base: StoredTensor | None, models: Sequence[StoredTensor], context: TensorContext) -> StoredTensor:
    first = models[0] if base is None else base
    for position, model in enumerate(models):
        if not model.is_same_as(first):
            raise InputError(
                f"{context.label(position)} disagrees with {context.label('base' if base is not None else 0)} on a "
                f"buffer of {first.dtype}, which cannot be merged",
                where=f"tensor {context.name}",
                remedy="Use checkpoints of one architecture and tokenizer.",
            )
    return first


def _check_count(method: Method, base_given: bool, count: int, context: TensorContext) -> None:
    where = f"method {method.name}, tensor {context.name}"
    if method.base == "required" and not base_given:
        raise InputError(f"'{method.name}' needs a base", where=where, remedy="Name the base model.")
    if count < method.min_models or (method.max_models is not None and count > method.max_models):
        if method.max_models is None:
            allowed = f"at least {method.min_models}"
        elif method.min_models == method.max_models:
            allowed = f"exactly {method.min_models}"
        else:
            allowed = f"{method.min_models} to {method.max_models}"
        raise InputError(
            f"'{method.name}' was given {count} models besides the base, expected {allowed}",
            where=where,
            remedy="Change the list of models, or choose another method.",
        )


def _check_shapes(base: StoredTensor | None, models: Sequence[StoredTensor], context: TensorContext) -> None:
    inputs: list[tuple[Source, StoredTensor]] = [] if base is None else [("base", base)]
    inputs += list(enumerate(models))
    first_source, first = inputs[0]
    for source, tensor in inputs:
        if tensor.shape != first.shape:
            raise InputError(
                f"{context.label(source)} has shape {tensor.shape}, {context.label(first_source)} has {first.shape}",
                where=f"tensor {context.name}",
                remedy="Merge checkpoints of one architecture and one vocabulary.",
            )
        mixed = tensor.dtype.is_floating_point != first.dtype.is_floating_point
        if mixed or (tensor.dtype.is_floating_point and tensor.dtype not in MERGED_DTYPES):
            raise _unmergeable(tensor.dtype, source, context)


def _unmergeable(dtype: str, source: Source, context: TensorContext) -> InputError:
    return InputError(
        f"{context.label(source)} stores {dtype}, which cannot be merged here",
        where=f"tensor {context.name}",
        remedy="Convert the checkpoint to float32, bfloat16 or float16 first (dequantize it if need be).",
    )


def _refuse_overflow(merged: Tensor, method: Method, context: TensorContext) -> None:
    if not is_finite(merged):
        raise InputError(
            f"the result of '{method.name}' overflows {merged.dtype}",
            where=f"tensor {context.name}",
            remedy="Use smaller weights, or an out_dtype of larger range.",
        )
