"""Where the YAML presets live: beside the package in a checkout, under share/ in the environment once installed."""

from __future__ import annotations

import sys
from pathlib import Path

from dapt_merge.errors import InputError


def preset(name: str) -> Path:
    """Return the path of a shipped YAML, for example `recipes/pretrain-demo.yaml` or `search/demo.yaml`.

    Raises:
        InputError: the installation lacks it.
    """
    for root in (Path(__file__).resolve().parent.parent, Path(sys.prefix) / "share" / "dapt-merge"):
        if (root / name).is_file():
            return root / name
    raise InputError("this installation lacks a preset", where=name, remedy="Reinstall dapt-merge.")
