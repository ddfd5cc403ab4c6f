"""What in a recipe has no effect, or another effect than its author may expect.

A warning is for a recipe that runs as written: a parameter that cannot change the result, or a place where the same
file means something else to mergekit. What this module does not know: tensors, so it looks at each clause on its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from dapt_merge.methods.contract import Parameter
from dapt_merge.recipe.parts import (
    INERT_PARAMETERS,
    Part,
    is_inert,
    is_of_another_method,
    sections_of,
    takes_no_base_in_slices,
)
from dapt_merge.recipe.resolving import resolve
from dapt_merge.recipe.schema import Recipe
from dapt_merge.recipe.settings import read_setting


def recipe_warnings(recipe: Recipe, *, defaults_of_mergekit: bool = True) -> list[str]:
    """Return one sentence for each thing that the recipe's author should know before the merge, or an empty list.

    `defaults_of_mergekit` tells where a parameter is left out whose default is another one there: of no interest for a
    recipe that was not written for mergekit.
    """
    found = [
        *inert_parameters(recipe),
        *_unused_keys(recipe),
        *(_defaults_unlike_mergekits(recipe) if defaults_of_mergekit else ()),
        *_overruled_settings(recipe),
        *_dead_knobs(recipe),
        *_linear_complement(recipe),
        *_outer_gradients(recipe),
        *_working_dtype(recipe),
    ]
    return list(dict.fromkeys(found))


def inert_parameters(recipe: Recipe) -> Iterator[str]:
    """Name the parameters that mergekit takes and that change nothing, with either engine."""
    blocks = [recipe.parameters, *(block for part in recipe.parts for block in part.between)]
    blocks += [entry.parameters for part in recipe.parts for entry in (*part.models, *part.unweighted)]
    for name in dict.fromkeys(name for block in blocks for name in block if is_inert(name, recipe.method)):
        if is_of_another_method(name, recipe.method):
            yield f"'{name}' has no effect here: {recipe.merge_method} has no such parameter; mergekit passes over it."
        else:
            yield f"'{name}' has no effect here: {INERT_PARAMETERS[name][0]}."


def _unused_keys(recipe: Recipe) -> Iterator[str]:
    slices = [slice_ for section in sections_of(recipe) for slice_ in section.slices or ()]
    if any(slice_.residual_weight is not None for slice_ in slices):
        yield "'residual_weight' has no effect: mergekit reads it and uses it nowhere."
    if takes_no_base_in_slices(recipe.method):
        for name in dict.fromkeys(slice_.base_model for slice_ in slices if slice_.base_model is not None):
            yield f"the slice's base_model '{name}' has no effect: {recipe.merge_method} uses no base in slices."


def _defaults_unlike_mergekits(recipe: Recipe) -> Iterator[str]:
    """Name the parameters that the recipe leaves out, and whose default is another one in mergekit."""
    rescale, normalize = recipe.method.parameter("rescale"), recipe.method.parameter("normalize")
    for part in recipe.parts:
        given = {name for block in (recipe.parameters, *part.between) for name in block}
        anchors = [a for chain in part.clauses.get("density", ()) for c in chain for a in c.anchors]
        drops = any(isinstance(anchor, float) and anchor < 1 for anchor in anchors)
        if drops and rescale is not None and rescale.default == "expectation" and "rescale" not in given:
            yield (
                f"'rescale' is not given: {recipe.merge_method} divides what it keeps by the probability of keeping it,"
                " as its paper does; mergekit restores the tensor's L1 norm. Write 'rescale: expectation' or"
                " 'rescale: l1' to choose."
            )
        weights = [anchor for chain in part.clauses.get("weight", ()) for c in chain for anchor in c.anchors]
        divided_by_mergekit = recipe.merge_method in ("ties", "della") and any(weight != 1 for weight in weights)
        if divided_by_mergekit and "normalize" not in given and len(part.models) == 1:
            yield (
                f"'normalize' is not given: {recipe.merge_method} of one task vector takes its weight as it is;"
                " mergekit divides by the weight, so that it cancels. Write 'normalize: false' or"
                " 'normalize: true' to choose."
            )
        summed_by_mergekit = recipe.merge_method in ("dare_ties", "breadcrumbs_ties")
        if summed_by_mergekit and normalize is not None and "normalize" not in given and len(part.models) > 1:
            yield (
                f"'normalize' is not given: {recipe.merge_method} divides each element by the weights that agree on it;"
                " mergekit does not. Write 'normalize: true' or 'normalize: false' to choose."
            )


def _overruled_settings(recipe: Recipe) -> Iterator[str]:
    """Settings that no tensor can ever reach: the base's own, and shared ones that every model overrules."""
    for part in recipe.parts:
        for entry in part.unweighted:
            if any(not is_inert(name, recipe.method) for name in entry.parameters):
                yield (
                    f"{entry.where}.parameters has no effect: '{entry.model}' is the base, and {recipe.merge_method}"
                    " weights only the models' differences from it."
                )
    for parameter in recipe.method.parameters:
        name = parameter.name
        if name in recipe.parameters and all(_has_its_own(part, parameter) for part in recipe.parts):
            who = "slice" if recipe.slices else "module" if recipe.modules else "model"
            yield f"parameters.{name} has no effect: every {who} has its own '{name}'."


def _has_its_own(part: Part, parameter: Parameter) -> bool:
    """Say whether the recipe's own setting of a parameter never reaches a part."""
    own = any(_fits_all_before_default(block.get(parameter.name), parameter) for block in part.between)
    return own or _all_have_their_own(part, parameter)


def _all_have_their_own(part: Part, parameter: Parameter) -> bool:
    own = [entry.parameters.get(parameter.name) for entry in part.models]
    return parameter.per_model and all(_fits_all_before_default(setting, parameter) for setting in own)


def _fits_all_before_default(setting: object, parameter: Parameter) -> bool:
    return setting is not None and any(clause.fits_all for clause in read_setting(setting, parameter, parameter.name))


def _dead_knobs(recipe: Recipe) -> Iterator[str]:
    """Ask the method about the values at each place where the recipe distinguishes tensors.

    A message that holds at every place is given as it is; one that holds at some is qualified by the place.
    """
    if recipe.method.dead_knobs is None:
        return
    found: dict[str, list[str]] = {}
    places = [place for part in recipe.parts for place in _places(part)]
    for place, part, name, layer in places:
        values = resolve(recipe, name, layer, 2, part=part).values
        for message in recipe.method.dead_knobs(values, len(part.models)):
            found.setdefault(message, []).append(place)
    for message, held_at in found.items():
        yield message if len(held_at) == len(places) else f"{message} (in {', '.join(dict.fromkeys(held_at))})"


def _places(part: Part) -> Iterator[tuple[str, Part, str, int]]:
    """Yield (description, part, tensor name, layer of two) for each filter, and for what fits none, at both ends."""
    chains = [chain for per_model in part.clauses.values() for chain in per_model]
    conditions = dict.fromkeys((c.filter, c.group) for chain in chains for c in chain if not c.fits_all)
    names = {_name_of(*condition): _described(*condition) for condition in conditions}
    names["\x00"] = "the other tensors"  # no filter fits it, and no group
    of_what = "" if part.where == "models" else f" of {part.where.removesuffix('.models')}"
    for name, kind in names.items():
        if not all(any(clause.fits(name) for clause in chain) for chain in chains):
            continue
        for layer, end in ((0, "first"), (1, "last")):
            yield f"{kind} of the {end} layer{of_what}", part, name, layer


# A tensor name of each group, to ask what a setting by group gives.
_NAME_IN_GROUP = {
    "attention": "self_attn.q_proj.weight",
    "mlp": "mlp.up_proj.weight",
    "embedding": "embed_tokens.weight",
    "norm": "norm.weight",
    "head": "lm_head.weight",
}


def _name_of(part_of_name: str | None, group: str | None) -> str:
    return ".".join(part for part in (part_of_name, _NAME_IN_GROUP.get(group or "")) if part)


def _described(part_of_name: str | None, group: str | None) -> str:
    named = "" if part_of_name is None else f" named like '{part_of_name}'"
    return f"tensors{named}" if group is None else f"{group} tensors{named}"


def _linear_complement(recipe: Recipe) -> Iterator[str]:
    """Tell WiSE-FT from mergekit's average, wherever the recipe's own words could mean either."""
    if recipe.merge_method != "linear":
        return
    for part in (part for part in recipe.parts if part.base is not None):
        if "weight" in recipe.parameters or any("weight" in block for block in part.between):
            yield (
                f"linear with base_model '{recipe.base_model}' not among the models moves from the base towards them"
                " and leaves the base the rest of the weight (WiSE-FT); mergekit would average the base in with the"
                " same global weight. To choose, give each model its own weight, or list the base among the models too."
            )
        if any(clause.anchors != (True,) for chain in part.clauses["normalize"] for clause in chain):
            yield (
                f"'normalize' has no effect: with base_model '{recipe.base_model}' not among the models, linear moves"
                " from the base towards them, and the base takes what the weights leave (WiSE-FT). For a plain sum,"
                " list the base among the models, with a weight of its own."
            )


def _outer_gradients(recipe: Recipe) -> Iterator[str]:
    if recipe.gradient_outer is not None:
        return
    last_parts = {part.module: part for part in recipe.parts}.values()
    for name, chains in (item for part in last_parts for item in part.clauses.items()):
        for tensor_name in ("lm_head.weight", "model.norm.weight"):
            for chain in chains:
                clause = next((clause for clause in chain if clause.fits(tensor_name)), None)
                if clause is not None and clause.anchors[0] != clause.anchors[-1]:
                    yield (
                        f"the gradient of '{name}' gives lm_head and the final norm its last value; mergekit gives them"
                        " the first. Set 'gradient_outer: last' or 'gradient_outer: mergekit' to choose."
                    )


def _working_dtype(recipe: Recipe) -> Iterator[str]:
    if recipe.input_dtype is not None:
        yield (
            f"the inputs are rounded to dtype '{recipe.input_dtype}' before the merge, and lose what it cannot hold;"
            f" out_dtype '{recipe.out_dtype}' alone would keep it."
        )
    if recipe.rounding == "stochastic" and recipe.output_dtype == "float64":
        yield "rounding: stochastic has no effect: a float64 output is not rounded."
    if recipe.rounding == "stochastic" and recipe.output_dtype == "float32" and recipe.arithmetic != "float64":
        yield "rounding: stochastic has no effect: a float32 output is rounded only of weights stored in float64."
