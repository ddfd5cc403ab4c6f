"""`transformers.Trainer`, told what DAPT needs of it: weights that are loaded before it starts, schedule, precision.

The loop, accumulation, schedules, devices, sharding and the skipping of finished batches are the Trainer's. This module
imports transformers at the top, so import it only when training starts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, save_fsdp_optimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from dapt_merge.errors import InputError
from dapt_merge.pretraining.config import DEFAULT_DECAY_SHARE, PretrainConfig
from dapt_merge.pretraining.optimizer import Bf16AdamW, MasterWeightAdafactor, MasterWeightAdamW, pull_towards
from dapt_merge.pretraining.processes import process_count


class DaptTrainer(Trainer):
    """The Trainer without its own idea of where weights come from and what is printed."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, and let it shard on CPUs too, which accelerate does on accelerators alone."""
        super().create_accelerator_and_postprocess()
        asked = self.args.fsdp_plugin_args
        if asked is None or self.is_fsdp_enabled:  # type: ignore[has-type]
            return
        plugin = FullyShardedDataParallelPlugin(**asked)
        if self.accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(self.accelerator.mixed_precision)
        self.accelerator.state.fsdp_plugin = plugin
        self.accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Leave the weights alone: model and masters were loaded from the checkpoint before training began."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save a sharded run's optimizer without a second copy of the weights, which lie in the checkpoint."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    @property
    def is_sharded(self) -> bool:
        """Whether the model's parameters are spread over the processes."""
        return any(isinstance(parameter, DTensor) for parameter in self.model.parameters())

    def reshard(self) -> None:
        """Give up the whole weights that a forward pass without a backward pass left behind."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def save_state_to(self, folder: Path) -> None:
        """Write all that going on needs but the weights; every process calls it."""
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self.state.save_to_json(str(folder / "trainer_state.json"))

    @property
    def plain_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapping."""
        return getattr(self.optimizer, "optimizer", self.optimizer)


class PullTowardsBase(TrainerCallback):
    """Pulls every weight towards the base's before every step (see `optimizer.pull_towards`).

    Args:
        trainer: whose optimizer it is.
        base: the base as a second model of the same class, in any dtype.
        strength: the weight decay.
    """

    def __init__(self, trainer: DaptTrainer, base: Any, strength: float) -> None:
        self._trainer, self._base, self._strength = trainer, base, strength
        self._anchors: dict[Tensor, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        optimizer = self._trainer.plain_optimizer
        masters = getattr(optimizer, "masters", {})
        values = dict(self._base.named_parameters())
        for name, parameter in self._trainer.model.named_parameters():
            value = values[name].data.to(args.device)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            self._anchors[masters.get(parameter, parameter)] = value

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        # Not an optimizer's own hook: torch calls that twice where one optimizer's step calls another's.
        pull_towards(self._trainer.plain_optimizer, self._anchors, self._strength)


def training_arguments(
    config: PretrainConfig, steps: int, precision: str, folder: Path, *, sharded: bool = False
) -> TrainingArguments:
    """Translate a run into the Trainer's arguments; saving and logging stay with `RunRecorder`.

    Raises:
        InputError: the batch cannot be divided among the processes.
    """
    micro, accumulation = micro_batches(config, process_count())
    kind, extra = schedule(config, steps)
    on_gpu = torch.cuda.is_available()
    # Several processes keep float32 weights and compute in bfloat16 by autocast or by sharding's own policy.
    autocast = precision == "bf16-autocast" or (precision == "bf16-master" and process_count() > 1)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=extra,
        warmup_steps=round(config.warmup_share * steps),
        weight_decay=0.0 if config.decay_towards == "base" else config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        # With master weights the optimizer clips, in float32.
        max_grad_norm=0.0 if has_masters(precision) else config.gradient_clip or 0.0,
        bf16=autocast,
        optim="adamw_torch_fused" if config.optimizer == "adamw" else "adafactor",
        seed=config.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        **_memory_arguments(config, sharded),
    )
    if sharded and autocast and arguments.fsdp_plugin_args is not None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Gradients are summed over processes in float32: the default would do it in bfloat16.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        arguments.fsdp_plugin_args["mixed_precision_policy"] = policy
    # One process uses one device: DataParallel would split the batches behind our back.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _memory_arguments(config: PretrainConfig, sharded: bool) -> dict[str, Any]:
    if sharded:
        settings = {"version": 2, "activation_checkpointing": config.gradient_checkpointing}
        return {"fsdp": True, "fsdp_config": settings}
    if config.gradient_checkpointing:
        return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return {}


def micro_batches(config: PretrainConfig, processes: int) -> tuple[int, int]:
    """Return the sequences that one process takes at a time, and how often it does so for one step.

    Raises:
        InputError: the sequences of a step cannot be divided so.
    """
    sequences = config.batch_sequences
    if sequences % processes:
        raise InputError(
            f"a step has {sequences} sequences, which {processes} processes cannot share equally",
            where="batch_tokens",
            remedy=f"Make it a multiple of {processes * config.sequence_length} tokens.",
        )
    share = sequences // processes
    micro = share if config.micro_batch_tokens is None else config.micro_batch_tokens // config.sequence_length
    if share % micro:
        raise InputError(
            f"each of {processes} processes has {share} sequences a step, which micro-batches of {micro} do not divide",
            where="micro_batch_tokens",
            remedy=f"Take a divisor of {share * config.sequence_length} tokens.",
        )
    return micro, share // micro


def has_masters(precision: str) -> bool:
    """Say whether the model holds bfloat16 copies of float32 masters, which the optimizer keeps."""
    return precision == "bf16-master" and process_count() == 1


def own_optimizer(
    config: PretrainConfig, precision: str, masters: Mapping[nn.Parameter, Tensor]
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """Return class and options of an optimizer that the Trainer does not have, or None where its own will do."""
    adam = {"betas": (config.adam_beta1, config.adam_beta2), "eps": 1e-8}
    if precision == "bf16":
        return Bf16AdamW, {"lr": config.learning_rate, **adam, "rounding": config.bf16_rounding, "seed": config.seed}
    if not masters:
        return None
    options = {"lr": config.learning_rate, "masters": masters, "max_grad_norm": config.gradient_clip}
    if config.optimizer == "adafactor":
        return MasterWeightAdafactor, {**options, "scale_parameter": False, "relative_step": False}
    return MasterWeightAdamW, {**options, **adam, "fused": True}


def schedule(config: PretrainConfig, steps: int) -> tuple[str, dict[str, Any]]:
    """Return the name and options of the schedule in `transformers.get_scheduler`."""
    floor = config.minimum_rate_share or 0.0
    if config.schedule == "wsd":
        decay = round((config.decay_share or DEFAULT_DECAY_SHARE) * steps)
        return "warmup_stable_decay", {"num_decay_steps": max(1, decay), "min_lr_ratio": floor}
    if config.schedule == "cosine" and floor:
        return "cosine_with_min_lr", {"min_lr_rate": floor}
    return {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[config.schedule], {}
