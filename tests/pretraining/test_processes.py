"""Two processes train the run that one trains, whole on each or sharded over both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from running import log_of, train, weights
from tiny_corpora import notes, write_jsonl

from dapt_merge.errors import InputError
from dapt_merge.pretraining import load_pretrain_config
from dapt_merge.pretraining.trainer import micro_batches

SCRIPT = """
import json, os, sys
from dapt_merge.pretraining import load_pretrain_config, pretrain
def die(line):
    if line["step"] == int(sys.argv[2]):
        os._exit(1)
pretrain(load_pretrain_config(json.load(open(sys.argv[1])), sys.argv[3:]), on_log=die)
"""


def launch(folder: Path, settings: dict[str, Any], *overrides: str, die_at: int = -1) -> int:
    """Run the configuration in two processes, as torchrun does."""
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "script.py").write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, str(folder / "script.py"), str(folder / "settings.json"), str(die_at), *overrides]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(command, env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]
    return max(abs(rank.wait(timeout=300)) for rank in ranks)


@pytest.fixture
def shared(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Six steps of four sequences, with an uneven number of targets in each, watched on held-out text."""
    held = write_jsonl(tmp_path / "held.jsonl", notes(4, 5))
    heldout = [{"path": str(held), "axis": "domain", "language": "fr"}]
    shape = {"batch_tokens": 128, "micro_batch_tokens": 32, "tokens": 768, "learning_rate": 1e-2}
    return {**settings, **shape, "heldout": heldout, "cache_folder": str(tmp_path / "cache")}


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_the_loss_curve_of_two_processes_is_that_of_one(shared: dict[str, Any], tmp_path: Path, sharding: str) -> None:
    (_, alone) = train({**shared, "output": str(tmp_path / "alone")})
    assert launch(tmp_path, shared, f"sharding={sharding}") == 0
    run = Path(shared["output"])
    assert json.loads((run / "run.json").read_text())["processes"] == {"count": 2, "sharding": sharding}
    for one, other in zip(log_of(tmp_path / "alone"), log_of(run), strict=True):
        for key in {"loss", "grad_norm"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=1e-5)
        if "heldout" in one:
            assert other["heldout"]["domain"] == pytest.approx(one["heldout"]["domain"], rel=1e-5)
    together = weights(run / "checkpoint-6")
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(together.pop(name), tensor, atol=1e-5, rtol=0)
    assert not together


@pytest.mark.slow
def test_a_sharded_run_that_died_goes_on_to_the_same_weights(shared: dict[str, Any], tmp_path: Path) -> None:
    settings = ("sharding=fsdp2", "precision=bf16-master")
    assert launch(tmp_path, shared, *settings, f"output={tmp_path / 'whole'}") == 0
    assert launch(tmp_path, shared, *settings, die_at=5) != 0
    assert launch(tmp_path, shared, *settings) == 0
    one, other = (weights(run / "checkpoint-6") for run in (tmp_path / "whole", Path(shared["output"])))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_batch_that_processes_cannot_share_is_refused(shared: dict[str, Any]) -> None:
    config = load_pretrain_config(shared)
    assert micro_batches(config, 1) == (1, 4)
    assert micro_batches(config, 2) == (1, 2)
    with pytest.raises(InputError, match="3 processes cannot share equally"):
        micro_batches(config, 3)
    with pytest.raises(InputError, match="micro-batches of 4 do not divide"):
        micro_batches(load_pretrain_config(shared, ["micro_batch_tokens=128"]), 2)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["precision=bf16"], "is for one process"),
        (["sharding=fsdp2", "adapter.rank=2"], "an adapter is not sharded"),
        (["sharding=fsdp2", "optimizer=adafactor"], "adafactor is not sharded"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    shared: dict[str, Any], monkeypatch: pytest.MonkeyPatch, overrides: list[str], said: str
) -> None:
    monkeypatch.setattr("dapt_merge.pretraining.training.connect", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=said):
        train(shared, *overrides)
