"""The one way in for YAML files and `key=value` overrides: read safely, and say where what is wrong.

A key given twice is an error here, where YAML would silently take the last. What the keys mean is known to the readers.
"""

from __future__ import annotations

import copy
import os
import reprlib
from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dapt_merge.errors import InputError, nearest

if TYPE_CHECKING:
    from pydantic import ValidationError

# A description is a page of text; anything of this size is another file given by mistake.
_LARGEST_FILE_BYTES = 2**20


def read_documents(path: str | Path, *, noun: str, remedy: str) -> list[Any]:
    """Read the documents of a YAML file, empty ones left out.

    Args:
        path: the file.
        noun: what it should be ("recipe", "study", "suite"), for the messages.
        remedy: what to do when it is something else.

    Raises:
        InputError: the file is missing, cannot be read, is no UTF-8, no YAML (with the line), empty or too large, or
            gives a key twice.
    """
    path = Path(path)
    text = _text(path, noun, remedy)
    try:
        # Derives from SafeLoader: nothing but plain data can come out of it.
        documents = [content for content in yaml.load_all(text, Loader=_StrictLoader) if content is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise InputError(
            f"this is not valid YAML: {problem}",
            where=f"{path}{line}",
            remedy="Correct that line; indent with spaces only.",
        ) from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"this is not a {noun}: {error}", where=path, remedy=remedy) from None
    if not documents:
        raise InputError(f"the {noun} is empty", where=path, remedy=remedy)
    return documents


def read_mapping(path: str | Path, *, noun: str, remedy: str) -> dict[str, Any]:
    """Read a YAML file that holds one mapping; arguments and errors as for `read_documents`.

    Raises:
        InputError: also when the file holds no mapping, or more than one document.
    """
    documents = read_documents(path, noun=noun, remedy=remedy)
    if len(documents) > 1 or not isinstance(documents[0], dict):
        found = f"{len(documents)} documents" if len(documents) > 1 else type(documents[0]).__name__
        raise InputError(
            f"this is not a {noun}: expected a mapping of keys to values, found {found}", where=path, remedy=remedy
        )
    return documents[0]


def _text(path: Path, noun: str, remedy: str) -> str:
    try:
        if path.is_file() and path.stat().st_size > _LARGEST_FILE_BYTES:
            raise InputError(f"this file is too large to be a {noun} (over 1 MiB)", where=path, remedy=remedy)
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise InputError(f"there is no such file.{nearest(path.name, siblings)}", where=path, remedy=remedy) from None
    except IsADirectoryError:
        raise InputError(f"this is a folder, not a {noun}", where=path, remedy=remedy) from None
    except UnicodeDecodeError:
        raise InputError("this file is not UTF-8 text", where=path, remedy=remedy) from None
    except OSError as error:
        raise InputError(f"the {noun} cannot be read ({error.strerror})", where=path, remedy=remedy) from None


def explained(
    error: ValidationError,
    where: str | Path,
    fields_at: Callable[[tuple[int | str, ...]], Sequence[str]],
    remedy_at: Callable[[tuple[int | str, ...]], str | None] = lambda location: None,
) -> InputError:
    """Say the first of pydantic's findings in three parts; a misspelt key before the missing one that it causes.

    Args:
        error: what pydantic raised.
        where: the file.
        fields_at: the known keys of the section at a location.
        remedy_at: what to do about an unknown key at a location, where the reader knows more than the known keys.
    """
    findings = error.errors(include_url=False)
    first = next((finding for finding in findings if finding["type"] == "extra_forbidden"), findings[0])
    location, given = first["loc"], first.get("input")
    key = ".".join(str(part) for part in location)
    place, name = (f"{where}: {key}", str(location[-1])) if location else (str(where), "")
    if first["type"] == "extra_forbidden":
        known = list(fields_at(location[:-1]))
        remedy = remedy_at(location) or f"Known keys here: {', '.join(known)}."
        return InputError(f"unknown key '{name}'.{nearest(name, known)}", where=place, remedy=remedy)
    if first["type"] == "missing":
        return InputError(f"the key '{name}' is missing", where=place, remedy=f"Add '{name}: …'.")
    expected = _EXPECTED.get(first["type"])
    if expected is not None:
        start = f"{key}: " if key else ""
        return InputError(
            f"{start}{expected}, found {kind_of(given)}", where=place, remedy="Change the value to that type."
        )
    message = first["msg"].removeprefix("Value error, ")
    found = "" if first["type"] == "value_error" and isinstance(given, dict) else f" (found {reprlib.repr(given)})"
    choices = first.get("ctx", {}).get("expected", "") if first["type"] == "literal_error" else ""
    hint = nearest(str(given), [choice.strip(" '") for choice in choices.replace(" or ", ",").split(",")])
    return InputError(f"{key}: {message}{found}{hint}" if key else message, where=place, remedy="Correct the value.")


_EXPECTED = {
    "string_type": "a text is expected",
    "int_type": "a whole number is expected",
    "int_parsing": "a whole number is expected",
    "int_from_float": "a whole number is expected",
    "float_type": "a number is expected",
    "float_parsing": "a number is expected",
    "bool_type": "true or false is expected",
    "list_type": "a list is expected",
    "dict_type": "a mapping of names to values is expected",
    "model_type": "a mapping of keys to values is expected",
    "model_attributes_type": "a mapping of keys to values is expected",
}


def located(reference: str, folder: Path) -> str:
    """Return where a path written in a file leads: as seen from here, else from the file's own folder.

    Args:
        reference: what the file says; `~` is the home folder.
        folder: where the file lies.

    Returns:
        The path, or `reference` as it is when neither place has it: it may be a hub id, or is missing.
    """
    expanded = os.path.expanduser(reference)
    if os.path.exists(expanded) or os.path.isabs(expanded):
        return expanded
    beside = folder / expanded
    return os.path.normpath(beside) if beside.exists() else reference


def parse_override(text: str) -> tuple[str, Any]:
    """Split `key=value` and read the value as YAML.

    Example:
        >>> parse_override("t=[0, 0.5]")
        ('t', [0, 0.5])
    """
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise InputError(
            f"'{text}' is not of the form key=value",
            where="the overrides",
            remedy="Write for example t=0.3 or models.0.parameters.weight=0.6.",
        )
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        raise InputError(
            f"the value in '{text}' is not valid YAML", where=key, remedy="Quote it, for example 't=[0, 0.5]'."
        ) from None
    if value is None:
        raise InputError(f"'{text}' gives no value", where=key, remedy="Write a value after the equals sign.")
    return key.strip(), value


def overridden(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of a file's mapping with `key=value` overrides applied; a dotted key reaches inside.

    Raises:
        InputError: as `parse_override` and `set_at`.

    Example:
        >>> overridden({"corpus": [{"path": "a"}]}, ["corpus.0.path=b", "seed=1"])
        {'corpus': [{'path': 'b'}], 'seed': 1}
    """
    edited = copy.deepcopy(dict(content))
    for text in overrides:
        key, value = parse_override(text)
        set_at(edited, key.split("."), value, key)
    return edited


def configured(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str],
    *,
    noun: str,
    remedy: str,
    locate: Callable[[dict[str, Any], Path], None],
) -> tuple[dict[str, Any], str]:
    """Return what a YAML file or a mapping of its shape says, overrides applied, and what to call it in errors.

    Args:
        source: the path of a YAML file, or a mapping.
        overrides: as for `overridden`.
        noun, remedy: as for `read_mapping`.
        locate: points the inputs of a file's content, which it changes, to where they are found from the file's folder.

    Raises:
        InputError: as `read_mapping` and `overridden`.
    """
    if isinstance(source, Mapping):
        return overridden(source, overrides), "configuration"
    content = overridden(read_mapping(source, noun=noun, remedy=remedy), overrides)
    locate(content, Path(source).parent)
    return content, str(source)


def set_at(content: dict[str, Any], path: Sequence[str], value: Any, key: str) -> None:
    """Set the value at a path through mappings and lists, making a missing mapping on the way.

    Args:
        content: changed in place.
        path: keys of mappings and indices of lists, outermost first.
        value: what to set.
        key: what the user wrote, for messages.

    Raises:
        InputError: an index past the end of a list, or a path that goes on inside a single value.
    """
    here: Any = content
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                raise InputError(
                    f"'{part}' is not an index into the list '{'.'.join(path[:depth])}' of {len(here)} entries",
                    where=key,
                    remedy=f"Count from 0 to {len(here) - 1}.",
                )
            index: Any = int(part)
        elif isinstance(here, MutableMapping):
            index = part
            if not last and here.get(part) is None:
                here[part] = {}
        else:
            raise InputError(
                f"'{'.'.join(path[:depth])}' is {kind_of(here)} and has no '{part}'",
                where=key,
                remedy=f"Set '{'.'.join(path[:depth])}' itself.",
            )
        if last:
            here[index] = value
        else:
            here = here[index]


def kind_of(value: object) -> str:
    """Say what a value from a YAML file is, for messages."""
    names = {dict: "a mapping", list: "a list", str: "a text", bool: "a flag", type(None): "nothing"}
    shown = "" if value is None or isinstance(value, dict | list) else f" ({reprlib.repr(value)})"
    return names.get(type(value), f"a {type(value).__name__}") + shown


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key.value}' is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)
