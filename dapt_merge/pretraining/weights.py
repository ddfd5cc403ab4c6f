"""The weights of a model in training, as a folder: gathered where they are sharded, float32 where there are masters.

Also how far they have moved from the base. When to write, and what else lies in the folder, is the recorder's business.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dapt_merge.checkpoints import Checkpoint


def gathered(model: Any, *, sharded: bool) -> dict[str, Tensor] | None:
    """Return a sharded model's whole state on the CPU of the main process; every process calls it. Else None."""
    if not sharded:
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = cast(dict[str, Tensor], get_model_state_dict(model, options=options))
    # Gathered apart, a head tied to the embedding would be written twice.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: value for name, value in state.items() if tied.get(name) not in state}


def write_weights(
    model: Any, folder: Path, *, masters: Mapping[nn.Parameter, Tensor], state: dict[str, Tensor] | None
) -> None:
    """Write a model, or the adapter on it, as transformers or peft do.

    Args:
        model: what is trained.
        folder: where to.
        masters: parameter → its float32 master, saved in its place.
        state: what `gathered` returned.
    """
    with _saved_as(model, masters) as whole:
        if hasattr(whole, "peft_config"):
            # Embeddings are not trained; asking whether they changed would ask the hub.
            whole.save_pretrained(folder, save_embedding_layers=False)
        elif state is not None:
            whole.save_pretrained(folder, state_dict=state)
        else:
            whole.save_pretrained(folder)
    # safetensors writes files that nobody but their owner can read.
    mode = next(folder.glob("*config.json")).stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


@contextmanager
def _saved_as(model: Any, masters: Mapping[nn.Parameter, Tensor]) -> Iterator[Any]:
    """Lend the model its float32 masters, and the base's own configuration, for as long as it is saved."""
    config = model.config
    rounded = {parameter: parameter.data for parameter in masters}
    try:
        model.config = copy.deepcopy(config)
        # The Trainer switches the cache off for training; that is no property of the model.
        model.config.use_cache = getattr(model, "use_cache_of_base", True)
        for parameter, master in masters.items():
            parameter.data = master
        yield model
    finally:
        model.config = config
        for parameter, data in rounded.items():
            parameter.data = data


def movement(base: Checkpoint, checkpoint: Checkpoint) -> dict[str, float]:
    """Return how far a checkpoint is from its base; a tied tensor counts once.

    Returns:
        `relative_delta_norm`: ‖θ − θ₀‖ / ‖θ₀‖ over all weights (L2), summed in float64;
        `changed_share_bf16`: the share of the weights whose bfloat16 value is another one than the base's.
    """
    squared_delta, squared_base, changed, count = 0.0, 0.0, 0, 0
    for name in checkpoint.tensors:
        before, after = base.read(name), checkpoint.read(name)
        changed += int(torch.count_nonzero(before.to(torch.bfloat16) != after.to(torch.bfloat16)))
        count += before.numel()
        squared_delta += float((after.double() - before.double()).square_().sum())
        squared_base += float(before.double().square_().sum())
    return {
        "relative_delta_norm": math.sqrt(squared_delta / squared_base) if squared_base else math.inf,
        "changed_share_bf16": changed / max(count, 1),
    }
