"""LoRA and DoRA by peft: low-rank changes are trained, the base's weights stay.

What an adapter's folder stands for as a model is known to `checkpoints`; here one is made, loaded again to go on, and
written out as a full model where that was asked for.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from dapt_merge.checkpoints import CheckpointWriter, TensorInfo, copy_companions, open_checkpoint
from dapt_merge.errors import InputError, nearest
from dapt_merge.pretraining.config import AdapterConfig
from dapt_merge.tensors.dtypes import Dtype


def add_adapter(model: Any, config: AdapterConfig, *, base: str, seed: int) -> Any:
    """Freeze a model and return it with a fresh adapter in place, which changes nothing until it is trained.

    Args:
        model: a causal model of transformers.
        config: kind, rank and targets.
        base: what the adapter's folder will name as its base: a path or hub id.
        seed: of its first matrices.

    Raises:
        InputError: a target that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    targets = config.targets if config.targets == "all-linear" else list(config.targets)
    if targets != "all-linear":
        _refuse_unknown(targets, model)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_dora=config.kind == "dora",
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, settings)
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def load_adapter(model: Any, folder: Path) -> Any:
    """Return a model with the adapter of a folder in place, to be trained on."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder), is_trainable=True)


def write_merged(base: str, adapter: Path, folder: Path) -> None:
    """Write the full model that a base and an adapter stand for, in float32, with the base's companion files."""
    merged = open_checkpoint(f"{base}+{adapter}")
    infos = [_in_float32(info) for info in merged.tensors.values()]
    with CheckpointWriter(folder, infos) as writer:
        for info in infos:
            writer.write(info.name, merged.read(info.name).to(info.dtype.torch_dtype))
    copy_companions(merged, folder, Dtype.FLOAT32)


def _in_float32(info: TensorInfo) -> TensorInfo:
    dtype = Dtype.FLOAT32 if info.dtype.is_floating_point else info.dtype
    return TensorInfo(info.name, dtype, info.shape, math.prod(info.shape) * dtype.itemsize)


def _refuse_unknown(targets: list[str], model: Any) -> None:
    known = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name, _ in model.named_modules()):
            raise InputError(
                f"the model has no module '{target}'.{nearest(target, known)}",
                where="adapter.targets",
                remedy=f"There are: {', '.join(known)}; or write all-linear.",
            )
