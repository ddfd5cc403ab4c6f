"""Which tensors are a module's: the encoder's, the decoder's, the text model's, the vision tower's, …

mergekit's `modules:` names the parts of a model and says for each what is merged. The idea: a module's name is a word
in the names of its tensors (`encoder.block.3…`, `model.visual.…`); where two words are there, the inner one counts; and
what has none of them belongs to `default`, `shared` or the text model. Where `default` is the only module, it is all.
What this file does not know: recipes beyond their modules' names, and what the tensors hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dapt_merge.checkpoints.groups import tensor_group
from dapt_merge.errors import InputError, nearest

# What modules are called in tensors' names, where that is not the module's own name.
_WORDS: Mapping[str, tuple[str, ...]] = {
    "text_decoder": ("language_model", "text_model"),
    "vision_tower": ("vision_tower", "vision_model", "visual"),
    "vision_model": ("vision_tower", "vision_model", "visual"),
    "multi_modal_projector": ("multi_modal_projector", "merger", "deepstack_merger_list", "connector", "aligner"),
}
# Where what has no module's word belongs, in order of preference.
_REST = ("default", "shared", "text_decoder")


def module_of(name: str, modules: Sequence[str]) -> str | None:
    """Return which of a recipe's modules a tensor belongs to; None when it is none of them.

    Example:
        >>> module_of("decoder.block.0.layer.1.EncDecAttention.q.weight", ["encoder", "decoder", "shared"])
        'decoder'
        >>> module_of("lm_head.weight", ["encoder", "decoder", "shared"])
        'shared'
    """
    if tuple(modules) == ("default",):
        return "default"
    others = [] if {"vision_tower", "vision_model"} & set(modules) else ["vision_tower"]
    others += [] if "multi_modal_projector" in modules else ["multi_modal_projector"]
    ends = {module: _end_of_word(name, module) for module in (*modules, *others)}
    inner = max(ends, key=lambda module: ends[module])
    if ends[inner] >= 0:
        return inner if inner in modules else None
    return next((module for module in _REST if module in modules), None)


def check_modules(modules: Sequence[str], names: Iterable[str], where: str) -> None:
    """Refuse modules that the model does not have, and tensors that belong to none.

    Args:
        modules: the recipe's.
        names: the model's tensors.
        where: what model they are of.

    Raises:
        InputError: see above; the module or the first tensor is named.
    """
    names = list(names)
    owners = {name: module_of(name, modules) for name in names}
    for module in modules:
        if module not in owners.values():
            words = sorted({word for name in names for word in name.split(".")[:-1] if not word.isdecimal()})
            raise InputError(
                f"{where} has no module '{module}'.{nearest(module, words)}",
                where=f"modules.{module}",
                remedy="Name a module by the word that its tensors have in their names; a model of one part is"
                " 'default'.",
            )
    ownerless = [name for name, owner in owners.items() if owner is None]
    if ownerless:
        raise InputError(
            f"{len(ownerless)} tensors of {where} belong to none of the modules, the first is '{ownerless[0]}'",
            where="modules",
            remedy="Add the module that they belong to, or 'default' for all that the others leave: the output would"
            " be no whole model.",
        )


def layers_in(names: Iterable[str], module: str, modules: Sequence[str]) -> int | None:
    """Return how many numbered layers a module has by its tensors' names, or None."""
    found = [tensor_group(name).layer for name in names if module_of(name, modules) == module]
    layers = [layer for layer in found if layer is not None]
    return max(layers) + 1 if layers else None


def _end_of_word(name: str, module: str) -> int:
    """Return where the last of a module's words ends in a tensor's name; −1 when it has none of them."""
    dotted = f".{name}"
    found = [dotted.rfind(f".{word}.") + len(word) for word in _WORDS.get(module, (module,)) if f".{word}." in dotted]
    return max(found, default=-1)
