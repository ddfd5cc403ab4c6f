"""What a DAPT run is: one validated document, read from YAML, with `key=value` overrides.

A key that would have no effect is an error here, not a surprise after the run. What the values do to training is told
by the modules that use them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dapt_merge.corpus.config import CorpusConfig, CorpusDocuments, corpus_fields_at, locate_inputs, refuse_inert_roles
from dapt_merge.yaml_files import configured, explained, located

Precision = Literal["bf16-master", "fp32", "bf16-autocast", "bf16", "auto"]


class AdapterConfig(BaseModel):
    """Train a low-rank adapter (peft) and leave the base's weights alone.

    `dora` also learns the length of every row (arXiv 2402.09353). `targets` is `all-linear` (every linear layer but
    the head) or names of modules. Checkpoints are peft's adapter folders, which every command takes as the models that
    they stand for; `save: merged` writes full models instead.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["lora", "dora"] = "lora"
    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0, allow_inf_nan=False)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    save: Literal["adapter", "merged"] = "adapter"


class HeldOut(BaseModel):
    """Text that is never trained on: a suite of bits-per-byte tasks, or a `.jsonl` file with its axis and language."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    suite: Path | None = None
    path: Path | None = None
    axis: Literal["domain", "general"] | None = None
    language: str | None = None
    text_field: str = Field("text", min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _suite_alone(cls, value: Any) -> Any:
        return {"suite": value} if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _one_kind(self) -> HeldOut:
        if (self.suite is None) == (self.path is None):
            raise ValueError("give either a 'suite' (YAML) or the 'path' of a .jsonl file")
        if self.path is not None and self.axis is None:
            raise ValueError("a held-out file needs its 'axis': domain or general")
        if self.suite is not None and self.model_fields_set - {"suite"}:
            raise ValueError("a suite states its axis and language itself")
        return self


class EarlyStop(BaseModel):
    """When a run ends before its budget, by bits per byte on the held-out texts.

    `general_rise`: general bits per byte have risen by more than this above the base's.
    `domain_gain_per_million_tokens`: from one measurement to the next, domain bits per byte have fallen by less than
    this for each million tokens; not asked during the warm-up.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    general_rise: float | None = Field(None, gt=0, allow_inf_nan=False)
    domain_gain_per_million_tokens: float | None = Field(None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _a_rule(self) -> EarlyStop:
        if self.general_rise is None and self.domain_gain_per_million_tokens is None:
            raise ValueError("no rule: give 'general_rise' or 'domain_gain_per_million_tokens'")
        return self


class CheckpointGrid(BaseModel):
    """Where checkpoints are kept: `count` of them evenly spaced (a number alone means this), one every so many tokens,
    or at these counts of tokens; the last step is always one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int | None = Field(None, ge=1)
    every_tokens: int | None = Field(None, ge=1)
    at_tokens: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _count_alone(cls, value: Any) -> Any:
        return value if isinstance(value, Mapping | CheckpointGrid) else {"count": value}

    @model_validator(mode="after")
    def _one_grid(self) -> CheckpointGrid:
        if [self.count, self.every_tokens, self.at_tokens].count(None) != 2:
            raise ValueError("give one of 'count', 'every_tokens' and 'at_tokens'")
        return self


class PretrainConfig(BaseModel):
    """A DAPT run.

    `corpus` is a list of sources, or sources with the steps that clean, deduplicate and decontaminate them (see
    `dapt_merge.corpus`). The budget is either `tokens` (of domain and replay together) or `epochs` (passes over the
    domain corpus); it is rounded up to whole optimizer steps of `batch_tokens`, which all processes share.
    `micro_batch_tokens` is what one device takes at a time. `replay_share` is the share of the tokens that comes from
    the sources with the role `replay`. `warmup_share` and `decay_share` are shares of the steps; `checkpoints` is their
    number, evenly spaced, or a grid of tokens; the last one is at the end. `weight_decay` pulls the weights to zero or,
    with `decay_towards: base`, to the base's (L2-SP, arXiv 1802.01483, decoupled from the gradient as in AdamW).

    Example:
        >>> config = PretrainConfig(base="base", corpus=["notes.jsonl"], output="run", tokens=80_000)
        >>> config.schedule, config.precision, config.batch_sequences
        ('cosine', 'bf16-master', 8)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str = Field(min_length=1)
    corpus: CorpusDocuments
    output: Path | None = None
    replay_share: float = Field(0.0, ge=0, lt=1)
    sequence_length: int = Field(2048, ge=8)
    batch_tokens: int = Field(16_384, ge=8)
    micro_batch_tokens: int | None = Field(None, ge=8)
    attention: Literal["document", "block"] = "document"
    tokens: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0, allow_inf_nan=False)
    learning_rate: float = Field(2e-5, gt=0, allow_inf_nan=False)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_share: float = Field(0.05, ge=0, lt=1)
    decay_share: float | None = Field(None, gt=0, le=1)
    minimum_rate_share: float | None = Field(None, ge=0, lt=1)
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    weight_decay: float = Field(0.05, ge=0, allow_inf_nan=False)
    decay_towards: Literal["zero", "base"] = "zero"
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    gradient_clip: float | None = Field(1.0, gt=0)
    adapter: AdapterConfig | None = None
    gradient_checkpointing: bool = False
    precision: Precision = "bf16-master"
    bf16_rounding: Literal["stochastic", "nearest"] = "stochastic"
    sharding: Literal["none", "fsdp2"] = "none"
    checkpoints: CheckpointGrid = Field(default_factory=lambda: CheckpointGrid.model_validate(4))
    heldout: tuple[HeldOut, ...] = ()
    heldout_every_tokens: int | None = Field(None, ge=1)
    heldout_documents: int | None = Field(None, ge=1)
    early_stop: EarlyStop | None = None
    save_every_minutes: float | None = Field(60.0, gt=0, allow_inf_nan=False)
    seed: int = Field(0, ge=0, lt=2**32)
    cache_folder: Path | None = None

    @property
    def batch_sequences(self) -> int:
        """Sequences in one optimizer step, over all processes."""
        return self.batch_tokens // self.sequence_length

    def corpus_config(self) -> CorpusConfig:
        """Return the corpus that the run reads, as `dapt-merge corpus build` knows it."""
        shared = ("replay_share", "sequence_length", "attention", "tokens", "epochs", "seed", "cache_folder")
        documents = {name: getattr(self.corpus, name) for name in CorpusDocuments.model_fields}
        return CorpusConfig(**documents, **{name: getattr(self, name) for name in shared})

    @model_validator(mode="after")
    def _nothing_inert(self) -> PretrainConfig:
        if (self.tokens is None) == (self.epochs is None):
            raise ValueError("give the budget once: either 'tokens' or 'epochs'")
        refuse_inert_roles({source.role for source in self.corpus.sources}, self.replay_share)
        self._check_batches()
        self._check_schedule()
        self._check_optimizer()
        for key in ("heldout_every_tokens", "heldout_documents", "early_stop"):
            if getattr(self, key) is not None and not self.heldout:
                raise ValueError(f"'{key}' has no effect without 'heldout' texts")
        return self

    def _check_batches(self) -> None:
        length = self.sequence_length
        for key in ("batch_tokens", "micro_batch_tokens"):
            tokens = getattr(self, key)
            if tokens is not None and tokens % length:
                below, above = tokens // length * length, -(-tokens // length) * length
                nearby = f"{below} or {above}" if below else f"{above}"
                raise ValueError(f"'{key}' holds whole sequences of {length} tokens: take {nearby}, not {tokens}")
        if self.micro_batch_tokens and self.batch_tokens % self.micro_batch_tokens:
            raise ValueError("'micro_batch_tokens' must divide 'batch_tokens'")

    def _check_schedule(self) -> None:
        if self.decay_share is not None and self.schedule != "wsd":
            raise ValueError(f"'decay_share' has no effect with the schedule '{self.schedule}'; it belongs to 'wsd'")
        if self.schedule == "wsd" and self.warmup_share + (self.decay_share or DEFAULT_DECAY_SHARE) > 1:
            raise ValueError("'warmup_share' and 'decay_share' together are more than the whole run")
        if self.minimum_rate_share is not None and self.schedule not in ("cosine", "wsd"):
            raise ValueError(f"'minimum_rate_share' has no effect with the schedule '{self.schedule}'")

    def _check_optimizer(self) -> None:
        given = self.model_fields_set
        for key in ("adam_beta1", "adam_beta2"):
            if self.optimizer != "adamw" and key in given:
                raise ValueError(f"'{key}' has no effect with the optimizer '{self.optimizer}'")
        if "bf16_rounding" in given and self.precision != "bf16":
            raise ValueError(f"'bf16_rounding' has no effect with the precision '{self.precision}', only with 'bf16'")
        if self.precision == "bf16" and self.optimizer != "adamw":
            raise ValueError("the precision 'bf16' goes with the optimizer 'adamw'")
        if self.decay_towards == "base":
            if self.weight_decay == 0:
                raise ValueError("'decay_towards' has no effect with a 'weight_decay' of 0")
            if self.adapter is not None:
                raise ValueError("an adapter's weight decay pulls towards the base as it is; leave out 'decay_towards'")
            if self.precision == "bf16":
                raise ValueError("'decay_towards: base' needs float32 weights: its pulls are too small for 'bf16'")


DEFAULT_DECAY_SHARE = 0.2


def load_pretrain_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read a run from a YAML file, or from a mapping of the same shape, and check all of it.

    Relative paths of inputs are relative to the current folder; one that does not exist there, but does beside the
    YAML file, is taken from there.

    Args:
        source: the path of a YAML file, or a mapping.
        overrides: `key=value` each, the value in YAML; a dotted key reaches inside (`corpus.0.path=notes.jsonl`).

    Raises:
        InputError: the file is missing or not YAML; a key is unknown; a value has the wrong type, is out of range or
            contradicts another one. It names the file and the key.

    Example:
        >>> load_pretrain_config({"base": "b", "corpus": ["c.txt"], "epochs": 1}, ["learning_rate=1e-4"]).learning_rate
        0.0001
    """
    remedy = "Start from recipes/pretrain-demo.yaml."
    content, origin = configured(source, overrides, noun="pre-training run", remedy=remedy, locate=_locate_inputs)
    try:
        return PretrainConfig.model_validate(content)
    except ValidationError as error:
        raise explained(error, origin, _fields_at) from None


def _locate_inputs(content: dict[str, Any], folder: Path) -> None:
    def found(path: Any) -> Any:
        return located(path, folder) if isinstance(path, str) and path else path

    if "base" in content:
        content["base"] = found(content["base"])
    corpus = content.get("corpus")
    if isinstance(corpus, list):
        corpus = content["corpus"] = {"sources": corpus}
    if isinstance(corpus, dict):
        locate_inputs(corpus, folder)
    heldout = content.get("heldout")
    if isinstance(heldout, list):
        content["heldout"] = [
            {key: found(value) if key in ("path", "suite") else value for key, value in entry.items()}
            if isinstance(entry, dict)
            else found(entry)
            for entry in heldout
        ]


_SECTIONS: dict[str, type[BaseModel]] = {
    "adapter": AdapterConfig,
    "heldout": HeldOut,
    "early_stop": EarlyStop,
    "checkpoints": CheckpointGrid,
}


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    if location and location[0] == "corpus":
        return corpus_fields_at(location[1:], CorpusDocuments)
    section = _SECTIONS.get(str(location[0])) if location else None
    return list((section or PretrainConfig).model_fields)
