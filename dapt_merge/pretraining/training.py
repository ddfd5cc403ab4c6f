"""A DAPT run from its configuration to its checkpoints: the story, with the work done elsewhere.

Read the inputs and name the run by their content; if it is complete, say so; if it was killed, go on from its newest
state; otherwise tokenise, pack, train. On a CPU with the same number of threads, a run that was killed and a run that
was not end with the same bytes. Several processes (`torchrun`, `accelerate launch`) share every batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapt_merge.errors import DaptMergeError, InputError
from dapt_merge.pretraining.config import CheckpointGrid, PretrainConfig
from dapt_merge.pretraining.processes import agreed, connect, is_main, main_first, process_count
from dapt_merge.pretraining.run_folder import RunFolder

if TYPE_CHECKING:
    from dapt_merge.checkpoints import Checkpoint
    from dapt_merge.corpus import BuiltCorpus
    from dapt_merge.evaluation.suites import Suite
    from dapt_merge.pretraining.recorder import RunRecorder, Timetable
    from dapt_merge.pretraining.trainer import DaptTrainer

# What does not make another run: where it is written, where inputs lie (their content counts), how it is divided.
_NOT_IDENTITY = {"output", "cache_folder", "base", "corpus", "precision", "sharding", "save_every_minutes"}


class RunPaused(DaptMergeError):
    """The run ended before it was complete, its time up or told to; its state is saved (exit code 75: try again)."""

    exit_code = 75


def pretrain(
    config: PretrainConfig,
    *,
    overwrite: bool = False,
    time_limit_seconds: float | None = None,
    on_corpus: Callable[[str, int, int], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> list[Path]:
    """Train, or go on training, and return the checkpoint folders in order.

    Args:
        config: the run; `output` is required here.
        overwrite: start again when the folder holds another run.
        time_limit_seconds: save the state and stop before so many seconds from now have passed.
        on_corpus: called with (step, done, total) while the corpus is built (see `corpus.build_corpus`).
        on_progress: called with (tokens done, tokens in all).
        on_log: called with every line of `log.jsonl`.
        on_note: called with sentences that the user should see: a fallback, a repeated corpus, a complete run.

    Raises:
        InputError: an unusable input; the output holds another run, something else, or is in use.
        RunPaused: the time was up, or the process was told to end (SIGTERM, Ctrl-C); the same call goes on.
        DaptMergeError: training diverged.
    """
    started = time.monotonic()
    deadline = None if time_limit_seconds is None else started + time_limit_seconds
    connect()
    note = on_note if on_note is not None and is_main() else lambda text: None
    run, inputs = _open_run(config, note)
    with run.locked() if is_main() else nullcontext():
        if agreed(_is_complete(run, overwrite=overwrite) if is_main() else False):
            note(f"the run in {run.path} is complete; nothing to do")
            return list(run.checkpoints().values())
        with _transformers_bars_off():
            return _train(config, run, inputs, _Hooks(on_corpus, on_progress, on_log, note, deadline), started)


@dataclass(frozen=True)
class _Inputs:
    base: Checkpoint
    tokenizer: Any
    precision: str


@dataclass(frozen=True)
class _Hooks:
    on_corpus: Callable[[str, int, int], None] | None
    on_progress: Callable[[int, int], None] | None
    on_log: Callable[[dict[str, Any]], None] | None
    note: Callable[[str], None]
    deadline: float | None


def _open_run(config: PretrainConfig, note: Callable[[str], None]) -> tuple[RunFolder, _Inputs]:
    """Open the inputs without any long work, and name the run by their content."""
    if config.output is None:
        raise InputError("no output folder was given", where="output", remedy="Pass -o FOLDER, or set 'output'.")
    from dapt_merge.checkpoints import open_checkpoint

    run = RunFolder(config.output.expanduser(), {})
    if is_main():
        run.refuse_foreign()
    base = open_checkpoint(config.base)
    inputs = _Inputs(base, _load_tokenizer(base), resolve_precision(config.precision, note))
    if process_count() > 1:
        _refuse_undivided(config, inputs.precision)
    return RunFolder(run.path, agreed(_identity(config, inputs) if is_main() else {})), inputs


def _identity(config: PretrainConfig, inputs: _Inputs) -> dict[str, Any]:
    from dapt_merge.corpus import corpus_fingerprint

    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in _NOT_IDENTITY}
    from dapt_merge.checkpoints import open_checkpoint

    return {
        **settings,
        # Opened anew: a checkpoint keeps what was read of it in the address space, and training needs the memory.
        "base": open_checkpoint(config.base).fingerprint(),
        # The tokenizer is part of it, and so is the number of rows, which whole steps round up.
        "corpus": corpus_fingerprint(config.corpus_config(), inputs.tokenizer, rows_multiple=config.batch_sequences),
        "precision": inputs.precision,
    }


def _refuse_undivided(config: PretrainConfig, precision: str) -> None:
    """Refuse what several processes cannot do together."""
    sharded = _is_sharded(config)
    for unable, what, remedy in (
        (precision == "bf16", "the precision 'bf16' is for one process", "Take bf16-master."),
        (sharded and config.adapter is not None, "an adapter is not sharded", "Leave out sharding."),
        (sharded and config.optimizer == "adafactor", "adafactor is not sharded", "Take adamw, or leave out sharding."),
    ):
        if unable:
            raise InputError(what, where=f"WORLD_SIZE={process_count()}", remedy=remedy)


def _is_sharded(config: PretrainConfig) -> bool:
    launched = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")
    if launched and os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError("FSDP 1 is not supported", where="FSDP_VERSION", remedy="Launch with --fsdp_version 2.")
    return process_count() > 1 and (launched or config.sharding == "fsdp2")


def _is_complete(run: RunFolder, *, overwrite: bool) -> bool:
    """Say whether the folder holds this very run, whole; make way for it when it may replace another."""
    if overwrite:
        try:
            record = run.record()
        except InputError:
            record = None
        if record is None:
            run.clear()
    record = run.record()
    complete = record is not None and record["complete"] and list(run.checkpoints()) == record["checkpoint_steps"]
    if complete:
        run.forget_states()
    return bool(complete)


def _train(config: PretrainConfig, run: RunFolder, inputs: _Inputs, hooks: _Hooks, started: float) -> list[Path]:
    import torch
    import transformers

    suites = _heldout_suites(config, run)
    with main_first():
        corpus = _build(config, inputs, hooks)
    steps = len(corpus) // config.batch_sequences
    timetable = _timetable(config, steps)
    resume = agreed(run.resume_point() if is_main() else None)
    content = {
        "config": config.model_dump(mode="json"),
        "data": {"corpus": corpus.fingerprint, **{k: corpus.manifest[k] for k in ("sources", "tokens", "packing")}},
        "checkpoint_steps": list(timetable.checkpoints),
        "processes": {"count": process_count(), "sharding": "fsdp2" if _is_sharded(config) else "none"},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if is_main():
        run.go_back_to(resume or 0)
        run.write_record(**content, complete=False)
        corpus.copy_account(run.path / "corpus")
    if resume:
        hooks.note(f"going on from step {resume} of {steps}")
    stopped = agreed(_stopped_at(config, run, timetable, resume) if is_main() else None)
    if stopped is None:
        stopped = _fit(config, run, inputs, corpus, suites, timetable, resume, hooks)
    if stopped is not None:
        hooks.note(f"stopped early: {stopped}")
        content |= {"stopped_early": stopped, "checkpoint_steps": list(run.checkpoints())}
    if is_main():
        run.write_record(**content, complete=True, seconds_of_last_start=round(time.monotonic() - started, 1))
        run.forget_states()
    return list(run.checkpoints().values())


def _heldout_suites(config: PretrainConfig, run: RunFolder) -> list[Suite]:
    """Load the held-out suites, and refuse a rule that they cannot serve, before any long work."""
    if not config.heldout:
        return []
    from dapt_merge.pretraining.heldout import heldout_suites, refuse_unmeasured_rule

    with main_first():
        suites = heldout_suites(config.heldout, run.path / "heldout")
    refuse_unmeasured_rule(config.early_stop, suites)
    return suites


def _stopped_at(config: PretrainConfig, run: RunFolder, timetable: Timetable, resume: int | None) -> str | None:
    """Return why a run that was killed after its early stop, and before it could say so, had ended."""
    from dapt_merge.pretraining.heldout import stop_reason

    measured = [(line["tokens"], line["heldout"]) for line in run.log() if "heldout" in line]
    if config.early_stop is None or resume is None or not measured:
        return None
    if measured[-1][0] != resume * timetable.tokens_per_step:
        return None
    return stop_reason(config.early_stop, measured, timetable.warmup_tokens)


def _build(config: PretrainConfig, inputs: _Inputs, hooks: _Hooks) -> BuiltCorpus:
    """Build the corpus, or open it from the cache, and hold it against the model."""
    from dapt_merge.corpus import build_corpus

    corpus = build_corpus(
        config.corpus_config(),
        inputs.tokenizer,
        rows_multiple=config.batch_sequences,
        on_progress=hooks.on_corpus,
        on_note=hooks.note,
    )
    _refuse_mismatch(config, inputs.base, corpus.highest_id)
    return corpus


def _refuse_mismatch(config: PretrainConfig, base: Checkpoint, highest_id: int) -> None:
    from dapt_merge.checkpoints.checkpoint import config_value

    vocabulary = config_value(base.config, "vocab_size")
    if vocabulary is not None and highest_id >= vocabulary:
        raise InputError(
            f"the tokenizer gives token {highest_id}, but the model's vocabulary has {vocabulary}",
            where=base.label,
            remedy="Put the tokenizer that belongs to the model beside it.",
        )
    longest = config_value(base.config, "max_position_embeddings")
    if longest is not None and config.sequence_length > longest:
        raise InputError(
            f"sequence_length is {config.sequence_length}, but the model reads at most {longest} tokens",
            where="sequence_length",
            remedy=f"Set it to {longest} or less.",
        )


def _timetable(config: PretrainConfig, steps: int) -> Timetable:
    from dapt_merge.pretraining.recorder import Timetable

    tokens = config.batch_tokens
    checkpoints = checkpoint_steps(config.checkpoints, steps, tokens)
    every = config.heldout_every_tokens
    between = range(1, steps * tokens // every + 1) if every else range(0)
    heldout = {ceil(number * every / tokens) for number in between} if every else set()
    warmup = round(config.warmup_share * steps) * tokens
    return Timetable(steps, tokens, checkpoints, frozenset(heldout | set(checkpoints)), warmup)


def checkpoint_steps(grid: CheckpointGrid, steps: int, tokens_per_step: int) -> tuple[int, ...]:
    """Return the steps to keep checkpoints at: the first ones at which the tokens of the grid are reached.

    Raises:
        InputError: two checkpoints at one step, or one past the end.

    Example:
        >>> checkpoint_steps(CheckpointGrid(every_tokens=1000), steps=5, tokens_per_step=400)
        (3, 5)
    """
    if grid.count is not None:
        wanted = [-(-steps * number // grid.count) for number in range(1, grid.count + 1)]
        asked = f"{grid.count} checkpoints were asked for"
    else:
        total = steps * tokens_per_step
        at = grid.at_tokens or range(grid.every_tokens or total, total + 1, grid.every_tokens or total)
        wanted = [ceil(tokens / tokens_per_step) for tokens in at]
        asked = f"checkpoints were asked for up to {max(at, default=0):,} tokens, {len(wanted)} in all"
    if len(set(wanted)) < len(wanted) or max(wanted, default=steps) > steps:
        raise InputError(
            f"{asked}, but the budget makes {steps} steps of {tokens_per_step:,} tokens",
            where="checkpoints",
            remedy="Ask for fewer checkpoints, or raise the budget.",
        )
    return tuple(sorted({*wanted, steps}))


def _fit(
    config: PretrainConfig,
    run: RunFolder,
    inputs: _Inputs,
    corpus: BuiltCorpus,
    suites: list[Suite],
    timetable: Timetable,
    resume: int | None,
    hooks: _Hooks,
) -> str | None:
    """Load the weights, hand everything to the Trainer, and train; return why the run ended early, or None."""
    from dapt_merge.pretraining.heldout import HeldOutMonitor
    from dapt_merge.pretraining.recorder import RunRecorder
    from dapt_merge.pretraining.trainer import PullTowardsBase

    model, whole = _model_to_train(config, run, inputs, resume, seed=config.seed)
    monitor = None
    if suites:
        shape = {"sequence_length": config.sequence_length, "documents": config.heldout_documents}
        monitor = HeldOutMonitor(suites, whole, inputs.tokenizer, **shape)  # type: ignore[arg-type]
    trainer = _trainer(config, model, inputs.precision, corpus, timetable.steps, run.path)
    details = {
        "base_fingerprint": run.identity["base"],
        "precision": inputs.precision,
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
    }
    recorder = RunRecorder(
        run,
        config,
        timetable,
        tokenizer=inputs.tokenizer,
        tokens_by_role=lambda steps: corpus.tokens_by_role(steps * config.batch_sequences),
        monitor=monitor,
        details=details,
        deadline=hooks.deadline,
        on_progress=hooks.on_progress,
        on_log=hooks.on_log,
        note=hooks.note,
    )
    recorder.attach(trainer)
    if config.decay_towards == "base":
        trainer.add_callback(
            PullTowardsBase(trainer, _load_model(inputs.base.folder, dtype="auto"), config.weight_decay)
        )
    try:
        trainer.train(resume_from_checkpoint=None if resume is None else str(run.state_folder(resume)))
    finally:
        recorder.stop_listening()
    _tell_of_lost_updates(config, run, hooks.note)
    if recorder.paused_at is not None:
        raise _paused(recorder, timetable, run)
    return recorder.stopped


def _paused(recorder: RunRecorder, timetable: Timetable, run: RunFolder) -> RunPaused:
    return RunPaused(
        f"{recorder.pause_reason} after step {recorder.paused_at} of {timetable.steps}; the state is saved",
        where=run.path,
        remedy="Give the same command again: it goes on from there.",
    )


def _model_to_train(
    config: PretrainConfig, run: RunFolder, inputs: _Inputs, resume: int | None, *, seed: int
) -> tuple[Any, Any]:
    """Return what is trained, and the causal model in it (the same, unless an adapter is around it)."""
    from dapt_merge.pretraining.attention import use_document_attention
    from dapt_merge.pretraining.loss import has_plain_head, use_head_loss

    weights = None if resume is None else run.weights_of(resume)
    whole = _load_model(inputs.base.folder if weights is None or config.adapter is not None else weights)
    whole.use_cache_of_base = whole.config.use_cache
    if config.attention == "document":
        use_document_attention(whole)
        _refuse_mixed_documents(config, inputs.base, whole)
    if has_plain_head(whole):
        use_head_loss(whole)
    if config.adapter is None:
        return whole, whole
    from dapt_merge.pretraining.adapter import add_adapter, load_adapter

    if weights is not None:
        return load_adapter(whole, weights), whole
    base = config.base if not Path(config.base).expanduser().exists() else str(Path(config.base).expanduser().resolve())
    return add_adapter(whole, config.adapter, base=base, seed=seed), whole


def _refuse_mixed_documents(config: PretrainConfig, base: Checkpoint, model: Any) -> None:
    from dapt_merge.pretraining.loss import keeps_documents_apart
    from dapt_merge.pretraining.trainer import micro_batches

    if not keeps_documents_apart(model):
        what, remedy = "this model's attention cannot be kept within documents", "Set attention: block."
    elif micro_batches(config, process_count())[0] > 1 and not keeps_documents_apart(model, rows=2):
        what = "this model's attention is kept within documents only for one sequence at a time"
        remedy = f"Set micro_batch_tokens: {config.sequence_length}, or attention: block."
    else:
        return
    raise InputError(what, where=base.label, remedy=remedy)


def _trainer(
    config: PretrainConfig, model: Any, precision: str, corpus: BuiltCorpus, steps: int, folder: Path
) -> DaptTrainer:
    import torch

    from dapt_merge.pretraining.optimizer import split_off_masters
    from dapt_merge.pretraining.trainer import DaptTrainer, has_masters, own_optimizer, training_arguments

    arguments = training_arguments(config, steps, precision, folder, sharded=_is_sharded(config))
    # Before the masters split off, so that they lie on the device too.
    model.to(arguments.device)
    masters = {}
    if has_masters(precision):
        masters = split_off_masters(model)
    elif precision == "bf16":
        split_off_masters(model)
        model.config.dtype = torch.bfloat16
    return DaptTrainer(
        model=model,
        args=arguments,
        train_dataset=corpus.train,
        optimizer_cls_and_kwargs=own_optimizer(config, precision, masters),
    )


def _tell_of_lost_updates(config: PretrainConfig, run: RunFolder, note: Callable[[str], None]) -> None:
    lost = [line["updates_lost"] for line in run.log() if "updates_lost" in line] if is_main() else []
    if lost:
        note(
            f"rounding to the nearest bfloat16 lost {100 * sum(lost) / len(lost):.0f}% of the updates of weights "
            "(mean over the steps); bf16_rounding: stochastic or precision: bf16-master loses none"
        )


def _load_tokenizer(base: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    if base.folder is None or not (base.folder / "config.json").is_file():
        raise InputError(
            "training needs a model folder with config.json and tokenizer", where=base.label, remedy="Name that folder."
        )
    try:
        return AutoTokenizer.from_pretrained(base.folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"the tokenizer cannot be loaded ({_first_line(error)})",
            where=base.folder,
            remedy="Put the tokenizer's files beside the weights.",
        ) from error


def _load_model(folder: Path | None, dtype: Any = "float32") -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise InputError(
            f"the model cannot be loaded for training ({_first_line(error)})",
            where=folder,
            remedy="Check that it is a causal language model that this version of transformers knows.",
        ) from error


@contextmanager
def _transformers_bars_off() -> Iterator[None]:
    """Switch off the bars that transformers draws while it reads and writes weights: the caller has its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def resolve_precision(precision: str, note: Callable[[str], None]) -> str:
    """Return the precision to train in: `auto` is bf16-master where the hardware multiplies bfloat16, else fp32."""
    fast = _multiplies_bfloat16()
    if precision == "auto":
        if not fast:
            note("this machine has no bfloat16 arithmetic; training in fp32")
        return "bf16-master" if fast else "fp32"
    if precision != "fp32" and not fast:
        note(f"this machine has no bfloat16 arithmetic, so '{precision}' is slow here; 'auto' would take fp32")
    return precision


def _multiplies_bfloat16() -> bool:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags: set[str] = set()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("flags", "features")):
                flags.update(line.partition(":")[2].split())
                break
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
