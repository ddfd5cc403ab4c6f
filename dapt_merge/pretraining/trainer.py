"""`transformers.Trainer`, told what DAPT needs of it: the loss, the record of every step, and the checkpoints.

The loop, accumulation, schedules, devices and the skipping of finished batches are the Trainer's. This module imports
transformers at the top, so import it only when training starts.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from dapt_merge.atomic import atomic_folder
from dapt_merge.checkpoints import Checkpoint, open_checkpoint
from dapt_merge.errors import DaptMergeError
from dapt_merge.pretraining.config import DEFAULT_DECAY_SHARE, PretrainConfig
from dapt_merge.pretraining.loss import head_loss
from dapt_merge.pretraining.optimizer import MasterWeightAdamW
from dapt_merge.pretraining.packing import PackedBlocks
from dapt_merge.pretraining.run_folder import DETAILS_FILE, RunFolder

OnProgress = Callable[[int, int], None]
OnLog = Callable[[dict[str, Any]], None]


class DaptTrainer(Trainer):
    """The Trainer with a loss that never holds the full logits, and weights that are loaded before it starts."""

    def __init__(self, *, plain_head: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._plain_head = plain_head
        self.remove_callback(PrinterCallback)

    def compute_loss(  # noqa: D102 - the Trainer's own contract
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not self._plain_head or return_outputs or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        whole = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            hidden = whole.base_model(**inputs, use_cache=False).last_hidden_state
            # Token n predicts token n + 1.
            targets = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
            weight = whole.get_output_embeddings().weight
            return head_loss(hidden.flatten(0, 1), weight, targets, num_items_in_batch)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Leave the weights alone: model and masters were loaded from the checkpoint before training began."""


class RunRecorder(TrainerCallback):
    """Writes a line of the log at every step, and a checkpoint with the state to go on from at the planned ones.

    Args:
        run: the folder.
        trainer: set by `attach`, for its optimizer, schedule and random state.
        base: the base checkpoint, which the distance of the weights is measured from.
        tokenizer: saved beside the weights.
        blocks: for the count of tokens by role.
        config: of the run.
        checkpoint_steps: where to write checkpoints; the last one is the last step.
        details: written into every checkpoint beside its own figures.
    """

    def __init__(
        self,
        run: RunFolder,
        *,
        base: Checkpoint,
        tokenizer: Any,
        blocks: PackedBlocks,
        config: PretrainConfig,
        checkpoint_steps: list[int],
        details: dict[str, Any],
        on_progress: OnProgress | None,
        on_log: OnLog | None,
    ) -> None:
        self._run, self._base, self._tokenizer = run, base, tokenizer
        self._blocks, self._config, self._steps, self._details = blocks, config, checkpoint_steps, details
        self._on_progress, self._on_log = on_progress, on_log
        self._trainer: DaptTrainer | None = None
        self._clock = 0.0

    def attach(self, trainer: DaptTrainer) -> None:
        """Name the trainer whose steps are recorded."""
        self._trainer = trainer
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self._clock = time.monotonic()
        if self._on_progress:
            self._on_progress(self._tokens(state.global_step), self._tokens(self._steps[-1]))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: D102
        if not logs or "loss" not in logs:
            return
        step, now = state.global_step, time.monotonic()
        optimizer = self._optimizer()
        norm = optimizer.last_grad_norm if isinstance(optimizer, MasterWeightAdamW) else logs["grad_norm"]
        line = {
            "step": step,
            "tokens": self._tokens(step),
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": float(norm),
            "tokens_per_second": round(self._tokens(1) / max(now - self._clock, 1e-9), 1),
        }
        self._refuse_divergence(line)
        with (self._run.path / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        # The Trainer would carry its own copy of the log in memory and in every state.
        state.log_history.clear()
        if step in self._steps:
            self._save(line)
        if self._on_log:
            self._on_log(line)
        if self._on_progress:
            self._on_progress(line["tokens"], self._tokens(self._steps[-1]))
        self._clock = time.monotonic()

    def _optimizer(self) -> Any:
        assert self._trainer is not None
        # accelerate wraps the optimizer.
        return getattr(self._trainer.optimizer, "optimizer", self._trainer.optimizer)

    def _refuse_divergence(self, line: Mapping[str, Any]) -> None:
        if not (math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])):
            raise DaptMergeError(
                f"training diverged: at step {line['step']} the loss is {line['loss']}, "
                f"the gradient's norm {line['grad_norm']}",
                where=self._run.path,
                remedy="Lower learning_rate or raise warmup_share; the checkpoints before it are kept.",
            )

    def _tokens(self, steps: int) -> int:
        return steps * self._config.batch_sequences * self._config.sequence_length

    def _save(self, line: Mapping[str, Any]) -> None:
        step = line["step"]
        replay = self._blocks.replay_blocks(step * self._config.batch_sequences) * self._config.sequence_length
        details = {
            "step": step,
            "tokens_seen": line["tokens"],
            "domain_tokens": line["tokens"] - replay,
            "replay_tokens": replay,
            "learning_rate": line["learning_rate"],
            "loss": line["loss"],
            **self._details,
        }
        trainer = self._trainer
        assert trainer is not None
        # Without masters the model's own float32 weights are saved.
        masters = getattr(self._optimizer(), "masters", {})
        with atomic_folder(self._run.path / f"checkpoint-{step}", overwrite=True) as folder:
            with weights_to_save(trainer.model, masters) as model:
                model.save_pretrained(folder)
            self._tokenizer.save_pretrained(folder)
            details["relative_delta_norm"] = relative_delta_norm(self._base, open_checkpoint(folder))
            text = json.dumps(details, indent=2, ensure_ascii=False, default=str)
            (folder / DETAILS_FILE).write_text(text + "\n", encoding="utf-8")
        with atomic_folder(self._run.state_folder(step), overwrite=True) as folder:
            trainer._save_optimizer_and_scheduler(str(folder))
            trainer._save_rng_state(str(folder))
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
        self._run.forget_states(keep=step)


@contextmanager
def weights_to_save(model: Any, masters: Mapping[nn.Parameter, Tensor]) -> Iterator[Any]:
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


def relative_delta_norm(base: Checkpoint, checkpoint: Checkpoint) -> float:
    """Return ‖θ − θ₀‖ / ‖θ₀‖ over all weights (L2), summed in float64; a tied tensor counts once."""
    squared_delta, squared_base = 0.0, 0.0
    for name in checkpoint.tensors:
        before, after = base.read(name).double(), checkpoint.read(name).double()
        squared_delta += float((after - before).square_().sum())
        squared_base += float(before.square_().sum())
    return math.sqrt(squared_delta / squared_base) if squared_base else math.inf


def training_arguments(config: PretrainConfig, steps: int, precision: str, folder: Path) -> TrainingArguments:
    """Translate a run into the Trainer's arguments; saving and logging stay with `RunRecorder`."""
    micro = config.micro_batch_sequences or config.batch_sequences
    clip = config.gradient_clip or 0.0
    kind, extra = schedule(config, steps)
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.batch_sequences // micro,
        learning_rate=config.learning_rate,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=extra,
        warmup_steps=round(config.warmup_share * steps),
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        # With master weights the optimizer clips, in float32.
        max_grad_norm=0.0 if precision == "bf16-master" else clip,
        bf16=precision == "bf16-autocast",
        optim="adamw_torch_fused",
        seed=config.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        use_cpu=not on_gpu,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    # One process uses one device: DataParallel would split the batches behind our back.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def schedule(config: PretrainConfig, steps: int) -> tuple[str, dict[str, Any]]:
    """Return the name and options of the schedule in `transformers.get_scheduler`."""
    floor = config.minimum_rate_share or 0.0
    if config.schedule == "wsd":
        decay = round((config.decay_share or DEFAULT_DECAY_SHARE) * steps)
        return "warmup_stable_decay", {"num_decay_steps": max(1, decay), "min_lr_ratio": floor}
    if config.schedule == "cosine" and floor:
        return "cosine_with_min_lr", {"min_lr_rate": floor}
    return {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[config.schedule], {}
