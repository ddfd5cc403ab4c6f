"""Recipe files and overrides: YAML ▶ mapping ▶ overrides ▶ checked `Recipe`, with every fault told by file and key.

What this module does not know: what the values mean; `schema` and `settings` check them.
"""

from __future__ import annotations

import copy
import os
import reprlib
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dapt_merge import yaml_files
from dapt_merge.errors import InputError, nearest
from dapt_merge.methods.registry import get_method, method_names
from dapt_merge.recipe.schema import (
    UNSUPPORTED_KEYS,
    Average,
    ModelInput,
    Recipe,
    Slice,
    SliceSource,
    TokenizerSettings,
)


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML file, or from a mapping of the same shape, and check all of it.

    Relative model paths are relative to the current folder; one that does not exist there, but does beside the recipe
    file, is taken from there.

    Args:
        source: the path of a YAML file, or a mapping.
        overrides: `key=value` each, the value in YAML. Keys are dotted paths (`models.1.parameters.weight=0.6`,
            `merge_method=ties`) or the name of one of the method's parameters (`t=0.3`).

    Raises:
        InputError: the file is missing, empty, not YAML; a key is unknown or not supported yet; a value has the wrong
            type or is out of range; a required one is missing. It names the file and the key.

    Example:
        >>> recipe = load_recipe(
        ...     {"merge_method": "slerp", "base_model": "b", "models": [{"model": "d"}], "parameters": {"t": 0.5}},
        ...     overrides=["t=0.3"],
        ... )
        >>> recipe.parameters
        {'t': 0.3}
    """
    if isinstance(source, Mapping):
        return build_recipe(source, overrides, "recipe")
    path = Path(source)
    documents = read_documents(path)
    if len(documents) > 1:
        raise InputError(
            f"this file holds {len(documents)} recipes, and one is expected here",
            where=path,
            remedy="Run it with 'dapt-merge merge', which merges them in order; or keep one recipe a file.",
        )
    return build_recipe(documents[0], overrides, str(path), folder=path.parent)


def read_documents(path: Path) -> list[dict[str, Any]]:
    """Return the mappings that a YAML file holds, one for each of its documents; nothing in them is checked.

    Raises:
        InputError: the file cannot be read, is empty, not YAML, or a document is no mapping.
    """
    remedy = "Give the path of a YAML recipe; recipes/ holds some to start from."
    documents = yaml_files.read_documents(path, noun="recipe", remedy=remedy)
    for content in documents:
        if not isinstance(content, dict):
            raise InputError(
                f"a recipe is a mapping of keys to values; this file holds {yaml_files.kind_of(content)}",
                where=path,
                remedy="Start from one of the files in recipes/: it needs at least 'models' and 'merge_method'.",
            )
    return documents


def build_recipe(
    content: Mapping[str, Any],
    overrides: Sequence[str],
    origin: str,
    folder: Path | None = None,
    names: Collection[str] = (),
) -> Recipe:
    """Apply overrides to a mapping and check it; faults are told as `origin: key`.

    With a folder, model paths are looked up there too; `names` are references that are no paths.
    """
    try:
        edited = apply_overrides(content, overrides)
        if folder is not None:
            _locate_models(edited, folder, names)
        _refuse_unsupported(edited)
        return Recipe.model_validate(edited)
    except ValidationError as error:
        raise _explained(error, origin) from None
    except InputError as error:
        where = origin if error.where is None else f"{origin}: {error.where}"
        raise InputError(error.what, where=where, remedy=error.remedy) from None


def apply_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of a recipe's mapping with `key=value` overrides applied, a change of method first.

    Raises:
        InputError: no `=`, a value that is not YAML, an unknown key, an index past the end of a list.
    """
    edited = copy.deepcopy(dict(content))
    pairs = [yaml_files.parse_override(text) for text in overrides]
    # The method decides which short names exist, wherever it stands on the command line.
    for key, value in sorted(pairs, key=lambda pair: pair[0] != "merge_method"):
        yaml_files.set_at(edited, _full_path(key, edited), value, key)
    return edited


def _full_path(key: str, content: Mapping[str, Any]) -> list[str]:
    """Turn a short name (`t`) into the one place in the recipe that it means; leave dotted paths as they are."""
    first, *rest = key.split(".")
    if first in Recipe.model_fields or first in UNSUPPORTED_KEYS:
        return [first, *rest]
    method = content.get("merge_method")
    names = [parameter.name for parameter in get_method(method).parameters] if isinstance(method, str) else []
    if rest or first not in names:
        raise InputError(
            f"unknown key '{key}'.{nearest(first, [*Recipe.model_fields, *names])}",
            where=key,
            remedy=f"Give a key of the recipe ({', '.join(Recipe.model_fields)}) or a parameter of {method}"
            f" ({', '.join(names)}).",
        )
    own = [path for path in _parameter_blocks(content) if first in (_at(content, path).get("parameters") or {})]
    if len(own) > 1:
        raise InputError(
            f"{len(own)} models have their own '{first}', so '{key}=…' does not say which to change",
            where=key,
            remedy=f"Name one: {', '.join('.'.join([*path, 'parameters', first]) + '=…' for path in own)}.",
        )
    return [*own[0], "parameters", first] if own else ["parameters", first]


def _parameter_blocks(content: Mapping[str, Any]) -> list[list[str]]:
    """Return the paths of all mappings below the top level that may have `parameters`: models, slices, sources."""
    paths = []
    for key in ("models", "slices"):
        entries = content.get(key)
        for index, entry in enumerate(entries if isinstance(entries, list) else ()):
            if isinstance(entry, dict):
                paths.append([key, str(index)])
                sources = entry.get("sources")
                listed = enumerate(sources if isinstance(sources, list) else ())
                paths += [[key, str(index), "sources", str(i)] for i, source in listed if isinstance(source, dict)]
    return [path for path in paths if isinstance(_at(content, path).get("parameters") or {}, Mapping)]


def _at(content: Any, path: Sequence[str]) -> Any:
    for part in path:
        content = content[int(part)] if isinstance(content, list) else content[part]
    return content


def _locate_models(content: MutableMapping[str, Any], folder: Path, names: Collection[str]) -> None:
    """Replace each path that does not exist from here, but does from the recipe's own folder."""

    def located(reference: Any) -> Any:
        if not isinstance(reference, str) or not reference or reference in names:
            return reference
        expanded = os.path.expanduser(reference)
        if os.path.exists(expanded) or os.path.isabs(expanded):
            return expanded
        beside = folder / expanded
        if not beside.exists() and "+" in reference:  # model+adapter
            model, _, adapter = reference.rpartition("+")
            return f"{located(model)}+{located(adapter)}"
        return os.path.normpath(beside) if beside.exists() else reference

    for entry in (content, *(_at(content, path) for path in _parameter_blocks(content))):
        for key in ("base_model", "target", "tokenizer_source") if entry is content else ("base_model", "model"):
            if key in entry:
                entry[key] = located(entry[key])
        average = entry.get("average")
        if isinstance(average, MutableMapping) and isinstance(average.get("checkpoints"), list):
            average["checkpoints"] = [located(reference) for reference in average["checkpoints"]]
        parameters = entry.get("parameters")
        for name in _file_parameters(content) if isinstance(parameters, MutableMapping) else ():
            if name in parameters:
                parameters[name] = located(parameters[name])


def _file_parameters(content: Mapping[str, Any]) -> list[str]:
    """Return the names of the method's parameters that are paths; none when there is no such method."""
    name = content.get("merge_method")
    if name not in method_names():
        return []
    return [parameter.name for parameter in get_method(name).parameters if parameter.kind == "file"]


def _refuse_unsupported(content: Mapping[str, Any]) -> None:
    for key, remedy in UNSUPPORTED_KEYS.items():
        if key in content:
            raise InputError(f"'{key}' is a mergekit key that is not supported yet", where=key, remedy=remedy)


def _explained(error: ValidationError, origin: str) -> InputError:
    """Say the first of pydantic's findings in our own three parts; a misspelt key before the one it leaves missing."""
    finding = min(error.errors(include_url=False), key=lambda finding: finding["type"] != "extra_forbidden")
    path = [str(part) for part in finding["loc"]]
    where = f"{origin}: {'.'.join(path)}" if path else origin
    fields = _fields_at(path)
    if finding["type"] == "extra_forbidden":
        remedy = f"Known keys here: {', '.join(fields)}."
        if fields is not Recipe.model_fields and path[-1] in ("weight", "density"):
            remedy = f"Put it under the model's 'parameters:' ({'.'.join([*path[:-1], 'parameters', path[-1]])})."
        return InputError(f"unknown key '{path[-1]}'.{nearest(path[-1], list(fields))}", where=where, remedy=remedy)
    if finding["type"] == "missing":
        return InputError(f"the key '{path[-1]}' is missing", where=where, remedy=f"Add '{path[-1]}: …' to the recipe.")
    given = finding.get("input")
    if finding["type"].endswith("_type"):
        expected = _EXPECTED.get(finding["type"], finding["msg"])
        return InputError(
            f"'{path[-1] if path else 'recipe'}' is {yaml_files.kind_of(given)}; {expected}",
            where=where,
            remedy="Change the value to that type.",
        )
    message = finding["msg"].removeprefix("Value error, ")
    return InputError(f"{message} (found {reprlib.repr(given)})", where=where, remedy="Correct the value.")


def _fields_at(path: Sequence[str]) -> Mapping[str, Any]:
    """Return the keys that are known where a finding lies."""
    if "average" in path[:-1]:
        return Average.model_fields
    if path[:1] == ["tokenizer"] and len(path) > 1:
        return TokenizerSettings.model_fields
    if path[:1] == ["slices"] and len(path) > 2:
        return SliceSource.model_fields if path[2:3] == ["sources"] and len(path) > 4 else Slice.model_fields
    return ModelInput.model_fields if path[:1] == ["models"] and len(path) > 1 else Recipe.model_fields


_EXPECTED = {
    "string_type": "a text is expected",
    "int_type": "a whole number is expected",
    "list_type": "a list is expected",
    "dict_type": "a mapping of names to values is expected",
    "model_type": "a mapping with the key 'model' is expected",
    "model_attributes_type": "a mapping with the key 'model' is expected",
}
