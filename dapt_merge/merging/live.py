"""An empty model of a checkpoint's architecture, ready to be filled.

The class comes from the installed transformers alone: code that a checkpoint brings along is never run. Its weights
are left as allocated, because every one of them is overwritten.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from dapt_merge.checkpoints.checkpoint import Checkpoint
from dapt_merge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_from_config(source: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Build a causal language model from a checkpoint's configuration; its parameters are not initialised.

    Raises:
        InputError: there is no configuration, or transformers has no class for it without foreign code.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = _configuration(source)
    # The tensors that are not stored (position tables) are computed by the module itself, so only the random
    # initialisation is skipped; a version of transformers without the switch just takes longer.
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        try:
            from transformers.initialization import no_init_weights

            stack.enter_context(no_init_weights())
        except ImportError:
            pass
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        except (ValueError, KeyError) as error:
            raise _cannot_build(source, str(error)) from error
    model.tie_weights()
    if source.folder is not None and (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model.eval()


def _configuration(source: Checkpoint) -> Any:
    from transformers import CONFIG_MAPPING

    if not source.config:
        raise InputError(
            "there is no config.json to build a model from",
            where=source.label,
            remedy="Use a Hugging Face model folder as the base, or read single tensors with merged['name'].",
        )
    model_type = source.config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise _cannot_build(source, f"model_type {model_type!r} is unknown to this transformers")
    return CONFIG_MAPPING[model_type].from_dict(dict(source.config))


def _cannot_build(source: Checkpoint, reason: str) -> InputError:
    return InputError(
        f"transformers cannot build this model without running foreign code ({reason})",
        where=source.label,
        remedy="Save the merge with .save(folder), and load it with the library that the model comes with.",
    )
