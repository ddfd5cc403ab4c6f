"""The tokenizer files of a merge whose vocabulary was settled by the recipe: the giver's, with the tokens it lacks.

Tokens are added to a tokenizer.json as whole strings, with the settings that they have in the model they come from; a
tokenizer kept in another form is turned into that one first. Rows and weights this module does not know.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dapt_merge.checkpoints.alignment import Alignment
from dapt_merge.checkpoints.checkpoint import Checkpoint
from dapt_merge.checkpoints.companions import TOKENIZER_FILES
from dapt_merge.checkpoints.files import read_json
from dapt_merge.checkpoints.vocabulary import fast_tokenizer

_FAST = "tokenizer.json"


def write_tokenizer(alignment: Alignment, checkpoints: Iterable[Checkpoint], folder: Path) -> None:
    """Replace the tokenizer files in an output folder by those that fit the merged rows.

    Args:
        alignment: says whose tokenizer it is, and what it lacks.
        checkpoints: where the settings of added tokens are looked up, in this order.
        folder: the output.

    Raises:
        InputError: tokens are to be added to a tokenizer that transformers cannot read.
    """
    if alignment.folder is None:
        return
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
        if (alignment.folder / name).is_file():
            (folder / name).write_bytes((alignment.folder / name).read_bytes())
    if not alignment.added:
        return
    if not (folder / _FAST).is_file():
        fast_tokenizer(alignment.folder).save_pretrained(folder)
    content = read_json(folder / _FAST)
    settings = _settings_of_added(checkpoints)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"] = [
        *(content.get("added_tokens") or ()),
        *(
            {"id": alignment.tokens[token], "content": token, **(settings.get(token) or plain)}
            for token in alignment.added
        ),
    ]
    (folder / _FAST).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _settings_of_added(checkpoints: Iterable[Checkpoint]) -> dict[str, dict[str, Any]]:
    """Return token → its settings (special, stripped, …) for the added tokens of all models; the first one counts."""
    found: dict[str, dict[str, Any]] = {}
    for checkpoint in checkpoints:
        path = None if checkpoint.folder is None else checkpoint.folder / _FAST
        if path is None or not path.is_file():
            continue
        for entry in read_json(path).get("added_tokens") or ():
            kept = {key: value for key, value in entry.items() if key not in ("id", "content")}
            found.setdefault(entry["content"], kept)
    return found
