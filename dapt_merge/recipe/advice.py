"""What in a recipe has no effect, or another effect than its author may expect.

A warning is for a recipe that runs as written: a parameter that cannot change the result, or a place where the same
file means something else to mergekit. What this module does not know: tensors, so it looks at each clause on its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from dapt_merge.recipe.resolving import resolve
from dapt_merge.recipe.schema import INERT_PARAMETERS, Recipe


def recipe_warnings(recipe: Recipe) -> list[str]:
    """Return one sentence for each thing that the recipe's author should know before the merge, or an empty list."""
    found = [
        *_inert_parameters(recipe),
        *_overruled_settings(recipe),
        *_dead_knobs(recipe),
        *_linear_complement(recipe),
        *_outer_gradients(recipe),
        *_working_dtype(recipe),
    ]
    return list(dict.fromkeys(found))


def _inert_parameters(recipe: Recipe) -> Iterator[str]:
    blocks = [recipe.parameters, *(entry.parameters for entry in recipe.models)]
    for name in INERT_PARAMETERS:
        if any(name in block for block in blocks):
            yield f"'{name}' has no effect here: it saves memory in mergekit and does not change the result."


def _overruled_settings(recipe: Recipe) -> Iterator[str]:
    """Settings that no tensor can ever reach: the base's own, and global ones that every model overrules."""
    entries = recipe.task_entries()
    for index, entry in enumerate(recipe.models):
        if entry.parameters and not any(entry.model == task.model for task in entries):
            yield (
                f"models.{index}.parameters has no effect: '{entry.model}' is the base, and {recipe.merge_method}"
                " weights only the models' differences from it."
            )
    for parameter in recipe.method.parameters:
        name = parameter.name
        if not parameter.per_model or name not in recipe.parameters:
            continue
        own = [recipe.clauses[name][i] for i, entry in enumerate(entries) if name in entry.parameters]
        if len(own) == len(entries) and all(_fits_all_before_default(entry.parameters[name]) for entry in entries):
            yield f"parameters.{name} has no effect: every model has its own '{name}'."


def _fits_all_before_default(setting: object) -> bool:
    conditions = [setting] if isinstance(setting, dict) else setting
    if not isinstance(conditions, list) or not any(isinstance(entry, dict) for entry in conditions):
        return True
    return any(isinstance(entry, dict) and entry.get("filter") in (None, "*") for entry in conditions)


def _dead_knobs(recipe: Recipe) -> Iterator[str]:
    """Ask the method about the values at each place where the recipe distinguishes tensors.

    A message that holds at every place is given as it is; one that holds at some is qualified by the place.
    """
    if recipe.method.dead_knobs is None:
        return
    found: dict[str, list[str]] = {}
    places = list(_places(recipe))
    for place, name, layer in places:
        values = resolve(recipe, name, layer, 2).values
        for message in recipe.method.dead_knobs(values, len(recipe.task_models())):
            found.setdefault(message, []).append(place)
    for message, held_at in found.items():
        yield message if len(held_at) == len(places) else f"{message} (in {', '.join(dict.fromkeys(held_at))})"


def _places(recipe: Recipe) -> Iterator[tuple[str, str, int]]:
    """Yield (description, tensor name, layer of two) for each filter, and for tensors that fit none, at both ends."""
    chains = [chain for per_model in recipe.clauses.values() for chain in per_model]
    filters = dict.fromkeys(clause.filter for chain in chains for clause in chain if clause.filter is not None)
    fits_none = "\x00"
    names = [*filters, fits_none] if all(any(c.fits(fits_none) for c in chain) for chain in chains) else [*filters]
    for name in names:
        if not all(any(clause.fits(name) for clause in chain) for chain in chains):
            continue
        kind = "the other tensors" if name == fits_none else f"tensors named like '{name}'"
        for layer, end in ((0, "first"), (1, "last")):
            yield f"{kind} of the {end} layer", name, layer


def _linear_complement(recipe: Recipe) -> Iterator[str]:
    if recipe.merge_method != "linear" or recipe.merge_base() is None or "weight" not in recipe.parameters:
        return
    yield (
        f"linear with base_model '{recipe.base_model}' not among the models moves from the base towards them and leaves"
        " the base the rest of the weight (WiSE-FT); mergekit would average the base in with the same global weight."
        " To choose, give each model its own weight, or list the base among the models too."
    )


def _outer_gradients(recipe: Recipe) -> Iterator[str]:
    if recipe.gradient_outer is not None:
        return
    for name, chains in recipe.clauses.items():
        for tensor_name in ("lm_head.weight", "model.norm.weight"):
            for chain in chains:
                clause = next((clause for clause in chain if clause.fits(tensor_name)), None)
                if clause is not None and clause.anchors[0] != clause.anchors[-1]:
                    yield (
                        f"the gradient of '{name}' gives lm_head and the final norm its last value; mergekit gives them"
                        " the first. Set 'gradient_outer: last' or 'gradient_outer: mergekit' to choose."
                    )


def _working_dtype(recipe: Recipe) -> Iterator[str]:
    if recipe.dtype is not None and recipe.out_dtype is not None and recipe.dtype != recipe.out_dtype:
        yield (
            f"dtype '{recipe.dtype}' has no effect beside out_dtype '{recipe.out_dtype}':"
            " the arithmetic is always float32."
        )
