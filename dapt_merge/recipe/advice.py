"""What in a recipe has no effect, or another effect than its author may expect.

A warning is for a recipe that runs as written: a parameter that cannot change the result, or a place where the same
file means something else to mergekit. What this module does not know: tensors, so it looks at each clause on its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from dapt_merge.recipe.parts import INERT_PARAMETERS, Part
from dapt_merge.recipe.resolving import resolve
from dapt_merge.recipe.schema import Recipe


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
    blocks = [recipe.parameters, *(slice_.parameters for slice_ in recipe.slices or ())]
    blocks += [dict(entry.parameters) for part in recipe.parts for entry in (*part.models, *part.unweighted)]
    for name in INERT_PARAMETERS:
        if any(name in block for block in blocks):
            yield f"'{name}' has no effect here: it saves memory in mergekit and does not change the result."


def _overruled_settings(recipe: Recipe) -> Iterator[str]:
    """Settings that no tensor can ever reach: the base's own, and shared ones that every model overrules."""
    for part in recipe.parts:
        for entry in part.unweighted:
            if entry.parameters:
                yield (
                    f"{entry.where}.parameters has no effect: '{entry.model}' is the base, and {recipe.merge_method}"
                    " weights only the models' differences from it."
                )
    for parameter in recipe.method.parameters:
        name = parameter.name
        blocks = [slice_.parameters for slice_ in recipe.slices or ()] or [{}]
        if name in recipe.parameters and all(
            _fits_all_before_default(block.get(name)) or (parameter.per_model and _all_have_their_own(part, name))
            for part, block in zip(recipe.parts, blocks, strict=True)
        ):
            who = "slice" if recipe.slices else "model"
            yield f"parameters.{name} has no effect: every {who} has its own '{name}'."


def _all_have_their_own(part: Part, name: str) -> bool:
    return all(_fits_all_before_default(entry.parameters.get(name)) for entry in part.models)


def _fits_all_before_default(setting: object) -> bool:
    if setting is None:
        return False
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
    places = [place for index, part in enumerate(recipe.parts) for place in _places(recipe, part, index)]
    for place, part, name, layer in places:
        values = resolve(recipe, name, layer, 2, part=part).values
        for message in recipe.method.dead_knobs(values, len(part.models)):
            found.setdefault(message, []).append(place)
    for message, held_at in found.items():
        yield message if len(held_at) == len(places) else f"{message} (in {', '.join(dict.fromkeys(held_at))})"


def _places(recipe: Recipe, part: Part, index: int) -> Iterator[tuple[str, Part, str, int]]:
    """Yield (description, part, tensor name, layer of two) for each filter, and for what fits none, at both ends."""
    chains = [chain for per_model in part.clauses.values() for chain in per_model]
    filters = dict.fromkeys(clause.filter for chain in chains for clause in chain if clause.filter is not None)
    fits_none = "\x00"
    names = [*filters, fits_none] if all(any(c.fits(fits_none) for c in chain) for chain in chains) else [*filters]
    of_what = "" if recipe.slices is None else f" of slice {index}"
    for name in names:
        if not all(any(clause.fits(name) for clause in chain) for chain in chains):
            continue
        kind = "the other tensors" if name == fits_none else f"tensors named like '{name}'"
        for layer, end in ((0, "first"), (1, "last")):
            yield f"{kind} of the {end} layer{of_what}", part, name, layer


def _linear_complement(recipe: Recipe) -> Iterator[str]:
    if recipe.merge_method != "linear" or recipe.parts[0].base is None or "weight" not in recipe.parameters:
        return
    yield (
        f"linear with base_model '{recipe.base_model}' not among the models moves from the base towards them and leaves"
        " the base the rest of the weight (WiSE-FT); mergekit would average the base in with the same global weight."
        " To choose, give each model its own weight, or list the base among the models too."
    )


def _outer_gradients(recipe: Recipe) -> Iterator[str]:
    if recipe.gradient_outer is not None:
        return
    for name, chains in recipe.parts[-1].clauses.items():
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
