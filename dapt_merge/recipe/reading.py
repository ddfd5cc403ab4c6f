"""Recipe files and overrides: YAML ▶ mapping ▶ overrides ▶ checked `Recipe`, with every fault told by file and key.

What this module does not know: what the values mean; `schema` and `settings` check them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dapt_merge import yaml_files
from dapt_merge.checkpoints.references import split_architecture, with_architecture
from dapt_merge.errors import InputError, nearest
from dapt_merge.methods.registry import get_method, method_names
from dapt_merge.recipe.schema import (
    Average,
    ModelInput,
    Module,
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
        _shorten_references(edited)
        if folder is not None:
            _locate_models(edited, folder, names)
        return Recipe.model_validate(edited)
    except ValidationError as error:
        raise yaml_files.explained(error, origin, _fields_at, _remedy_at) from None
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
    if first in Recipe.model_fields:
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


def _parameter_blocks(content: Mapping[str, Any], prefix: Sequence[str] = ()) -> list[list[str]]:
    """Return the paths of all mappings below the top level that may have `parameters`.

    These are models, slices and their sources, and modules with the same inside.
    """
    paths: list[list[str]] = []
    modules = content.get("modules") if not prefix else None
    for name, module in modules.items() if isinstance(modules, dict) else ():
        if isinstance(module, dict):
            paths += [["modules", name], *_parameter_blocks(module, ["modules", name])]
    for key in ("models", "slices"):
        entries = content.get(key)
        for index, entry in enumerate(entries if isinstance(entries, list) else ()):
            if isinstance(entry, dict):
                paths.append([*prefix, key, str(index)])
                sources = entry.get("sources")
                listed = enumerate(sources if isinstance(sources, list) else ())
                paths += [[*paths[-1], "sources", str(i)] for i, source in listed if isinstance(source, dict)]
    if prefix:
        return paths
    return [path for path in paths if isinstance(_at(content, path).get("parameters") or {}, Mapping)]


def _at(content: Any, path: Sequence[str]) -> Any:
    for part in path:
        content = content[int(part)] if isinstance(content, list) else content[part]
    return content


def _shorten_references(content: MutableMapping[str, Any]) -> None:
    """Write references in mergekit's long form ({model: {path, revision}, lora: …}) as texts; see `references`."""
    for path in ([], *_parameter_blocks(content)):
        entry = _at(content, path)
        for key in ("base_model", "model", "tokenizer_source"):
            if isinstance(entry.get(key), Mapping):
                entry[key] = _short(entry[key], ".".join([*path, key]))
    block = content.get("tokenizer")
    if not isinstance(block, MutableMapping):
        return
    if isinstance(block.get("source"), Mapping):
        block["source"] = _short(block["source"], "tokenizer.source")
    tokens = block.get("tokens")
    for token, entry in tokens.items() if isinstance(tokens, Mapping) else ():
        source = entry.get("source") if isinstance(entry, MutableMapping) else None
        where = f"tokenizer.tokens.{token}.source"
        if isinstance(source, Mapping) and source and set(source) <= set(_LONG_FORM):
            entry["source"] = _short(source, where)
        elif isinstance(source, MutableMapping) and isinstance(source.get("model"), Mapping):
            source["model"] = _short(source["model"], f"{where}.model")


_LONG_FORM = ("model", "lora", "override_architecture")


def _short(reference: Mapping[str, Any], where: str) -> str:
    paths = {"model": reference.get("model"), "lora": reference.get("lora")}
    unknown = [str(key) for key, value in reference.items() if key not in _LONG_FORM and value is not None]
    if unknown or paths["model"] is None:
        hint = nearest(unknown[0], _LONG_FORM) if unknown else ""
        what = f"a model's long form has no '{unknown[0]}'.{hint}" if unknown else "this model has no 'model:' in it"
        raise InputError(
            what,
            where=where,
            remedy="Write 'model: PATH', 'model: PATH@REVISION' or 'model: PATH+ADAPTER'.",
        )
    architecture = reference.get("override_architecture")
    if architecture is not None and not (isinstance(architecture, str) and architecture.isidentifier()):
        raise InputError(
            f"expected the name of a model class, found {yaml_files.kind_of(architecture)}",
            where=f"{where}.override_architecture",
            remedy="Write for example 'override_architecture: LlamaForCausalLM'.",
        )
    short = "+".join(_short_path(part, f"{where}.{key}") for key, part in paths.items() if part is not None)
    return with_architecture(short, architecture)


def _short_path(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("path"), str) and set(part) <= {"path", "revision"}:
        return part["path"] if part.get("revision") is None else f"{part['path']}@{part['revision']}"
    if isinstance(part, str):
        return part
    raise InputError(f"expected a path, found {yaml_files.kind_of(part)}", where=where, remedy="Write PATH@REVISION.")


def relocated(recipe: Recipe, locate: Callable[[str], str]) -> Recipe:
    """Return the recipe with every path or hub id in it replaced by what `locate` returns for it.

    Each of a list of checkpoints is asked for alone, and so are the parts of a `model+adapter` that stays as it is.

    Example:
        >>> recipe = load_recipe({"merge_method": "linear", "models": [{"model": "a"}, {"model": "b+c"}]}, ["weight=1"])
        >>> moved = {"a": "old/a", "c": "new/c"}
        >>> relocated(recipe, lambda path: moved.get(path, path)).references()
        ('old/a', 'b+new/c')
    """
    content: dict[str, Any] = yaml.safe_load(recipe.to_yaml())
    _replace_paths(content, locate)
    return Recipe.model_validate(content)


def _locate_models(content: MutableMapping[str, Any], folder: Path, names: Collection[str]) -> None:
    """Replace each path that does not exist from here, but does from the recipe's own folder."""
    _replace_paths(
        content, lambda reference: reference if reference in names else yaml_files.located(reference, folder)
    )


def _replace_paths(content: MutableMapping[str, Any], locate: Callable[[str], str]) -> None:
    def replaced(reference: Any) -> Any:
        if not isinstance(reference, str) or not reference:
            return reference
        plain, architecture = split_architecture(reference)
        if architecture is not None:
            return with_architecture(replaced(plain), architecture)
        found = locate(reference)
        if found == reference and "+" in reference and not os.path.exists(reference):  # model+adapter
            model, _, adapter = reference.rpartition("+")
            return f"{replaced(model)}+{replaced(adapter)}"
        return found

    for entry in (content, *(_at(content, path) for path in _parameter_blocks(content))):
        for key in ("base_model", "target") if entry is content else ("base_model", "model"):
            if key in entry and not _has_members(entry):
                entry[key] = replaced(entry[key])
        _replace_members(entry, replaced)
        parameters = entry.get("parameters")
        for name in _file_parameters(content) if isinstance(parameters, MutableMapping) else ():
            if name in parameters:
                parameters[name] = replaced(parameters[name])
    _replace_in_vocabulary(content, replaced)


def _replace_in_vocabulary(content: MutableMapping[str, Any], replaced: Callable[[Any], Any]) -> None:
    """Replace the models that `tokenizer_source` and the `tokenizer` block name."""
    block = content.get("tokenizer")
    tokens = block.get("tokens") if isinstance(block, MutableMapping) else None
    places = [(content, "tokenizer_source")]
    if isinstance(block, MutableMapping):
        places.append((block, "source"))
    for entry in tokens.values() if isinstance(tokens, MutableMapping) else ():
        if isinstance(entry, MutableMapping):
            inner = entry.get("source")
            places.append((inner, "model") if isinstance(inner, MutableMapping) else (entry, "source"))
    for mapping, key in places:
        if mapping.get(key) not in (None, "base", "union"):
            mapping[key] = replaced(mapping[key])


def _has_members(entry: Mapping[str, Any]) -> bool:
    """Say whether an entry averages a list of checkpoints, and so is named after them."""
    average = entry.get("average")
    return isinstance(average, Mapping) and isinstance(average.get("checkpoints"), list)


def _replace_members(entry: MutableMapping[str, Any], replaced: Callable[[Any], Any]) -> None:
    """Replace the checkpoints that an entry averages; the entry is named after them anew."""
    average = entry.get("average")
    if isinstance(average, MutableMapping) and _has_members(entry):
        if entry.get("model") == ", ".join(map(str, average["checkpoints"])):
            del entry["model"]
        average["checkpoints"] = [replaced(reference) for reference in average["checkpoints"]]


def _file_parameters(content: Mapping[str, Any]) -> list[str]:
    """Return the names of the method's parameters that are paths; none when there is no such method."""
    name = content.get("merge_method")
    if name not in method_names():
        return []
    return [parameter.name for parameter in get_method(name).parameters if parameter.kind == "file"]


def _remedy_at(location: tuple[int | str, ...]) -> str | None:
    """Return where a model's own parameter, or its range of layers, belongs that was written beside the model."""
    *parents, name = map(str, location)
    if name == "layer_range" and "models" in parents:
        return (
            "Whole models are merged here (mergekit passes over the range): remove it; to merge some of the layers,"
            " write 'slices: [{sources: [{model: …, layer_range: …}, …]}]' instead of 'models'."
        )
    if not parents or name not in ("weight", "density"):
        return None
    return f"Put it under the model's 'parameters:' ({'.'.join([*parents, 'parameters', name])})."


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that are known in the section at a location."""
    path = [str(part) for part in location]
    top: type[BaseModel] = Recipe
    if path[:1] == ["modules"]:
        top, path = Module, path[2:]
    if "average" in path:
        return list(Average.model_fields)
    if path[:1] == ["tokenizer"]:
        return list(TokenizerSettings.model_fields)
    if path[:1] == ["slices"]:
        return list((SliceSource if "sources" in path else Slice).model_fields)
    return list((ModelInput if path[:1] == ["models"] else top).model_fields)
