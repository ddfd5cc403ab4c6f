"""Do two checkpoints give the same meaning to the same token id?

Averaging row 17 of two embeddings makes sense only when row 17 is the same token. This module compares tokenizer
files; it does not load tokenizers and does not align different ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapt_merge.checkpoints.checkpoint import Checkpoint
from dapt_merge.errors import InputError

_VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


def check_same_vocabulary(first: Checkpoint, second: Checkpoint) -> str | None:
    """Raise unless the two tokenizers map the same tokens to the same ids.

    Returns:
        None when they agree, or when neither has a tokenizer; a sentence for the report when they cannot be compared.

    Raises:
        InputError: a token differs; it is named with both ids.
    """
    if first.vocabulary_key is not None and first.vocabulary_key == second.vocabulary_key:
        return None
    if first.folder is None or second.folder is None or first.folder == second.folder:
        return None
    of_first, of_second = _files(first.folder), _files(second.folder)
    shared = [name for name in of_first if name in of_second]
    if not of_first and not of_second:
        return None
    if not shared:
        return f"the vocabularies of {first.label} and {second.label} were not compared: no tokenizer file in common"
    name = shared[0]
    one, other = (first.folder / name).read_bytes(), (second.folder / name).read_bytes()
    if one == other:
        return None
    if not name.endswith(".json"):
        raise _different(first, second, f"their {name} differ")
    ids, other_ids = _token_ids(first.folder / name, one), _token_ids(second.folder / name, other)
    differing = sorted(
        (token for token in ids.keys() | other_ids.keys() if ids.get(token) != other_ids.get(token)),
        key=lambda token: (ids.get(token, other_ids.get(token, 0)), token),
    )
    if differing:
        token = differing[0]
        raise _different(
            first,
            second,
            f"{len(differing)} tokens differ, the first is {token!r}: "
            f"id {ids.get(token, 'none')} in {first.label}, {other_ids.get(token, 'none')} in {second.label}",
        )
    return None


def token_ids(checkpoint: Checkpoint) -> dict[str, int] | None:
    """Return token → id of a checkpoint's tokenizer, tokens added to it included; None when none can be read.

    Raises:
        InputError: the file is there and garbled.
    """
    folder = checkpoint.folder
    name = next((name for name in _files(folder) if not name.endswith(".model")), None) if folder else None
    if folder is None or name is None:
        return None
    if name == "vocab.txt":
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        found = {token: row for row, token in enumerate(lines)}
    else:
        found = _token_ids(folder / name, (folder / name).read_bytes())
    extra = folder / "added_tokens.json"
    return found | (_token_ids(extra, extra.read_bytes()) if extra.is_file() else {})


def has_tokenizer(folder: Path) -> bool:
    """Say whether a folder holds a tokenizer's vocabulary."""
    return bool(_files(folder))


def _files(folder: Path) -> list[str]:
    return [name for name in _VOCABULARY_FILES if (folder / name).is_file()]


def _different(first: Checkpoint, second: Checkpoint, detail: str) -> InputError:
    return InputError(
        f"two different vocabularies: {detail}",
        where=f"{first.label} and {second.label}",
        remedy="Merge checkpoints that share one tokenizer, or write 'tokenizer_source: base' (or union) into the "
        "recipe: embeddings are then aligned by token.",
    )


def _token_ids(path: Path, content: bytes) -> dict[str, int]:
    """Return token → id from a tokenizer.json (vocabulary and added tokens) or a vocab.json."""
    try:
        data: Any = json.loads(content)
        if path.name != "tokenizer.json":
            return dict(data)
        vocabulary = data["model"]["vocab"]
        ids = (
            dict(vocabulary)
            if isinstance(vocabulary, Mapping)
            else {token: index for index, (token, _) in enumerate(vocabulary)}
        )
        return ids | {token["content"]: token["id"] for token in data.get("added_tokens", ())}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the tokenizer file cannot be read ({error})", where=path, remedy="Copy it again from its source."
        ) from error
