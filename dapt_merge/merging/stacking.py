"""Which tensors the output has and from which they are made, and the configuration that fits them.

Of whole models they are the tensors that all inputs share. Of slices, the output's layers are the slices' layers one
after another, numbered anew; what lies before the layers is merged from the first slice's sources, the final norm and
the head from the last one's. A recipe with modules has one of the two in each. What this module does not know: methods
and parameter values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dapt_merge.checkpoints.checkpoint import Checkpoint, TensorInfo, config_value
from dapt_merge.checkpoints.groups import tensor_group, with_layer
from dapt_merge.errors import InputError, nearest
from dapt_merge.merging.agreement import Agreement
from dapt_merge.merging.modules import check_modules, layers_in, module_of
from dapt_merge.recipe import Recipe
from dapt_merge.recipe.parts import Part, PartInput, same_model
from dapt_merge.recipe.resolving import comes_after_the_layers

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_ENCODER_COUNTS = ("encoder_layers", "num_hidden_layers", "num_layers", "n_layers")
_DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")
# Lists of layer numbers, unlike the lists with one entry a layer that are told by their length.
_LAYER_NUMBERS = ("mlp_only_layers",)


@dataclass(frozen=True)
class LaidTensor:
    """One tensor of the output, and where it comes from.

    Attributes:
        name: what it is called in the output.
        part: the part of the recipe that makes it.
        depth: its layer counted within the part, whose gradients it follows; None outside the layers.
        layers: how many layers the part has.
        height: how many layers the output has, in the part's module; None when that is unknown.
        stored: what each of the part's inputs calls it.
    """

    name: str
    part: Part
    depth: int | None
    layers: int | None
    height: int | None
    stored: tuple[str, ...]


def layout(
    recipe: Recipe, opened: Mapping[str, Checkpoint], agreement: Agreement, config_from: Checkpoint
) -> list[LaidTensor]:
    """Return the tensors of the output, in the order of the model, module by module.

    Args:
        recipe: whole models, slices, or one of the two for each module.
        opened: reference → checkpoint.
        agreement: what `agree` found about all of them.
        config_from: the checkpoint whose configuration the output has.

    Raises:
        InputError: a layer range reaches past a checkpoint's last layer, the inputs of a slice differ in their
            tensors' names or shapes, or a module is missing or is none of the model's.
    """
    modules = tuple(recipe.modules or ())
    if modules:
        check_modules(modules, agreement.names, config_from.label)
    tensors: list[LaidTensor] = []
    for module in modules or (None,):
        parts = [part for part in recipe.parts if part.module == module]
        scene = _Scene(modules, module, agreement, {s.model: _opened(opened, s) for p in parts for s in p.inputs})
        if parts[0].layers is None:
            tensors += _whole_models(scene, parts[0], config_from, check=recipe.stacks_layers)
        else:
            tensors += _stack(scene, parts)
    return tensors


@dataclass(frozen=True)
class _Scene:
    """A module of a merge: the names that its tensors have, and the checkpoints that its parts read."""

    modules: tuple[str, ...]
    module: str | None
    agreement: Agreement
    by_path: Mapping[str, Checkpoint]

    def has(self, name: str) -> bool:
        """Say whether a tensor is the module's."""
        return self.module is None or module_of(name, self.modules) == self.module

    def layers(self, checkpoint: Checkpoint, stack: str | None) -> int | None:
        """Return how many layers a checkpoint has in the module."""
        if self.module in (None, "default") or stack is not None:
            return checkpoint.layers_of(stack)
        return layers_in(checkpoint.tensors, str(self.module), self.modules)


def _whole_models(scene: _Scene, part: Part, config_from: Checkpoint, *, check: bool) -> Iterator[LaidTensor]:
    for name in filter(scene.has, scene.agreement.names):
        group = tensor_group(name)
        count = scene.layers(config_from, group.stack)
        tensor = LaidTensor(name, part, group.layer, count, count, (name,) * len(part.inputs))
        yield _checked(tensor, scene.by_path) if check else tensor


def _stack(scene: _Scene, parts: Sequence[Part]) -> list[LaidTensor]:
    for part in parts:
        for source in part.inputs:
            _check_range(source, part, scene)
    height = sum(part.layers or 0 for part in parts)
    tensors = list(_outside(parts[0], scene, height, after=False))
    layer = 0
    for part in parts:
        for depth in range(part.layers or 0):
            tensors += _layer(part, scene, depth, layer, height)
            layer += 1
    return [*tensors, *_outside(parts[-1], scene, height, after=True)]


def stacked_config(recipe: Recipe, opened: Mapping[str, Checkpoint], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with the stacks' numbers of layers, and its lists with one entry a layer rebuilt.

    The entry of a layer is the one that it has in the first of its slice's sources.
    """
    adapted = dict(config)
    for module in (recipe.modules or (None,)) if config else ():
        parts = [part for part in recipe.parts if part.module == module and part.layers is not None]
        if not parts:
            continue
        keys, section_key = _place_in_config(module, adapted)
        origins = [
            (_section(_opened(opened, part.inputs[0]).config, section_key), part.inputs[0].first_layer + depth)
            for part in parts
            for depth in range(part.layers or 0)
        ]
        restacked = _restacked(_section(adapted, section_key), origins, keys)
        adapted = restacked if section_key is None else {**adapted, section_key: restacked}
    return adapted


def _place_in_config(module: str | None, config: Mapping[str, Any]) -> tuple[tuple[str, ...], str | None]:
    """Return the keys that state a module's number of layers, and the nested section that they stand in, if any."""
    if module in ("encoder", "decoder") and config.get("is_encoder_decoder"):
        return (_ENCODER_COUNTS if module == "encoder" else _DECODER_COUNTS), None
    if module in ("vision_tower", "vision_model"):
        return (*_LAYER_COUNTS, "depth"), "vision_config"
    nested = isinstance(config.get("text_config"), Mapping) and not any(key in config for key in _LAYER_COUNTS)
    return _LAYER_COUNTS, "text_config" if nested else None


def _section(config: Mapping[str, Any], key: str | None) -> Mapping[str, Any]:
    found = config if key is None else config.get(key)
    return found if isinstance(found, Mapping) else {}


def _restacked(
    own: Mapping[str, Any], origins: Sequence[tuple[Mapping[str, Any], int]], keys: Sequence[str]
) -> dict[str, Any]:
    count = config_value(own, *keys)
    adapted = {key: len(origins) if key in keys else value for key, value in own.items()}
    for key, value in own.items():
        if key in _LAYER_NUMBERS and isinstance(value, list):
            adapted[key] = [new for new, (source, layer) in enumerate(origins) if layer in (source.get(key) or ())]
        elif "layer" in key and isinstance(value, list) and len(value) == count:
            adapted[key] = [_entry(source, key, layer, value) for source, layer in origins]
    return adapted


def _entry(source: Mapping[str, Any], key: str, layer: int, fallback: Sequence[Any]) -> Any:
    listed = source.get(key)
    listed = listed if isinstance(listed, list) else fallback
    return listed[layer] if layer < len(listed) else listed[-1]


def _opened(opened: Mapping[str, Checkpoint], source: PartInput) -> Checkpoint:
    return next(checkpoint for reference, checkpoint in opened.items() if same_model(reference, source.model))


def _check_range(source: PartInput, part: Part, scene: _Scene) -> None:
    checkpoint, where = scene.by_path[source.model], f"{source.where}.layer_range"
    if checkpoint.config.get("is_encoder_decoder") and part.module is None:
        raise InputError(
            f"{checkpoint.label} has two stacks of layers (encoder and decoder), so a layer range is ambiguous",
            where=where,
            remedy="Write the slices under 'modules: {encoder: …, decoder: …, shared: …}', or list whole models.",
        )
    stack = part.module if part.module in ("encoder", "decoder") else None
    count, end = scene.layers(checkpoint, stack), source.first_layer + (part.layers or 0)
    if count is None or end > count:
        raise InputError(
            f"the layers {source.first_layer} to {end - 1} were asked for, and {checkpoint.label} has "
            + ("no numbered layers" if count is None else f"{count} (0 to {count - 1})"),
            where=where,
            remedy="Give [first, end] within the model; the layer 'end' itself is not part of the slice.",
        )


def _outside(part: Part, scene: _Scene, height: int, *, after: bool) -> Iterator[LaidTensor]:
    """Yield the tensors outside the layers that lie before them, or after them."""
    for name in filter(scene.has, scene.by_path[part.inputs[0].model].tensors):
        is_here = tensor_group(name).layer is None and comes_after_the_layers(name) == after
        if is_here and name in scene.agreement.names:
            stored = (name,) * len(part.inputs)
            yield _checked(LaidTensor(name, part, None, part.layers, height, stored), scene.by_path)


def _layer(part: Part, scene: _Scene, depth: int, layer: int, height: int) -> list[LaidTensor]:
    found: list[list[str]] = []
    for source in part.inputs:
        own = source.first_layer + depth
        names = [name for name in filter(scene.has, scene.by_path[source.model].tensors) if _is_in(name, own)]
        found.append([with_layer(name, layer) for name in names])
        _refuse_differing(found[0], found[-1], part.inputs[0], source, own)
    sources = [source.first_layer + depth for source in part.inputs]
    rows = [
        LaidTensor(name, part, depth, part.layers, height, tuple(with_layer(name, own) for own in sources))
        for name in found[0]
    ]
    return [_checked(row, scene.by_path) for row in rows]


def _is_in(name: str, layer: int) -> bool:
    return tensor_group(name).layer == layer


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


def _checked(tensor: LaidTensor, by_path: Mapping[str, Checkpoint]) -> LaidTensor:
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
