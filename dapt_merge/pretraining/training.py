"""A DAPT run from its configuration to its checkpoints: the story, with the work done elsewhere.

Read the inputs and name the run by their content; if it is complete, say so; if it was killed, go on from its newest
checkpoint; otherwise tokenise, pack, train. On a CPU with the same number of threads, a run that was killed and a run
that was not end with the same bytes. One process and one device; several are refused.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapt_merge.errors import InputError
from dapt_merge.pretraining.config import PretrainConfig
from dapt_merge.pretraining.run_folder import RunFolder

if TYPE_CHECKING:
    from dapt_merge.checkpoints import Checkpoint
    from dapt_merge.pretraining.packing import MixReport, PackedBlocks

# What does not make another run: where it is written, and where inputs lie (their content counts).
_NOT_IDENTITY = {"output", "cache_folder", "base", "corpus", "precision"}


def pretrain(
    config: PretrainConfig,
    *,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> list[Path]:
    """Train, or go on training, and return the checkpoint folders in order.

    Args:
        config: the run; `output` is required here.
        overwrite: start again when the folder holds another run.
        on_progress: called with (tokens done, tokens in all).
        on_log: called with every line of `log.jsonl`.
        on_note: called with sentences that the user should see: a fallback, a repeated corpus, a complete run.

    Raises:
        InputError: an unusable input; the output holds another run, something else, or is in use.
        DaptMergeError: training diverged.
    """
    note = on_note or (lambda text: None)
    run, inputs = _open_run(config, note)
    with run.locked():
        record = None if overwrite and not _is_same(run) else run.record()
        if record is None and overwrite:
            run.clear()
        if record is not None and record["complete"] and list(run.checkpoints()) == record["checkpoint_steps"]:
            run.forget_states()
            note(f"the run in {run.path} is complete; nothing to do")
            return list(run.checkpoints().values())
        with _transformers_bars_off():
            return _train(config, run, inputs, _Hooks(on_progress, on_log, note))


@dataclass(frozen=True)
class _Inputs:
    base: Checkpoint
    tokenizer: Any
    precision: str


@dataclass(frozen=True)
class _Hooks:
    on_progress: Callable[[int, int], None] | None
    on_log: Callable[[dict[str, Any]], None] | None
    note: Callable[[str], None]


def _open_run(config: PretrainConfig, note: Callable[[str], None]) -> tuple[RunFolder, _Inputs]:
    """Open the inputs without any long work, and name the run by their content."""
    if config.output is None:
        raise InputError("no output folder was given", where="output", remedy="Pass -o FOLDER, or set 'output'.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "a run uses one process", where="WORLD_SIZE", remedy="Start it without torchrun or accelerate launch."
        )
    from dapt_merge.checkpoints import open_checkpoint
    from dapt_merge.pretraining.corpus import content_fingerprint, tokenizer_fingerprint

    run = RunFolder(config.output.expanduser(), {})
    run.refuse_foreign()
    corpus = [f"{source.role} {content_fingerprint(source)}" for source in config.corpus]
    base = open_checkpoint(config.base)
    inputs = _Inputs(base, _load_tokenizer(base), resolve_precision(config.precision, note))
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in _NOT_IDENTITY}
    identity = {
        **settings,
        "base": base.fingerprint(),
        "tokenizer": tokenizer_fingerprint(inputs.tokenizer),
        "corpus": corpus,
        "precision": inputs.precision,
    }
    return RunFolder(run.path, identity), inputs


def _is_same(run: RunFolder) -> bool:
    try:
        return run.record() is not None
    except InputError:
        return False


def _train(config: PretrainConfig, run: RunFolder, inputs: _Inputs, hooks: _Hooks) -> list[Path]:
    import torch
    import transformers

    started = time.monotonic()
    blocks, mix = _pack(config, inputs, hooks.note)
    steps = [-(-mix.steps * number // config.checkpoints) for number in range(1, config.checkpoints + 1)]
    if len(set(steps)) < len(steps):
        raise InputError(
            f"{config.checkpoints} checkpoints were asked for, but the budget makes {mix.steps} steps",
            where="checkpoints",
            remedy="Ask for fewer checkpoints, or raise the budget.",
        )
    resume = run.resume_point()
    run.go_back_to(resume or 0)
    content = {
        "config": config.model_dump(mode="json"),
        "data": mix.to_dict(),
        "checkpoint_steps": steps,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    run.write_record(**content, complete=False)
    if resume:
        hooks.note(f"going on from step {resume} of {mix.steps}")
    _fit(config, run, inputs, blocks, steps, resume, hooks)
    run.write_record(**content, complete=True, seconds_of_last_start=round(time.monotonic() - started, 1))
    run.forget_states()
    return list(run.checkpoints().values())


def _pack(config: PretrainConfig, inputs: _Inputs, note: Callable[[str], None]) -> tuple[PackedBlocks, MixReport]:
    """Tokenise the corpus and lay out the blocks of the whole run."""
    from dapt_merge.pretraining.corpus import tokenise
    from dapt_merge.pretraining.packing import DocumentStream, PackedBlocks, plan_steps, report_mix

    corpora = [(s.role, tokenise(s, inputs.tokenizer, config.cache_folder)) for s in config.corpus]
    domain = [corpus for role, corpus in corpora if role == "domain"]
    replay = [corpus for role, corpus in corpora if role == "replay"]
    steps = plan_steps(
        tokens=config.tokens,
        epochs=config.epochs,
        domain_tokens=sum(corpus.tokens for corpus in domain),
        replay_share=config.replay_share,
        tokens_per_step=config.batch_sequences * config.sequence_length,
    )
    shape = {"replay_share": config.replay_share, "sequence_length": config.sequence_length}
    mix = report_mix(domain, replay, steps=steps, batch_sequences=config.batch_sequences, **shape)  # type: ignore[arg-type]
    for line in _notes_on(mix):
        note(line)
    highest = max(corpus.highest_id for _, corpus in corpora)
    _refuse_mismatch(config, inputs.base, highest)
    blocks = PackedBlocks(
        DocumentStream(domain, "domain", config.seed),
        DocumentStream(replay, "replay", config.seed) if replay else None,
        count=steps * config.batch_sequences,
        keep_documents_apart=config.attention == "document",
        **shape,  # type: ignore[arg-type]
    )
    return blocks, mix


def _notes_on(mix: MixReport) -> list[str]:
    notes = [
        f"{mix.steps:,} steps, {mix.tokens:,} tokens: {mix.domain_tokens:,} domain ({mix.domain_epochs:.2f} epochs), "
        f"{mix.replay_tokens:,} replay ({mix.replay_epochs:.2f} epochs)"
    ]
    if mix.domain_tokens_never_read:
        notes.append(f"the budget leaves {mix.domain_tokens_never_read:,} domain tokens unread")
    if mix.empty_documents_skipped:
        notes.append(f"{mix.empty_documents_skipped:,} documents without text were skipped")
    if mix.domain_epochs > 4:
        notes.append("the domain corpus is read more than four times; expect little from further epochs")
    return notes


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


def _fit(
    config: PretrainConfig,
    run: RunFolder,
    inputs: _Inputs,
    blocks: PackedBlocks,
    checkpoint_steps: list[int],
    resume: int | None,
    hooks: _Hooks,
) -> None:
    """Load the weights, hand everything to the Trainer, and train to the last step."""
    from dapt_merge.pretraining.loss import has_plain_head, keeps_documents_apart
    from dapt_merge.pretraining.optimizer import MasterWeightAdamW, split_off_masters
    from dapt_merge.pretraining.trainer import DaptTrainer, RunRecorder, training_arguments

    model = _load_model(inputs.base.folder if resume is None else run.checkpoints()[resume])
    model.use_cache_of_base = model.config.use_cache
    if config.attention == "document" and not keeps_documents_apart(model):
        raise InputError(
            "this model's attention cannot be kept within documents",
            where=inputs.base.label,
            remedy="Set attention: block.",
        )
    plain_head = has_plain_head(model)
    arguments = training_arguments(config, checkpoint_steps[-1], inputs.precision, run.path)
    # Before the masters split off, so that they lie on the device too.
    model.to(arguments.device)
    masters = split_off_masters(model) if inputs.precision == "bf16-master" else {}
    options = {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2), "eps": 1e-8}
    options |= {"masters": masters, "max_grad_norm": config.gradient_clip}
    trainer = DaptTrainer(
        plain_head=plain_head,
        model=model,
        args=arguments,
        train_dataset=blocks,
        optimizer_cls_and_kwargs=(MasterWeightAdamW, options) if masters else None,
    )
    recorder = RunRecorder(
        run,
        base=inputs.base,
        tokenizer=inputs.tokenizer,
        blocks=blocks,
        config=config,
        checkpoint_steps=checkpoint_steps,
        details={
            "base_fingerprint": run.identity["base"],
            "precision": inputs.precision,
            "seed": config.seed,
            "config": config.model_dump(mode="json"),
        },
        on_progress=hooks.on_progress,
        on_log=hooks.on_log,
    )
    recorder.attach(trainer)
    trainer.train(resume_from_checkpoint=None if resume is None else str(run.state_folder(resume)))


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


def _load_model(folder: Path | None) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
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
