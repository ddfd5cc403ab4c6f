"""The files that travel with the weights: configuration, generation settings, tokenizer, chat template, licence.

A fixed list of data files is copied; weights, pickles and code never are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapt_merge.checkpoints.checkpoint import Checkpoint
from dapt_merge.checkpoints.files import read_json
from dapt_merge.tensors.dtypes import Dtype

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
GENERATION_FILE = "generation_config.json"
COMPANIONS = (
    GENERATION_FILE,
    *TOKENIZER_FILES,
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
)


def copy_companions(source: Checkpoint, folder: Path, dtype: Dtype | None) -> list[str]:
    """Write the configuration, with its dtype brought up to date, and copy the files beside it.

    Args:
        source: whose files to take; one in memory has only its configuration.
        folder: the folder to write into; it exists.
        dtype: of the weights that lie there; None leaves the configuration as it is.

    Returns:
        The names written, in the order written.
    """
    written = []
    if source.config:
        text = json.dumps(updated_config(source.config, dtype), indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        written.append("config.json")
    if source.folder is None:
        return written
    for name in COMPANIONS:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
            written.append(name)
    if source.moved_ids and GENERATION_FILE in written:
        text = json.dumps(generation_settings(source), indent=2, ensure_ascii=False)
        (folder / GENERATION_FILE).write_text(text + "\n", encoding="utf-8")
    templates = source.folder / "additional_chat_templates"
    for template in sorted(templates.glob("*.jinja")) if templates.is_dir() else ():
        (folder / templates.name).mkdir(exist_ok=True)
        shutil.copyfile(template, folder / templates.name / template.name)
        written.append(f"{templates.name}/{template.name}")
    return written


def generation_settings(source: Checkpoint) -> dict[str, Any] | None:
    """Return how the model generates text (generation_config.json), its tokens under the ids that they have now.

    None without such a file.
    """
    path = None if source.folder is None else source.folder / GENERATION_FILE
    if path is None or not path.is_file():
        return None
    return with_moved_ids(read_json(path), source.moved_ids)


def with_moved_ids(settings: Mapping[str, Any], moved_ids: Mapping[int, int | None]) -> dict[str, Any]:
    """Return settings whose `…_token_id` entries name the same tokens under their new ids; dropped ones are left out.

    Example:
        >>> with_moved_ids({"eos_token_id": [2, 7], "pad_token_id": 9, "top_k": 2}, {2: 5, 9: None})
        {'eos_token_id': [5, 7], 'top_k': 2}
    """
    changed: dict[str, Any] = {}
    for key, value in settings.items():
        listed = value if isinstance(value, list) else [value]
        if not key.endswith("_token_id") or not all(isinstance(row, int) for row in listed):
            changed[key] = value
            continue
        kept = [row for row in (moved_ids.get(row, row) for row in listed) if row is not None]
        if kept:
            changed[key] = kept if isinstance(value, list) else kept[0]
    return changed


def updated_config(config: dict[str, Any], dtype: Dtype | None) -> dict[str, Any]:
    """Return the configuration with the dtype of the weights written, under the key that it already uses."""
    if dtype is None:
        return dict(config)
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return {**config, key: dtype.value}
