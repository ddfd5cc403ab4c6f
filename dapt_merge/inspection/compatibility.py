"""What two checkpoints say of themselves: tokens, configuration, names and shapes of tensors.

A merge refuses what does not fit; here the same findings are told, so that someone can see all of them at once. What
this module does not know: the tensors' values (but for a tied head, whose stored copy is compared).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dapt_merge.checkpoints.checkpoint import Checkpoint
from dapt_merge.checkpoints.tying import with_own_heads
from dapt_merge.checkpoints.vocabulary import VocabularyComparison, check_same_vocabulary, compare_vocabularies
from dapt_merge.errors import InputError
from dapt_merge.merging.agreement import agree

# They say who wrote the file, not what the model is.
_BOOKKEEPING = ("transformers_version", "_name_or_path")


@dataclass(frozen=True)
class ConfigDifference:
    """A key of config.json (dotted where nested) that both checkpoints state, with different values."""

    key: str
    base: Any
    model: Any


@dataclass(frozen=True)
class Compatibility:
    """What differs between a base and one checkpoint beside the weights.

    Attributes:
        vocabulary: None when no difference is known; else a sentence.
        tokens: the two vocabularies token by token; None where one of the two has no tokenizer, or a garbled one.
        config: the settings that both state and that differ.
        stated_once: settings that only one of them states (its transformers version may write more of the defaults).
        only_in_base, only_in_model: names of tensors.
        other_shape: names of tensors that both have, in different shapes or kinds of dtype.
        merge_refused: why a merge of the two would be refused; None when it would run.
        notes: what a merge of the two would report.
    """

    vocabulary: str | None
    tokens: VocabularyComparison | None
    config: tuple[ConfigDifference, ...]
    stated_once: tuple[str, ...]
    only_in_base: tuple[str, ...]
    only_in_model: tuple[str, ...]
    other_shape: tuple[str, ...]
    merge_refused: str | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON-ready data."""
        return asdict(self)


def compare_declarations(base: Checkpoint, model: Checkpoint) -> Compatibility:
    """Hold two checkpoints' declarations against each other; nothing is refused."""
    shared = [name for name in base.tensors if name in model.tensors]
    refused, notes = _merge_refused(base, model)
    ours, theirs = dict(_settings(base.config)), dict(_settings(model.config))
    return Compatibility(
        vocabulary=_vocabulary(base, model),
        tokens=_tokens(base, model),
        config=tuple(
            ConfigDifference(key, ours[key], theirs[key]) for key in ours if key in theirs and ours[key] != theirs[key]
        ),
        stated_once=tuple(sorted(ours.keys() ^ theirs.keys())) if ours and theirs else (),
        only_in_base=tuple(name for name in base.tensors if name not in model.tensors and name not in model.aliases),
        only_in_model=tuple(name for name in model.tensors if name not in base.tensors and name not in base.aliases),
        other_shape=tuple(name for name in shared if not comparable(base, model, name)),
        merge_refused=refused,
        notes=notes,
    )


def comparable(base: Checkpoint, model: Checkpoint, name: str) -> bool:
    """Say whether both hold the tensor in one shape, and both as floating point or both not."""
    one, two = base.tensors.get(name), model.tensors.get(name)
    if one is None or two is None:
        return False
    return one.shape == two.shape and one.dtype.is_floating_point == two.dtype.is_floating_point


def _merge_refused(base: Checkpoint, model: Checkpoint) -> tuple[str | None, tuple[str, ...]]:
    try:
        return None, agree(list(with_own_heads({"base": base, "model": model}).values())).warnings
    except InputError as error:
        return error.what, ()


def _tokens(base: Checkpoint, model: Checkpoint) -> VocabularyComparison | None:
    try:
        return compare_vocabularies(base, model)
    except InputError:
        return None  # said by `vocabulary`


def _vocabulary(base: Checkpoint, model: Checkpoint) -> str | None:
    try:
        return check_same_vocabulary(base, model)
    except InputError as error:
        return error.what


def _settings(config: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        name = "dtype" if key == "torch_dtype" else key
        if isinstance(value, Mapping):
            yield from _settings(value, f"{start}{name}.")
        elif key not in _BOOKKEEPING:
            yield f"{start}{name}", value
