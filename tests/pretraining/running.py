"""How the tests of this folder run a configuration and look at what it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dapt_merge.pretraining import load_pretrain_config, pretrain


def train(settings: dict[str, Any], *overrides: str, **options: Any) -> list[Path]:
    return pretrain(load_pretrain_config(settings, overrides), **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def details_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "dapt_checkpoint.json").read_text())


class Stop(Exception):
    """Raised from a log hook: the run dies there."""


def stop_at(step: int) -> Any:
    def stop(line: dict[str, Any]) -> None:
        if line["step"] == step:
            raise Stop

    return stop
