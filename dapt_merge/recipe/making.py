"""A recipe from a few arguments: what `dm.merge(base, dapt, method=…)` and the command line's flags mean.

What this module does not know: files; the result is the same kind of `Recipe` that a file gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dapt_merge.errors import InputError
from dapt_merge.methods.contract import Method
from dapt_merge.methods.registry import get_method
from dapt_merge.recipe.parts import is_of_another_method, unknown_parameter
from dapt_merge.recipe.reading import build_recipe
from dapt_merge.recipe.schema import Recipe

_RECIPE_KEYS = ("dtype", "out_dtype", "seed", "gradient_outer", "tokenizer_source", "tokenizer")


def make_recipe(
    base: str, dapt: Sequence[str], method: str, *, overrides: Sequence[str] = (), **parameters: Any
) -> Recipe:
    """Build the recipe that merges `dapt` into `base` with `method`.

    Args:
        base: the base's path, hub id or label.
        dapt: those of the DAPT checkpoints, one or more.
        method: a registered method's name.
        overrides: `key=value` as in `load_recipe`, applied last.
        parameters: the method's parameters by name (`lambda_` for `lambda`). For one that is per model, a single value
            holds for every DAPT checkpoint and a list gives one value each; where a method takes the base for a model
            like the others (`fisher`, `regmean`), a list may have one value more, the first, for the base. `weight` is
            `t` for slerp, which has no weight. `dtype`, `out_dtype`, `seed` and `gradient_outer` are the recipe's keys
            of that name.

    Raises:
        InputError: an unknown method or parameter, a list of the wrong length, a value out of range.

    Example:
        >>> make_recipe("base", ["dapt"], "slerp", weight=0.5).parameters
        {'t': 0.5}
    """
    declared = get_method(method)
    given = _named_as_declared(parameters, declared)
    content: dict[str, Any] = {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": reference, "parameters": {}} for reference in dapt],
        "parameters": {},
    }
    for name, value in given.items():
        if name in _RECIPE_KEYS:
            content[name] = value
            continue
        parameter = declared.parameter(name)
        if is_of_another_method(name, declared):  # a file from elsewhere may hold it; whoever writes it here errs
            raise unknown_parameter(name, declared, f"arguments: {name}")
        if parameter is not None and parameter.per_model:
            # Written under each model: there it says whose weight it is, also to mergekit's `linear`.
            entries = _entries_meant(content, declared, value, len(dapt))
            labels = [entry["model"] for entry in entries]
            for entry, own in zip(entries, _one_each(name, value, labels), strict=True):
                entry["parameters"][name] = own
        else:
            content["parameters"][name] = value
    return build_recipe(content, overrides, "arguments")


def _entries_meant(content: dict[str, Any], method: Method, value: Any, count: int) -> list[dict[str, Any]]:
    """Return the entries that a per-model parameter is for: the DAPT checkpoints, or those and the base before them."""
    entries: list[dict[str, Any]] = content["models"]
    if method.base != "unused" or not isinstance(value, list | tuple) or len(value) != count + 1:
        return entries[-count:]
    if len(entries) == count:
        entries.insert(0, {"model": content["base_model"], "parameters": {}})
    return entries


def _named_as_declared(parameters: Mapping[str, Any], method: Method) -> dict[str, Any]:
    given = {name.removesuffix("_"): value for name, value in parameters.items() if value is not None}
    takes_t = method.share is not None and method.share.name == "t"
    if takes_t and "weight" in given:
        if "t" in given:
            raise InputError(
                f"both weight ({given['weight']}) and t ({given['t']}) are given; for {method.name} they are one thing",
                where="arguments: weight",
                remedy="Give one of the two.",
            )
        weight = given.pop("weight")
        given["t"] = weight[0] if isinstance(weight, list | tuple) and len(weight) == 1 else weight
    return given


def _one_each(name: str, value: Any, dapt: Sequence[str]) -> list[Any]:
    is_list = isinstance(value, list | tuple) and not any(isinstance(entry, Mapping) for entry in value)
    values = list(value) if is_list else [value] * len(dapt)  # a list of filters is one setting, for all of them
    if len(values) != len(dapt):
        raise InputError(
            f"{name} has {len(values)} values for {len(dapt)} DAPT checkpoint(s)",
            where=f"arguments: {name}",
            remedy="Give one value for all, or one each. (A gradient over the layers goes into a recipe file.)",
        )
    return values
