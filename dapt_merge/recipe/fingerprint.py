"""A recipe's fingerprint: one name for everything that decides the bytes of the merge, and for nothing else.

The idea: hash the compiled clauses, not the text. Formatting, key order, `1` or `1.0`, a default spelled out, a weight
given once or under each model, and where the models lie on the disk all vanish; the contents of the inputs stay in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import xxhash

from dapt_merge.checkpoints.token_sources import TokenizerSettings
from dapt_merge.errors import InputError
from dapt_merge.methods.contract import Method
from dapt_merge.recipe.parts import Part, PartInput, same_model
from dapt_merge.recipe.schema import Recipe
from dapt_merge.recipe.settings import Clause

# Counts up when the meaning of a recipe changes, so that results kept under older fingerprints are not taken for new.
_VERSION = 1


def recipe_fingerprint(recipe: Recipe, inputs: Mapping[str, str], vocabulary: str | None = None) -> str:
    """Return the fingerprint of the merge that `recipe` describes.

    Args:
        recipe: a checked recipe.
        inputs: the content fingerprint (`Checkpoint.fingerprint()`) of each of `recipe.references()`.
        vocabulary: where the recipe settles the output's vocabulary, the fingerprint of the alignment.

    Returns:
        `"xxh3:"` and 32 hexadecimal digits.

    Raises:
        InputError: `inputs` lacks one of the recipe's references.
    """
    content = _canonical(recipe, inputs) | ({} if vocabulary is None else {"vocabulary": vocabulary})
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"xxh3:{xxhash.xxh3_128_hexdigest(text.encode())}"


def _canonical(recipe: Recipe, inputs: Mapping[str, str]) -> dict[str, Any]:
    chains = [chain for part in recipe.parts for per_model in part.clauses.values() for chain in per_model]
    has_gradients = any(clause.is_gradient for chain in chains for clause in chain)
    content: dict[str, Any] = {
        "version": _VERSION,
        "method": recipe.merge_method,
        # Whose configuration and tokenizer the output carries.
        "config": _content(recipe.config_reference(), inputs),
        "gradient_outer": (recipe.gradient_outer or "last") if has_gradients else None,
        "output_dtype": recipe.output_dtype,
        "seed": recipe.seed if recipe.method.random else None,
    }
    # Only what is used: recipes that leave these out keep the fingerprints that they had before these existed.
    if recipe.vocabulary is not None:
        content |= _canonical_vocabulary(recipe.vocabulary, inputs)
    if recipe.chat_template is not None:
        content["chat_template"] = recipe.chat_template
    if recipe.target is not None:
        content["target"] = _content(recipe.target, inputs)
    if recipe.freeze:
        content["freeze"] = sorted(set(recipe.freeze))
    if recipe.rounding == "stochastic":
        content |= {"rounding": "stochastic", "seed": recipe.seed}
    if recipe.input_dtype is not None:
        content["input_dtype"] = recipe.input_dtype
    if recipe.arithmetic not in (None, recipe.output_dtype):
        content["arithmetic"] = recipe.arithmetic
    if recipe.modules is None:
        return content | _canonical_parts(recipe.parts, recipe.method, inputs)
    modules = {
        name: _canonical_parts([part for part in recipe.parts if part.module == name], recipe.method, inputs)
        for name in recipe.modules
    }
    # A single module is the whole model, whatever it is called.
    return content | (next(iter(modules.values())) if len(modules) == 1 else {"modules": modules})


def _canonical_parts(parts: Sequence[Part], method: Method, inputs: Mapping[str, str]) -> dict[str, Any]:
    if len(parts) == 1 and parts[0].layers is None:
        return _canonical_part(parts[0], method, inputs)
    ranges = [[_layers(source, part) for source in part.inputs] for part in parts]
    return {
        "slices": [
            {**_canonical_part(part, method, inputs), "ranges": own} for part, own in zip(parts, ranges, strict=True)
        ]
    }


def _canonical_vocabulary(settings: TokenizerSettings, inputs: Mapping[str, str]) -> dict[str, Any]:
    # Of a model that is not merged, only the tokens count: the alignment's fingerprint holds them.
    merged = [name for name in settings.models() if any(same_model(name, known) for known in inputs)]
    named = settings.with_models(lambda name: _content(name, inputs) if name in merged else "outside").model_dump()
    content = {"tokenizer_source": named["source"]}
    if settings.tokens:
        content["tokens"] = named["tokens"]
    if (settings.pad_to_multiple_of or 1) > 1:
        content["pad_to_multiple_of"] = settings.pad_to_multiple_of
    return content


def _canonical_part(part: Part, method: Method, inputs: Mapping[str, str]) -> dict[str, Any]:
    files = [parameter.name for parameter in method.parameters if parameter.kind == "file"]
    return {
        "base": None if part.base is None else _content(part.base.model, inputs),
        "models": [_content(source.model, inputs) for source in part.models],
        "parameters": {
            name: [[_clause(clause, name in files) for clause in chain] for chain in chains]
            for name, chains in part.clauses.items()
        },
    }


def _layers(source: PartInput, part: Part) -> list[int]:
    return [source.first_layer, source.first_layer + (part.layers or 0)]


def _clause(clause: Clause, is_file: bool) -> list[Any]:
    if is_file:
        anchors: list[Any] = [_file_content(str(path)) for path in clause.anchors]
        return [clause.filter, anchors] if clause.group is None else [clause.filter, anchors, clause.group]
    # Adding 0.0 turns -0.0 into 0.0; `repr` in JSON keeps every bit of the rest.
    anchors = [a if isinstance(a, bool | str) else float(a) + 0.0 for a in clause.anchors]
    return [clause.filter, anchors] if clause.group is None else [clause.filter, anchors, clause.group]


def _file_content(path: str) -> str:
    """Return the fingerprint of a file's bytes; a file that has not changed since is not read again."""
    try:
        stated = os.stat(path)
        return _hashed_file(path, stated.st_size, stated.st_mtime_ns)
    except OSError as error:
        raise InputError(
            f"the file cannot be read ({error.strerror})", where=path, remedy="Correct the path in the recipe."
        ) from None


@lru_cache(maxsize=64)
def _hashed_file(path: str, size: int, modified_ns: int) -> str:
    total = xxhash.xxh3_128()
    with open(path, "rb") as stream:
        while part := stream.read(2**20):
            total.update(part)
    return f"xxh3:{total.hexdigest()}"


def _content(reference: str, inputs: Mapping[str, str]) -> str:
    for name, fingerprint in inputs.items():
        if same_model(name, reference):
            return fingerprint
    raise InputError(
        f"no fingerprint was given for '{reference}'",
        where="inputs",
        remedy=f"Pass one for each of: {', '.join(inputs) or reference}.",
    )
