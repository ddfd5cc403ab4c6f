"""What a recipe merges with what: one part for whole models, or one for each slice of a stack of layers.

A recipe with `modules` has such parts for each of them. A part has its base, its models and the compiled settings of
every parameter, so that whatever comes behind never asks again where a setting was written. Precedence: the source's
own, the slice's, the module's, the recipe's, the method's default. What this module does not know: files, how many
layers a checkpoint has, which tensors are a module's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dapt_merge.errors import InputError, nearest
from dapt_merge.methods.contract import Method, Parameter
from dapt_merge.recipe.settings import Clause, Scalar, read_setting, truncate

if TYPE_CHECKING:
    from dapt_merge.recipe.schema import ModelInput, Recipe, Slice

# mergekit's parameters that cannot change a result, so that they are taken and reported: why, and for which methods
# (none named: for all).
INERT_PARAMETERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "int8_mask": ("it saves memory in mergekit and does not change the result", ()),
    "density": ("nothing is dropped; in mergekit too", ("task_arithmetic",)),
    "rescale": ("nothing is dropped, so there is nothing to make up for; in mergekit too", ("task_arithmetic",)),
}
# mergekit passes over a parameter that its method does not have, and recipes are copied from one method to another. So
# the parameters of its other methods are taken and reported; a name that none of them has is a mistake.
_MERGEKITS_PARAMETERS = (
    *("alpha", "density", "eps", "epsilon", "filter_wise", "gamma", "lambda", "max_iter", "normalize", "r", "rescale"),
    *("normalize_weights", "nuslerp_flatten", "nuslerp_row_wise", "scale", "select_topk", "t", "tol", "weight"),
)
_MERGEKITS_METHODS = (
    *("arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear"),
    *("karcher", "linear", "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl"),
    *("sce", "slerp", "task_arithmetic", "ties"),
)
Clauses = dict[str, tuple[Clause, ...]]


@dataclass(frozen=True)
class PartInput:
    """A checkpoint in a part: its reference, the first of its layers that take part, and where the recipe names it."""

    model: str
    first_layer: int = 0
    where: str = "base_model"
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One merge of some layers, or of whole models.

    Attributes:
        base: the checkpoint that the method gets as θ₀, or None when it gets no base.
        models: those that it gets as θ₁…θₙ.
        clauses: parameter → chains of clauses in order of precedence: one for each of `models`, or one when global.
        layers: how many layers the slice has; None for whole models.
        unweighted: entries of the recipe that are the base, so that their own parameters cannot act.
        module: the name of the module that it belongs to; None where the recipe has none.
        where: the part of the recipe that describes it, for messages.
        between: the parameter blocks between the sources' own and the recipe's: the slice's, the module's.
    """

    base: PartInput | None
    models: tuple[PartInput, ...]
    clauses: Mapping[str, tuple[tuple[Clause, ...], ...]]
    layers: int | None = None
    unweighted: tuple[PartInput, ...] = ()
    module: str | None = None
    where: str = "models"
    between: tuple[Mapping[str, Any], ...] = ()

    @property
    def inputs(self) -> tuple[PartInput, ...]:
        """The base, where there is one, and the models: in the order in which a merge reads them."""
        return self.models if self.base is None else (self.base, *self.models)

    @cached_property
    def constants(self) -> Mapping[str, tuple[Scalar, ...]] | None:
        """Parameter → its value in each chain, where that is one for all tensors; None where any tensor may differ."""
        firsts = {name: [chain[0] if chain else None for chain in chains] for name, chains in self.clauses.items()}
        found: dict[str, tuple[Scalar, ...]] = {}
        for name, clauses in firsts.items():
            same = [clause for clause in clauses if clause is not None and clause.fits_all and not clause.is_gradient]
            if len(same) < len(clauses):
                return None
            found[name] = tuple(clause.anchors[0] for clause in same)
        return found


@dataclass(frozen=True)
class Section:
    """Whole models or slices that are described together: a recipe's own, or those of one of its modules.

    `prefix` is where it stands in the recipe, empty or ending in a dot.
    """

    module: str | None
    prefix: str
    models: Sequence[ModelInput]
    slices: Sequence[Slice] | None
    parameters: Mapping[str, Any]
    states_models: bool


def sections_of(recipe: Recipe) -> tuple[Section, ...]:
    """Return the recipe's modules, or the recipe itself as the one section that it has without them."""
    if recipe.modules is None:
        stated = "models" in recipe.model_fields_set
        return (Section(None, "", recipe.models, recipe.slices, {}, stated),)
    return tuple(
        Section(name, f"modules.{name}.", m.models, m.slices, m.parameters, "models" in m.model_fields_set)
        for name, m in recipe.modules.items()
    )


def same_model(first: str, second: str | None) -> bool:
    """Say whether two references name one checkpoint, whatever the spelling of the path (`./base/` and `base`)."""
    return second is not None and os.path.normpath(first) == os.path.normpath(second)


def check_structure(recipe: Recipe) -> None:
    """Refuse a recipe whose models or slices do not make a merge of its method.

    Raises:
        InputError: neither or more than one of `models`, `slices` and `modules`, a model listed twice, a needed base
            missing, too few or too many models, sources of a slice with different numbers of layers.
    """
    if recipe.modules is not None and (recipe.models or recipe.slices is not None):
        raise InputError(
            f"the recipe has both 'modules' and '{'models' if recipe.models else 'slices'}'",
            where="modules",
            remedy="Keep one; inside each module stand its own 'models' or 'slices'.",
        )
    for section in sections_of(recipe):
        _check_section(recipe, section)


def _check_section(recipe: Recipe, section: Section) -> None:
    if section.slices is not None and section.models:
        raise InputError(
            f"the {'recipe' if section.module is None else 'module'} has both 'models' and 'slices'",
            where=f"{section.prefix}slices",
            remedy="Keep one: whole models under 'models', or layer ranges under 'slices'.",
        )
    if section.slices is None and not section.models:
        raise InputError(
            "'models' is empty: at least 1 is needed" if section.states_models else "the key 'models' is missing",
            where=f"{section.prefix}models",
            remedy="Add 'models:' with a list of checkpoints (or 'slices:' with ranges of their layers).",
        )
    if section.slices is None:
        _check_models(recipe, section)
    for index, part in enumerate(section.slices or ()):
        _check_slice(recipe, part, f"{section.prefix}slices.{index}")


def compile_parts(recipe: Recipe) -> tuple[Part, ...]:
    """Split a recipe of sound structure into its parts, each with its settings compiled.

    Raises:
        InputError: an unknown parameter, a value that is missing or out of range, a wrong number of models.
    """
    everywhere = _read_parameters(recipe.parameters, recipe.method, "parameters", own=False)
    parts: list[Part] = []
    for section in sections_of(recipe):
        own = _read_parameters(section.parameters, recipe.method, f"{section.prefix}parameters", own=False)
        shared = [own, everywhere]
        if section.slices is None:
            parts.append(_whole_models(recipe, section, shared))
        else:
            parts += [_slice(recipe, section, index, shared) for index in range(len(section.slices))]
    return tuple(parts)


def check_additions(recipe: Recipe) -> None:
    """Refuse a target or frozen tensors where the recipe gives them nothing to act on.

    Raises:
        InputError: a target without a base that differences are taken from, frozen tensors without a base to stay at,
            two keys that name the vocabulary.
    """
    if recipe.tokenizer_source is not None and recipe.tokenizer is not None:
        raise InputError(
            "both 'tokenizer_source' and 'tokenizer' are given",
            where="tokenizer_source",
            remedy=f"Keep one: 'tokenizer: {{source: {recipe.tokenizer_source}, …}}' says the same and more.",
        )
    if recipe.target is not None:
        for part in compile_parts(recipe):
            if part.base is None:
                raise InputError(
                    f"a target needs differences from a base to add, and this {recipe.merge_method} has no base",
                    where="target" if part.layers is None and part.module is None else f"target, {part.where}",
                    remedy="Name 'base_model' (and do not list it among the models), or choose another merge_method.",
                )
        if same_model(recipe.target, recipe.base_model):
            raise InputError("the target is the base", where="target", remedy="Leave 'target' out: it is the default.")
    if recipe.freeze and recipe.base_model is None:
        raise InputError(
            "'freeze' keeps tensors as the base has them, and the recipe names no base",
            where="freeze",
            remedy="Add 'base_model: PATH'.",
        )
    for index, pattern in enumerate(recipe.freeze):
        if not pattern.strip("*"):
            raise InputError(
                f"'{pattern}' would freeze every tensor",
                where=f"freeze.{index}",
                remedy="Name a group or part of names.",
            )


def _whole_models(recipe: Recipe, section: Section, shared: Sequence[Clauses]) -> Part:
    where = f"{section.prefix}models"
    entries = [PartInput(e.reference, 0, f"{where}.{i}", e.parameters) for i, e in enumerate(section.models)]
    listed = [entry for entry in entries if same_model(entry.model, recipe.base_model)]
    models: tuple[PartInput, ...]
    if averages_the_base(recipe.method, bool(listed)):
        added = [] if listed or recipe.base_model is None else [PartInput(recipe.base_model)]
        models, base, unweighted = (*entries, *added), None, []
    else:
        models = tuple(entry for entry in entries if entry not in listed)
        base, unweighted = None if recipe.base_model is None else PartInput(recipe.base_model), listed
    _check_count(recipe.method, len(models), where)
    clauses = _compile(recipe.method, models, shared, entries)
    return Part(base, models, clauses, None, tuple(unweighted), section.module, where, (section.parameters,))


def averages_the_base(method: Method, listed: bool) -> bool:
    """Say whether the base, if it is one, is averaged with its own weight instead of being θ₀.

    True for methods that use no base, and for `linear` where it is listed among the models: mergekit pays no heed to
    `base_model` there, and users write both models with weights that add up.
    """
    return method.base == "unused" or (listed and method.name == "linear")


def _slice(recipe: Recipe, section: Section, index: int, shared: Sequence[Clauses]) -> Part:
    """Compile one slice. As in mergekit, only its own sources take part: a base must be one of them."""
    assert section.slices is not None
    method, definition, where = recipe.method, section.slices[index], f"{section.prefix}slices.{index}"
    entries = [
        PartInput(source.reference, source.layer_range[0], f"{where}.sources.{i}", source.parameters)
        for i, source in enumerate(definition.sources)
    ]
    listed = _bases_of_slice(recipe, definition, entries, where)
    models = tuple(entry for entry in entries if entry not in listed)
    _check_count(method, len(models), f"{where}.sources")
    own = _read_parameters(definition.parameters, method, f"{where}.parameters", own=False)
    clauses = _compile(method, models, [own, *shared], entries)
    first, end = definition.sources[0].layer_range
    base = listed[0] if listed else None
    between = (definition.parameters, section.parameters)
    return Part(base, models, clauses, end - first, tuple(listed), section.module, where, between)


def _bases_of_slice(recipe: Recipe, definition: Slice, entries: Sequence[PartInput], where: str) -> list[PartInput]:
    """Return the source that is θ₀, or none for a method that takes none."""
    method, named = recipe.method, definition.base_model or recipe.base_model
    listed = [] if takes_no_base_in_slices(method) else [entry for entry in entries if same_model(entry.model, named)]
    if not listed and method.base == "required":
        raise InputError(
            f"{method.name} needs a base in every slice, and none of this one's sources is it"
            + (f" ('{named}')" if named else ""),
            where=f"{where}.sources",
            remedy="Add the base model with its layer_range to the sources, and name it under 'base_model'.",
        )
    if len(listed) > 1:
        raise InputError(
            f"the base '{named}' is listed twice, so it is open which of its layers the differences start from",
            where=listed[1].where,
            remedy="List the base once in a slice.",
        )
    return listed


def _check_models(recipe: Recipe, section: Section) -> None:
    for index, entry in enumerate(section.models):
        if any(same_model(entry.reference, earlier.reference) for earlier in section.models[:index]):
            raise InputError(
                f"the model '{entry.reference}' is listed twice",
                where=f"{section.prefix}models.{index}.model",
                remedy="List each model once; give it the sum of the weights instead.",
            )
    if recipe.base_model is None and recipe.method.base == "required":
        raise InputError(
            f"{recipe.method.name} needs a base model and the recipe names none",
            where="base_model",
            remedy="Add 'base_model: PATH' (the model that DAPT started from).",
        )


def _check_slice(recipe: Recipe, definition: Slice, where: str) -> None:
    for index, source in enumerate(definition.sources):
        first, end = source.layer_range
        wanted = definition.sources[0].layer_range[1] - definition.sources[0].layer_range[0]
        if end - first != wanted:
            raise InputError(
                f"this source gives {end - first} layers and the first one of the slice {wanted}",
                where=f"{where}.sources.{index}.layer_range",
                remedy="Give every source of a slice the same number of layers.",
            )
    if definition.base_model is None or takes_no_base_in_slices(recipe.method):
        return
    if not any(same_model(source.model, definition.base_model) for source in definition.sources):
        raise InputError(
            f"the slice's base_model '{definition.base_model}' has no effect: it is not one of the slice's sources",
            where=f"{where}.base_model",
            remedy="Add it to the sources with its layer_range, or remove it.",
        )


def takes_no_base_in_slices(method: Method) -> bool:
    """Say whether every source of a slice counts as a model, whichever is named as the base."""
    return method.base == "unused" or method.name == "linear"


def _check_count(method: Method, count: int, where: str) -> None:
    least, most = method.min_models, method.max_models
    if count < least or (most is not None and count > most):
        wanted = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        raise InputError(
            f"{method.name} merges {wanted} model(s) besides the base, and the recipe names {count}",
            where=where,
            remedy="Change the list of models, or choose another merge_method.",
        )


def _compile(
    method: Method, models: Sequence[PartInput], shared: Sequence[Clauses], entries: Sequence[PartInput]
) -> dict[str, tuple[tuple[Clause, ...], ...]]:
    """Return each parameter's chains. The parameters of every entry are checked, of the base too."""
    own = {e.where: _read_parameters(e.parameters, method, f"{e.where}.parameters", own=True) for e in entries}
    compiled = {}
    for parameter in method.parameters:
        default = () if parameter.default is None else (Clause(None, (parameter.default,)),)
        rest = (*(clause for block in shared for clause in block.get(parameter.name, ())), *default)
        sources = [own.get(model.where, {}) for model in models] if parameter.per_model else [{}]
        chains = tuple(truncate((*source.get(parameter.name, ()), *rest)) for source in sources)
        for model, chain in zip(models, chains, strict=False):
            if not chain:
                raise _missing(parameter, method, model.model if parameter.per_model else None)
        compiled[parameter.name] = chains
    return compiled


def _read_parameters(raw: Mapping[str, Any], method: Method, where: str, *, own: bool) -> Clauses:
    """Read one `parameters:` block; `own` says that it belongs to one model."""
    clauses = {}
    for name, value in raw.items():
        if is_inert(name, method):
            continue
        parameter = method.parameter(name)
        if parameter is None:
            raise unknown_parameter(name, method, f"{where}.{name}")
        if own and not parameter.per_model:
            raise InputError(
                f"'{name}' of {method.name} holds for the whole merge, not for one model",
                where=f"{where}.{name}",
                remedy=f"Move it to 'parameters.{name}' at the top level of the recipe.",
            )
        clauses[name] = read_setting(value, parameter, f"{where}.{name}")
    return clauses


def is_inert(name: str, method: Method) -> bool:
    """Say whether mergekit takes a parameter for a method that it cannot change the result of."""
    if method.parameter(name) is not None:
        return False
    _, methods = INERT_PARAMETERS.get(name, ("", ("",)))
    return not methods or method.name in methods or is_of_another_method(name, method)


def is_of_another_method(name: str, method: Method) -> bool:
    """Say whether a parameter is one of mergekit's other methods, and this method, which mergekit has, lacks it."""
    foreign = name in _MERGEKITS_PARAMETERS and method.name in _MERGEKITS_METHODS
    explained = method.name in INERT_PARAMETERS.get(name, ("", ()))[1]
    return foreign and not explained and method.parameter(name) is None


def unknown_parameter(name: str, method: Method, where: str) -> InputError:
    """Return the error for a parameter that a method does not have."""
    known = [parameter.name for parameter in method.parameters]
    return InputError(
        f"{method.name} has no parameter '{name}'.{nearest(name, known)}",
        where=where,
        remedy=f"Its parameters are: {', '.join(known)}." if known else "It has no parameters.",
    )


def _missing(parameter: Parameter, method: Method, model: str | None) -> InputError:
    for_whom = f" for '{model}'" if model else ""
    return InputError(
        f"{method.name} needs a value for '{parameter.name}' ({parameter.meaning}) and the recipe gives none{for_whom}",
        where=f"parameters.{parameter.name}",
        remedy=f"Add 'parameters: {{{parameter.name}: …}}' to the recipe"
        + (" or to each model." if parameter.per_model else "."),
    )
