"""Layer stacks: which tensors a recipe's slices make, from which tensors, and the configuration that fits them.

The output's layers are the slices' layers one after another, numbered anew. What lies before the layers is merged from
the first slice's sources, the final norm and the head from the last one's. What this module does not know: methods and
parameter values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dapt_merge.checkpoints.checkpoint import Checkpoint, TensorInfo, config_value
from dapt_merge.checkpoints.groups import tensor_group, with_layer
from dapt_merge.errors import InputError, nearest
from dapt_merge.merging.agreement import Agreement
from dapt_merge.recipe import Recipe
from dapt_merge.recipe.parts import Part, PartInput, same_model
from dapt_merge.recipe.resolving import comes_after_the_layers

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Lists of layer numbers, unlike the lists with one entry a layer that are told by their length.
_LAYER_NUMBERS = ("mlp_only_layers",)


@dataclass(frozen=True)
class StackedTensor:
    """One tensor of the stack: its name there, the slice it comes from, its layer counted within the slice (None
    outside the layers), and what each of the slice's inputs calls it.
    """

    name: str
    part: Part
    depth: int | None
    stored: tuple[str, ...]


def stack_layout(recipe: Recipe, opened: Mapping[str, Checkpoint], agreement: Agreement) -> list[StackedTensor]:
    """Return the tensors of the stack that a recipe's slices make, in the order of the model.

    Raises:
        InputError: a layer range reaches past a checkpoint's last layer, or the inputs of a slice differ in their
            tensors' names or shapes.
    """
    by_path = {source.model: _opened(opened, source) for part in recipe.parts for source in part.inputs}
    for part in recipe.parts:
        for source in part.inputs:
            _check_range(source, part, by_path[source.model])
    tensors = list(_outside(recipe.parts[0], by_path, agreement, after=False))
    layer = 0
    for part in recipe.parts:
        for depth in range(part.layers or 0):
            tensors += _layer(part, by_path, depth, layer)
            layer += 1
    return [*tensors, *_outside(recipe.parts[-1], by_path, agreement, after=True)]


def stacked_config(recipe: Recipe, opened: Mapping[str, Checkpoint], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with the stack's number of layers, and its lists with one entry a layer rebuilt.

    The entry of a layer is the one that it has in the first of its slice's sources.
    """
    if not config:
        return {}
    origins = [
        (_text_model(_opened(opened, part.inputs[0]).config), part.inputs[0].first_layer + depth)
        for part in recipe.parts
        for depth in range(part.layers or 0)
    ]
    own = _text_model(config)
    count = config_value(own, *_LAYER_COUNTS)
    adapted = {key: len(origins) if key in _LAYER_COUNTS else value for key, value in own.items()}
    for key, value in own.items():
        if key in _LAYER_NUMBERS and isinstance(value, list):
            adapted[key] = [new for new, (source, layer) in enumerate(origins) if layer in (source.get(key) or ())]
        elif "layer" in key and isinstance(value, list) and len(value) == count:
            adapted[key] = [_entry(source, key, layer, value) for source, layer in origins]
    return {**config, "text_config": adapted} if own is not config else adapted


def _text_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration that states the layers: itself, or its nested text model."""
    text = config.get("text_config")
    stated_here = any(key in config for key in _LAYER_COUNTS)
    return text if isinstance(text, Mapping) and not stated_here else config


def _entry(source: Mapping[str, Any], key: str, layer: int, fallback: Sequence[Any]) -> Any:
    listed = source.get(key)
    listed = listed if isinstance(listed, list) else fallback
    return listed[layer] if layer < len(listed) else listed[-1]


def _opened(opened: Mapping[str, Checkpoint], source: PartInput) -> Checkpoint:
    return next(checkpoint for reference, checkpoint in opened.items() if same_model(reference, source.model))


def _check_range(source: PartInput, part: Part, checkpoint: Checkpoint) -> None:
    where, count, end = f"{source.where}.layer_range", checkpoint.num_layers, source.first_layer + (part.layers or 0)
    if checkpoint.config.get("is_encoder_decoder"):
        raise InputError(
            f"{checkpoint.label} has two stacks of layers (encoder and decoder), so a layer range is ambiguous",
            where=where,
            remedy="List whole models under 'models:'.",
        )
    if count is None or end > count:
        raise InputError(
            f"the layers {source.first_layer} to {end - 1} were asked for, and {checkpoint.label} has "
            + ("no numbered layers" if count is None else f"{count} (0 to {count - 1})"),
            where=where,
            remedy="Give [first, end] within the model; the layer 'end' itself is not part of the slice.",
        )


def _outside(
    part: Part, by_path: Mapping[str, Checkpoint], agreement: Agreement, *, after: bool
) -> Iterator[StackedTensor]:
    """Yield the tensors outside the layers that lie before them, or after them."""
    for name in by_path[part.inputs[0].model].tensors:
        if tensor_group(name).layer is None and comes_after_the_layers(name) == after and name != agreement.tied_head:
            yield _checked(StackedTensor(name, part, None, (name,) * len(part.inputs)), by_path)


def _layer(part: Part, by_path: Mapping[str, Checkpoint], depth: int, layer: int) -> list[StackedTensor]:
    found: list[list[str]] = []
    for source in part.inputs:
        own = source.first_layer + depth
        names = [name for name in by_path[source.model].tensors if tensor_group(name).layer == own]
        found.append([with_layer(name, layer) for name in names])
        _refuse_differing(found[0], found[-1], part.inputs[0], source, own)
    rows = [
        StackedTensor(name, part, depth, tuple(with_layer(name, s.first_layer + depth) for s in part.inputs))
        for name in found[0]
    ]
    return [_checked(row, by_path) for row in rows]


def _refuse_differing(names: list[str], others: list[str], first: PartInput, other: PartInput, layer: int) -> None:
    for one, two, lacking in ((names, others, other), (others, names, first)):
        missing = [name for name in one if name not in two]
        if missing:
            raise InputError(
                f"layer {layer} of '{other.model}' and its counterpart in '{first.model}' do not have the same tensors:"
                f" '{lacking.model}' lacks the one for '{missing[0]}'.{nearest(missing[0], two)}",
                where=other.where,
                remedy="Merge layers of one architecture, or give each slice one source.",
            )


def _checked(tensor: StackedTensor, by_path: Mapping[str, Checkpoint]) -> StackedTensor:
    """Return the tensor when all its inputs have it in one shape."""
    infos: list[TensorInfo] = []
    for source, name in zip(tensor.part.inputs, tensor.stored, strict=True):
        checkpoint = by_path[source.model]
        if name not in checkpoint.tensors:
            raise InputError(
                f"'{name}' is not in {checkpoint.label}.{nearest(name, tuple(checkpoint.tensors))}",
                where=source.where,
                remedy="Merge layers of one architecture, or give each slice one source.",
            )
        infos.append(checkpoint.tensors[name])
        first, last = infos[0], infos[-1]
        if first.shape != last.shape or first.dtype.is_floating_point != last.dtype.is_floating_point:
            raise InputError(
                f"'{first.name}' of '{tensor.part.inputs[0].model}' is {first.dtype} {first.shape}, and "
                f"'{last.name}' of '{source.model}' is {last.dtype} {last.shape}",
                where=source.where,
                remedy="Merge layers of one architecture.",
            )
    return tensor
