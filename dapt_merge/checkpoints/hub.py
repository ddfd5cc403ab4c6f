"""A model named by its hub id ("organisation/name"): found in the local cache, or downloaded there first.

Only safetensors, JSON and tokenizer files are asked for, so a pickle never reaches the disk. With `HF_HUB_OFFLINE=1`
nothing leaves the machine.
"""

from __future__ import annotations

import re
from pathlib import Path

from dapt_merge.errors import InputError

WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "*.spm", "LICENSE*", "NOTICE*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w")


def looks_like_hub_id(source: str) -> bool:
    """Say whether a text that names no local file could be a hub id.

    Example:
        >>> looks_like_hub_id("HuggingFaceTB/SmolLM2-135M"), looks_like_hub_id("./runs/a"), looks_like_hub_id("a/b/c")
        (True, False, False)
    """
    return _HUB_ID.fullmatch(source) is not None


def snapshot_folder(hub_id: str) -> Path:
    """Return the folder of a hub model's files in the local cache, downloading what is missing.

    Raises:
        InputError: neither a local path nor a model that the hub (or, offline, its cache) has.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(WANTED)))
    except Exception as error:  # the hub client raises many kinds; each means the same to the user
        raise InputError(
            f"there is no such folder, and the model hub gave none ({type(error).__name__})",
            where=hub_id,
            remedy="Check the path or the hub id; offline, download the model first.",
        ) from error
