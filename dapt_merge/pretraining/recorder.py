"""What a run leaves behind as it goes: a log line a step, held-out scores, checkpoints, and the state to go on from.

It also ends a run before its budget: by the rule for stopping early, or because the time is up. What is trained and how
is the Trainer's business.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from dapt_merge.checkpoints import open_checkpoint
from dapt_merge.errors import DaptMergeError
from dapt_merge.pretraining.adapter import write_merged
from dapt_merge.pretraining.config import PretrainConfig
from dapt_merge.pretraining.heldout import HeldOutMonitor, Measurement, stop_reason
from dapt_merge.pretraining.processes import agreed, is_main, process_count, shared_folder
from dapt_merge.pretraining.run_folder import DETAILS_FILE, RunFolder
from dapt_merge.pretraining.throughput import flops_per_token, peak_flops
from dapt_merge.pretraining.trainer import DaptTrainer
from dapt_merge.pretraining.weights import gathered, movement, write_weights

OnProgress = Callable[[int, int], None]
OnLog = Callable[[dict[str, Any]], None]

# What the process still needs after the last save, to end.
_SECONDS_TO_END = 3.0

# What a file system takes a second, at least: an estimate of how long saving will take before it was done once.
_BYTES_PER_SECOND = 200e6


@dataclass(frozen=True)
class Timetable:
    """What happens at which optimizer step.

    Attributes:
        steps: of the whole run.
        tokens_per_step: of all processes.
        checkpoints: the steps to keep checkpoints at; the last one is the last step.
        heldout: the steps to score held-out texts at.
        warmup_tokens: how long the learning rate rises.
    """

    steps: int
    tokens_per_step: int
    checkpoints: tuple[int, ...]
    heldout: frozenset[int]
    warmup_tokens: int


class RunRecorder(TrainerCallback):
    """Records every step; attach it to the trainer with `attach`.

    Args:
        run: the folder.
        config: of the run.
        timetable: what happens when.
        tokenizer: saved beside the weights.
        tokens_by_role: steps → tokens of each role.
        monitor: scores held-out texts, or None.
        details: written into every checkpoint beside its own figures.
        deadline: the moment (`time.monotonic`) by which the state must be saved, or None.
        on_progress: called with (tokens done, tokens in all).
        on_log: called with every line of the log.
        note: called with sentences for the user.

    Attributes:
        paused_at: the step after which the run was saved and left, or None.
        pause_reason: why it was.
        stopped: why the run ended early, or None.
    """

    def __init__(
        self,
        run: RunFolder,
        config: PretrainConfig,
        timetable: Timetable,
        *,
        tokenizer: Any,
        tokens_by_role: Callable[[int], Mapping[str, int]],
        monitor: HeldOutMonitor | None,
        details: dict[str, Any],
        deadline: float | None,
        on_progress: OnProgress | None,
        on_log: OnLog | None,
        note: Callable[[str], None],
    ) -> None:
        self._run, self._config, self._timetable = run, config, timetable
        self._tokenizer, self._tokens_by_role = tokenizer, tokens_by_role
        self._monitor, self._details, self._deadline = monitor, details, deadline
        self._on_progress, self._on_log, self._note = on_progress, on_log, note
        self._measurements: list[Measurement] = []
        self._longest_step = self._longest_save = 0.0
        self._clock = self._saved = time.monotonic()
        self._previous_handlers: dict[signal.Signals, Any] = {}
        self._asked_to_end = False
        self.paused_at: int | None = None
        self.stopped: str | None = None

    def attach(self, trainer: DaptTrainer) -> None:
        """Name the trainer whose steps are recorded."""
        self._trainer = trainer
        self._masters: dict[torch.nn.Parameter, torch.Tensor] = {}
        trainer.add_callback(self)

    # --- the Trainer's events -----------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self._masters = getattr(self._trainer.plain_optimizer, "masters", {})
        model = self._trainer.model
        self._flops = flops_per_token(model, self._config.sequence_length)
        peak = peak_flops(args.device)
        self._peak = None if peak is None else peak * process_count()
        if self._deadline is not None:
            # Weights and two moments, in float32: an estimate until one save was timed.
            self._longest_save = sum(12 * p.numel() for p in model.parameters() if p.requires_grad) / _BYTES_PER_SECOND
        self._board = self._open_board(state.global_step)
        self._measurements = [(line["tokens"], line["heldout"]) for line in self._run.log() if "heldout" in line]
        if self._monitor is not None and not self._measurements:
            self._write_line({"step": 0, "tokens": 0, "heldout": self._measure(0)})
        self._listen()
        self._progress(state.global_step)
        self._clock = self._saved = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:  # noqa: D102
        if not logs or "loss" not in logs:
            return None
        # The Trainer would carry its own copy of the log in memory and in every state.
        state.log_history.clear()
        step = state.global_step
        line = self._line(step, logs)
        self._refuse_divergence(line)
        if step in self._timetable.heldout and self._monitor is not None:
            line["heldout"] = self._measure(line["tokens"])
            self.stopped = self._stop_reason()
        self._write_line(line)
        self._save_if_due(step, line)
        if self._on_log:
            self._on_log(line)
        self._progress(step)
        if self.stopped or self.paused_at is not None:
            control.should_training_stop = True
        self._clock = time.monotonic()
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if self._board is not None:
            self._board.close()

    # --- the log ------------------------------------------------------------------------------------------------------

    def _line(self, step: int, logs: Mapping[str, Any]) -> dict[str, Any]:
        seconds = max(time.monotonic() - self._clock, 1e-9)
        self._longest_step = max(self._longest_step, seconds)
        optimizer = self._trainer.plain_optimizer
        speed = self._timetable.tokens_per_step / seconds
        line = {
            "step": step,
            "tokens": step * self._timetable.tokens_per_step,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": float(getattr(optimizer, "last_grad_norm", logs.get("grad_norm", math.nan))),
            "tokens_per_second": round(speed, 1),
            "model_teraflops_per_second": round(speed * self._flops / 1e12, 4),
        }
        if self._peak is not None:
            line["mfu"] = round(speed * self._flops / self._peak, 4)
        lost = getattr(optimizer, "updates_lost", None)
        if lost is not None:
            line["updates_lost"] = round(lost, 4)
        return line

    def _refuse_divergence(self, line: Mapping[str, Any]) -> None:
        if not (math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])):
            raise DaptMergeError(
                f"training diverged: at step {line['step']} the loss is {line['loss']}, "
                f"the gradient's norm {line['grad_norm']}",
                where=self._run.path,
                remedy="Lower learning_rate or raise warmup_share; the checkpoints before it are kept.",
            )

    def _write_line(self, line: dict[str, Any]) -> None:
        if not is_main():
            return
        with (self._run.path / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        if self._board is not None:
            values = {key: value for key, value in line.items() if isinstance(value, float)}
            values |= {f"heldout/{name}": value for name, value in line.get("heldout", {}).items()}
            for name, value in values.items():
                self._board.add_scalar(name, value, line["step"])

    def _open_board(self, step: int) -> Any:
        if not is_main():
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._run.path / "tensorboard"), purge_step=step + 1 if step else None)

    def _progress(self, step: int) -> None:
        if self._on_progress:
            self._on_progress(step * self._timetable.tokens_per_step, self._total_tokens)

    @property
    def _total_tokens(self) -> int:
        return self._timetable.steps * self._timetable.tokens_per_step

    # --- held-out texts -----------------------------------------------------------------------------------------------

    def _measure(self, tokens: int) -> dict[str, float]:
        assert self._monitor is not None
        # Sharded weights are gathered layer by layer, so all processes score; the main one's figures count.
        found = agreed(self._monitor.measure())
        self._trainer.reshard()
        self._measurements.append((tokens, found))
        return found

    def _stop_reason(self) -> str | None:
        rule = self._config.early_stop
        return None if rule is None else stop_reason(rule, self._measurements, self._timetable.warmup_tokens)

    # --- saving -------------------------------------------------------------------------------------------------------

    def _save_if_due(self, step: int, line: Mapping[str, Any]) -> None:
        at_checkpoint = step in self._timetable.checkpoints or self.stopped is not None
        time_up, save_due = agreed((self._time_is_up(), self._save_is_due()))
        if time_up and step < self._timetable.steps and not self.stopped:
            self.paused_at = step
        if not (at_checkpoint or time_up or save_due):
            return
        begun = time.monotonic()
        state = gathered(self._trainer.model, sharded=self._trainer.is_sharded)
        if at_checkpoint:
            self._save_checkpoint(line, state)
        self._save_state(step, state, with_weights=not at_checkpoint or self._config.adapter is not None)
        if self._board is not None:
            self._board.flush()
        self._saved = time.monotonic()
        self._longest_save = max(self._longest_save, self._saved - begun)

    def _time_is_up(self) -> bool:
        """Whether the next step could end too late to save after it."""
        if self._asked_to_end:
            return True
        if self._deadline is None:
            return False
        needed = self._longest_step + 1.5 * self._longest_save + _SECONDS_TO_END
        return time.monotonic() + needed >= self._deadline

    def _save_is_due(self) -> bool:
        minutes = self._config.save_every_minutes
        return minutes is not None and time.monotonic() - self._saved >= 60 * minutes

    def _save_checkpoint(self, line: Mapping[str, Any], state: dict[str, Any] | None) -> None:
        model = self._trainer.model
        with shared_folder(self._run.path / f"checkpoint-{line['step']}") as folder:
            if not is_main():
                return
            if self._config.adapter is not None and self._config.adapter.save == "merged":
                beside = folder / "adapter"
                write_weights(model, beside, masters=self._masters, state=None)
                write_merged(model.peft_config["default"].base_model_name_or_path, beside, folder)
                for file in beside.iterdir():
                    file.unlink()
                beside.rmdir()
            else:
                write_weights(model, folder, masters=self._masters, state=state)
            self._tokenizer.save_pretrained(folder)
            # Both are closed again at once: pages of the base that stay mapped are memory that training lacks.
            moved = movement(open_checkpoint(self._config.base), open_checkpoint(folder))
            details = {**self._figures(line), **moved, **self._details}
            text = json.dumps(details, indent=2, ensure_ascii=False, default=str)
            (folder / DETAILS_FILE).write_text(text + "\n", encoding="utf-8")
            if self._board is not None:
                for name, value in moved.items():
                    self._board.add_scalar(name, value, line["step"])

    def _figures(self, line: Mapping[str, Any]) -> dict[str, Any]:
        by_role = self._tokens_by_role(line["step"])
        figures = {
            "step": line["step"],
            "tokens_seen": line["tokens"],
            "domain_tokens": by_role["domain"],
            "replay_tokens": by_role["replay"],
            "learning_rate": line["learning_rate"],
            "loss": line["loss"],
        }
        optional = {"heldout": line.get("heldout"), "stopped_early": self.stopped}
        return figures | {key: value for key, value in optional.items() if value}

    def _save_state(self, step: int, state: dict[str, Any] | None, *, with_weights: bool) -> None:
        with shared_folder(self._run.state_folder(step)) as folder:
            self._trainer.save_state_to(folder)
            if with_weights and is_main():
                write_weights(self._trainer.model, folder / "weights", masters=self._masters, state=state)
        if is_main():
            self._run.forget_states(keep=step)

    def _listen(self) -> None:
        """Save and stop on Ctrl-C, and on SIGTERM, which schedulers send before they kill; not with a launcher.

        A launcher means it, and has the other processes to think of. A second Ctrl-C ends the run where it is.
        """
        if process_count() > 1 or threading.current_thread() is not threading.main_thread():
            return

        def end(number: int, _: Any) -> None:
            self._asked_to_end = True
            if number == signal.SIGINT:
                self.stop_listening()
                self._note("stopping after this step, to save; Ctrl-C again stops now, and loses what is not saved")

        for kind in (signal.SIGTERM, signal.SIGINT):
            self._previous_handlers[kind] = signal.signal(kind, end)

    def stop_listening(self) -> None:
        """Give the signals back to whoever had them."""
        while self._previous_handlers:
            kind, previous = self._previous_handlers.popitem()
            if previous is not None:  # whoever had it is not Python
                signal.signal(kind, previous)

    @property
    def pause_reason(self) -> str:  # noqa: D102
        return "the run was told to end" if self._asked_to_end else "the time was up"
