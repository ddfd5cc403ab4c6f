"""What a DAPT run is: one validated document, read from YAML, with `key=value` overrides.

A key that would have no effect is an error here, not a surprise after the run. What the values do to training is told
by the modules that use them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dapt_merge.errors import InputError, nearest
from dapt_merge.yaml_files import explained, parse_override, read_mapping

Role = Literal["domain", "replay"]
Precision = Literal["bf16-master", "fp32", "bf16-autocast", "auto"]


class CorpusSource(BaseModel):
    """One part of the corpus: a `.jsonl` or `.txt` file, or a folder of such files.

    `text_field` names the field of a JSON line that holds the text; `document` says what one document of a plain-text
    file is: the whole file, a paragraph (blocks between blank lines) or a line.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path
    role: Role = "domain"
    text_field: str = Field("text", min_length=1)
    document: Literal["file", "paragraph", "line"] = "file"

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | Path) else value


class PretrainConfig(BaseModel):
    """A DAPT run.

    The budget is either `tokens` (of domain and replay together) or `epochs` (passes over the domain corpus); it is
    rounded up to whole optimizer steps of `batch_sequences` × `sequence_length` tokens. `replay_share` is the share of
    those tokens that comes from the sources with the role `replay`. `warmup_share` and `decay_share` are shares of the
    steps; `checkpoints` are spaced evenly, the last one at the end.

    Example:
        >>> config = PretrainConfig(base="base", corpus=["notes.jsonl"], output="run", tokens=80_000)
        >>> config.schedule, config.precision
        ('cosine', 'bf16-master')
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str = Field(min_length=1)
    corpus: tuple[CorpusSource, ...] = Field(min_length=1)
    output: Path | None = None
    replay_share: float = Field(0.0, ge=0, lt=1)
    sequence_length: int = Field(2048, ge=8)
    batch_sequences: int = Field(8, ge=1)
    micro_batch_sequences: int | None = Field(None, ge=1)
    attention: Literal["document", "block"] = "document"
    tokens: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0, allow_inf_nan=False)
    learning_rate: float = Field(2e-5, gt=0, allow_inf_nan=False)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_share: float = Field(0.05, ge=0, lt=1)
    decay_share: float | None = Field(None, gt=0, le=1)
    minimum_rate_share: float | None = Field(None, ge=0, lt=1)
    weight_decay: float = Field(0.05, ge=0, allow_inf_nan=False)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    gradient_clip: float | None = Field(1.0, gt=0)
    checkpoints: int = Field(4, ge=1)
    precision: Precision = "bf16-master"
    seed: int = Field(0, ge=0, lt=2**32)
    cache_folder: Path | None = None

    @model_validator(mode="after")
    def _nothing_inert(self) -> PretrainConfig:
        if (self.tokens is None) == (self.epochs is None):
            raise ValueError("give the budget once: either 'tokens' or 'epochs'")
        roles = {source.role for source in self.corpus}
        if "domain" not in roles:
            raise ValueError("the corpus has no source with the role 'domain'")
        if "replay" in roles and self.replay_share == 0:
            raise ValueError("there are replay sources, but 'replay_share' is 0, so they would never be read")
        if "replay" not in roles and self.replay_share > 0:
            raise ValueError("'replay_share' is above 0, but no source has the role 'replay'")
        if self.decay_share is not None and self.schedule != "wsd":
            raise ValueError(f"'decay_share' has no effect with the schedule '{self.schedule}'; it belongs to 'wsd'")
        if self.schedule == "wsd" and self.warmup_share + (self.decay_share or DEFAULT_DECAY_SHARE) > 1:
            raise ValueError("'warmup_share' and 'decay_share' together are more than the whole run")
        if self.minimum_rate_share is not None and self.schedule not in ("cosine", "wsd"):
            raise ValueError(f"'minimum_rate_share' has no effect with the schedule '{self.schedule}'")
        if self.micro_batch_sequences and self.batch_sequences % self.micro_batch_sequences:
            raise ValueError("'micro_batch_sequences' must divide 'batch_sequences'")
        return self


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
    origin = "configuration" if isinstance(source, Mapping) else str(source)
    content = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    try:
        content = _with_overrides(content, overrides)
        if not isinstance(source, Mapping):
            _locate_inputs(content, Path(source).parent)
        return PretrainConfig.model_validate(content)
    except ValidationError as error:
        raise explained(error, origin, _fields_at) from None


def _read(path: Path) -> dict[str, Any]:
    return read_mapping(path, noun="pre-training run", remedy="Start from recipes/pretrain-demo.yaml.")


def _with_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    edited = copy.deepcopy(dict(content))
    for text in overrides:
        key, value = parse_override(text)
        *parents, last = key.split(".")
        place: Any = edited
        for part in parents:
            place = _inside(place, part, key)
        if isinstance(place, list):
            _inside(place, last, key)
            place[int(last)] = value
        elif isinstance(place, dict):
            place[last] = value
        else:
            raise InputError(f"'{key}' reaches inside a single value", where=key, remedy="Give the key alone.")
    return edited


def _inside(place: Any, part: str, key: str) -> Any:
    try:
        return place[int(part)] if isinstance(place, list) else place[part]
    except (KeyError, IndexError, ValueError, TypeError):
        known = [str(index) for index in range(len(place))] if isinstance(place, list) else list(place)
        raise InputError(
            f"there is no '{part}' to override.{nearest(part, known)}",
            where=key,
            remedy=f"There is: {', '.join(known)}.",
        ) from None


def _locate_inputs(content: dict[str, Any], folder: Path) -> None:
    def located(path: Any) -> Any:
        usable = isinstance(path, str) and not Path(path).expanduser().exists() and (folder / path).exists()
        return str(folder / path) if usable else path

    if "base" in content:
        content["base"] = located(content["base"])
    sources = content.get("corpus")
    if isinstance(sources, list):
        for index, source in enumerate(sources):
            if isinstance(source, dict) and "path" in source:
                source["path"] = located(source["path"])
            else:
                sources[index] = located(source)


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    return list(CorpusSource.model_fields if location[:1] == ("corpus",) else PretrainConfig.model_fields)
