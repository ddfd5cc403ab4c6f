"""An empty model of a checkpoint's architecture, ready to be filled.

The class is the one that the configuration names (`architectures`), taken from the installed transformers alone: code
that a checkpoint brings along is never run. Its weights are left as allocated: every one of them is overwritten.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from dapt_merge.checkpoints.checkpoint import Checkpoint, config_value
from dapt_merge.checkpoints.companions import generation_settings
from dapt_merge.checkpoints.groups import embedding_and_head
from dapt_merge.errors import InputError
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_from_config(source: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model that a checkpoint's configuration describes; its parameters are not initialised.

    Raises:
        InputError: there is no configuration, or transformers has no class for it without foreign code.
    """
    from transformers import GenerationConfig

    config = _configuration(source)
    model_class = _model_class(source, config)
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
            model = model_class._from_config(config, dtype=dtype)
        except (ValueError, KeyError) as error:
            raise _cannot_build(source, str(error)) from error
    model.tie_weights()
    _untie_what_is_stored_apart(model, source)
    generation = generation_settings(source)
    if generation is not None:
        model.generation_config = GenerationConfig.from_dict(generation)
    return model.eval()


def _model_class(source: Checkpoint, config: Any) -> Any:
    """Return the class that the configuration names, else the most capable one that transformers has for its type."""
    import transformers

    for name in source.config.get("architectures") or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            if isinstance(config, getattr(found, "config_class", ())):
                return found
            raise _cannot_build(source, f"architectures names {name}, which is no class for {config.model_type}")
    for mapping in (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_MASKED_LM_MAPPING,
        transformers.MODEL_MAPPING,
    ):
        if type(config) in mapping:
            return mapping[type(config)]
    raise _cannot_build(source, f"there is no class for {config.model_type}")


def _untie_what_is_stored_apart(model: PreTrainedModel, source: Checkpoint) -> None:
    """Give a head that the checkpoint stores on its own its own memory, where the class would tie it to the embedding.

    T5 1.1 and its kin say so in their files, and transformers ties them all the same until it meets their weights.
    """
    embedding, head = embedding_and_head(source.tensors)
    if config_value(source.config, "tie_word_embeddings") is True:
        return
    state = model.state_dict(keep_vars=True)
    if not (embedding in state and head in state and state[embedding].data_ptr() == state[head].data_ptr()):
        return
    owner, _, attribute = str(head).rpartition(".")
    own = torch.nn.Parameter(state[head].detach().clone(), requires_grad=state[head].requires_grad)
    setattr(model.get_submodule(owner), attribute, own)


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
