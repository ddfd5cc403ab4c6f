"""The chat template of a model folder: which one a recipe asks for, and writing it so that every transformers finds it.

    chat_template: auto                the one that most of the models have
    chat_template: chatml              one of mergekit's built-ins, by name
    chat_template: "{% for … %}…"      the template itself

The idea: mergekit's three forms, with a draw won by the model that comes first. What a template makes of a conversation
this module does not know.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from dapt_merge.checkpoints.checkpoint import Checkpoint
from dapt_merge.errors import InputError, nearest

_FILE = "chat_template.jinja"
_NAMED = "additional_chat_templates"


def stored_template(folder: Path) -> str | None:
    """Return a model folder's chat template, wherever its version of transformers put it; None when it has none.

    Of several by name it is the one named `default`.

    Raises:
        InputError: a file that should hold it is garbled.
    """
    if (folder / _FILE).is_file():
        return (folder / _FILE).read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        stated = _read_json(folder / name).get("chat_template")
        if isinstance(stated, list):
            stated = next((entry.get("template") for entry in stated if entry.get("name") == "default"), None)
        if isinstance(stated, str) and stated:
            return stated
    return None


def chosen_template(setting: str, models: Sequence[Checkpoint]) -> str | None:
    """Return the template that a recipe's `chat_template` means; None when `auto` finds none.

    Args:
        setting: "auto", a built-in's name, or the template itself.
        models: the inputs of the merge, those in doubt preferred first.

    Raises:
        InputError: it is none of the three.
    """
    if setting == "auto":
        found = [stored_template(model.folder) for model in models if model.folder is not None]
        counted = Counter(text.strip() for text in found if text and text.strip())
        return counted.most_common(1)[0][0] if counted else None
    if "{" in setting:
        return setting
    built_in = {name.removesuffix(".jinja"): file for name, file in _built_in_files().items()}
    if setting in built_in:
        return built_in[setting].read_text(encoding="utf-8")
    raise InputError(
        f"'{setting:.40}' is no chat template: no built-in has this name, and there is nothing to fill in in it."
        f"{nearest(setting, ['auto', *built_in])}",
        where="chat_template",
        remedy=f"Give {', '.join(['auto', *sorted(built_in)])}, or a Jinja template (with {{{{ … }}}} in it).",
    )


def write_template(folder: Path, template: str) -> None:
    """Make a template the only one of a model folder."""
    for name in ("tokenizer_config.json", "chat_template.json"):
        content = _read_json(folder / name)
        if "chat_template" in content:
            del content["chat_template"]
            _replace(folder / name, content)
    shutil.rmtree(folder / _NAMED, ignore_errors=True)
    (folder / _FILE).write_text(template, encoding="utf-8")


def _built_in_files() -> dict[str, Any]:
    try:
        files = resources.files("mergekit._data.chat_templates").iterdir()
    except ModuleNotFoundError:
        return {}
    return {file.name: file for file in files if file.name.endswith(".jinja")}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"this is not valid JSON: {error}", where=path, remedy="Copy the file again.") from None
    return content if isinstance(content, dict) else {}


def _replace(path: Path, content: dict[str, Any]) -> None:
    if content:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        path.unlink()
