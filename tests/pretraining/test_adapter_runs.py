"""An adapter's checkpoints are peft's folders, and models to every command of ours."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Stop, assert_same_weights, details_of, stop_at, train, weights

from dapt_merge.checkpoints import open_checkpoint
from dapt_merge.checkpoints.trajectory import run_checkpoints
from dapt_merge.errors import InputError

ADAPTER = ("adapter.rank=4", "learning_rate=1e-2")


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
def test_an_adapter_alone_and_beside_its_base_is_the_model_that_peft_merges(
    settings: dict[str, Any], base: Path, kind: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folders = train(settings, *ADAPTER, f"adapter.kind={kind}")
    assert run_checkpoints(Path(settings["output"])) == folders
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders[-1]).merge_and_unload()
    state = merged.state_dict()
    for source in (str(folders[-1]), f"{base}+{folders[-1]}"):
        checkpoint = open_checkpoint(source)
        for name in checkpoint.tensors:
            torch.testing.assert_close(checkpoint.read(name), state[name], atol=1e-6, rtol=1e-5)
    assert details_of(folders[-1])["relative_delta_norm"] > 1e-3


def test_a_merged_run_leaves_full_models_of_the_same_values(settings: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    adapters = train(settings, *ADAPTER)
    full = train({**settings, "output": str(tmp_path / "full")}, *ADAPTER, "adapter.save=merged")
    one, other = open_checkpoint(adapters[-1]), open_checkpoint(full[-1])
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.tensors)
    assert AutoModelForCausalLM.from_pretrained(full[-1]).config.use_cache
    assert not (full[-1] / "adapter").exists()


def test_only_the_adapter_is_trained_in_float32_masters(settings: dict[str, Any]) -> None:
    folders = train(settings, *ADAPTER, "precision=bf16-master", "weight_decay=0.1")
    stored = weights(folders[-1])
    assert all("lora_" in name for name in stored)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    bits = torch.cat([tensor.flatten() for tensor in stored.values()]).view(torch.int32)
    assert bool(((bits & 0xFFFF) != 0).any())


@pytest.mark.slow
@pytest.mark.parametrize("save", ["adapter", "merged"])
def test_an_interrupted_adapter_run_ends_with_the_same_weights(
    settings: dict[str, Any], tmp_path: Path, save: str
) -> None:
    overrides = (*ADAPTER, "checkpoints=3", "precision=bf16-master", "adapter.dropout=0.2", f"adapter.save={save}")
    whole = train({**settings, "output": str(tmp_path / "whole")}, *overrides)
    with pytest.raises(Stop):
        train(settings, *overrides, on_log=stop_at(3))
    for one, other in zip(whole, train(settings, *overrides), strict=True):
        assert_same_weights(one, other)


@pytest.mark.slow
def test_a_merge_takes_an_adapter_checkpoint_as_it_stands(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    import dapt_merge as dm

    folders = train(settings, *ADAPTER)
    dm.merge(str(base), str(folders[-1]), method="linear", weight=1.0).save(tmp_path / "merged")
    one, other = open_checkpoint(folders[-1]), open_checkpoint(tmp_path / "merged")
    assert all(torch.equal(one.read(name), other.read(name)) for name in other.tensors)


def test_a_target_that_the_model_lacks_is_refused_with_the_nearest(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="Did you mean 'q_proj'"):
        train(settings, "adapter.targets=[q_prj]")
    shutil.rmtree(settings["output"])
