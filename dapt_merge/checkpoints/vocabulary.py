"""Do two checkpoints give the same meaning to the same token id?

Averaging row 17 of two embeddings makes sense only when row 17 is the same token. This module reads which token has
which id, from whatever file a tokenizer is kept in, and compares two of them. How rows are brought together where they
differ, `alignment` knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dapt_merge.checkpoints.checkpoint import Checkpoint
from dapt_merge.checkpoints.files import read_json
from dapt_merge.checkpoints.groups import embedding_and_head
from dapt_merge.errors import InputError

# What only transformers can turn into ids: a model class may shift the pieces, or put its own tokens around them.
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", *SENTENCEPIECE_FILES)
# Beside a tokenizer.json they repeat it; beside the other files they hold the tokens that were added later.
_ADDITIONS = ("added_tokens.json", "tokenizer_config.json")
_NAMED = 5


@dataclass(frozen=True)
class VocabularyComparison:
    """Two vocabularies held against each other, token by token.

    Attributes:
        base_tokens, model_tokens: how many tokens each has.
        same: tokens with one id in both.
        moved: tokens that both have under different ids; some of them: token → (id in the base, id in the model).
        only_in_base, only_in_model: tokens that one of them lacks; some of them: token → id.
        base_rows, model_rows: rows of the embeddings; those beyond the tokens are padding. None without an embedding.
    """

    base_tokens: int
    model_tokens: int
    same: int
    moved: int
    only_in_base: int
    only_in_model: int
    moved_examples: dict[str, tuple[int, int]]
    base_examples: dict[str, int]
    model_examples: dict[str, int]
    base_rows: int | None = None
    model_rows: int | None = None

    @property
    def agree(self) -> bool:
        """Whether every token has one id in both, and neither has a token that the other lacks."""
        return not (self.moved or self.only_in_base or self.only_in_model)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON-ready data."""
        return asdict(self)

    def sentences(self) -> list[str]:
        """Return the comparison in words, most telling first.

        Example:
            >>> compare_ids({"a": 0, "b": 1}, {"a": 0, "b": 2, "<pad>": 1}).sentences()
            ['1 of 2 tokens have the same id in both', "1 changed its id: 'b' 1 → 2", "1 only in the model: '<pad>' 1"]
        """
        lines = [f"{self.same} of {self.base_tokens} tokens have the same id in both"]
        if self.moved:
            examples = (f"{token!r} {one} → {other}" for token, (one, other) in self.moved_examples.items())
            lines.append(f"{self.moved} changed {'its' if self.moved == 1 else 'their'} id: {_some(examples)}")
        for count, found, where in (
            (self.only_in_base, self.base_examples, "base"),
            (self.only_in_model, self.model_examples, "model"),
        ):
            if count:
                lines.append(
                    f"{count} only in the {where}: {_some(f'{token!r} {row}' for token, row in found.items())}"
                )
        for rows, tokens, where in (
            (self.base_rows, self.base_tokens, "base"),
            (self.model_rows, self.model_tokens, "model"),
        ):
            if rows is not None and rows != tokens:
                lines.append(f"{rows} rows for {tokens} tokens in the {where}")
        return lines


def compare_vocabularies(base: Checkpoint, model: Checkpoint) -> VocabularyComparison | None:
    """Compare two checkpoints' vocabularies; None where one of them has no tokenizer beside it.

    Raises:
        InputError: a tokenizer file is garbled.
    """
    ids, other_ids = token_ids(base), token_ids(model)
    if ids is None or other_ids is None:
        return None
    return compare_ids(ids, other_ids, base_rows=embedding_rows(base), model_rows=embedding_rows(model))


def compare_ids(
    ids: Mapping[str, int],
    other_ids: Mapping[str, int],
    *,
    base_rows: int | None = None,
    model_rows: int | None = None,
) -> VocabularyComparison:
    """Compare two maps from token to id; see `VocabularyComparison`."""
    moved = {token: (row, other_ids[token]) for token, row in ids.items() if other_ids.get(token, row) != row}
    lost = {token: row for token, row in ids.items() if token not in other_ids}
    new = {token: row for token, row in other_ids.items() if token not in ids}
    return VocabularyComparison(
        base_tokens=len(ids),
        model_tokens=len(other_ids),
        same=len(ids) - len(moved) - len(lost),
        moved=len(moved),
        only_in_base=len(lost),
        only_in_model=len(new),
        moved_examples=dict(sorted(moved.items(), key=lambda item: item[1])[:_NAMED]),
        base_examples=dict(sorted(lost.items(), key=lambda item: item[1])[:_NAMED]),
        model_examples=dict(sorted(new.items(), key=lambda item: item[1])[:_NAMED]),
        base_rows=base_rows,
        model_rows=model_rows,
    )


def check_same_vocabulary(first: Checkpoint, second: Checkpoint) -> str | None:
    """Raise unless the two tokenizers map the same tokens to the same ids.

    Returns:
        None when they agree, or when neither has a tokenizer; a sentence for the report when they cannot be compared.

    Raises:
        InputError: a token differs; it is named with both ids.
    """
    if first.vocabulary_key is not None and first.vocabulary_key == second.vocabulary_key:
        return None
    of_first, of_second = _vocabulary_file(first.folder), _vocabulary_file(second.folder)
    if first.folder == second.folder or (of_first is None and of_second is None):
        return None
    if of_first is None or of_second is None:
        without = first.label if of_first is None else second.label
        return f"the vocabularies of {first.label} and {second.label} were not compared: {without} has no tokenizer"
    if _same_files(of_first, of_second):
        return None
    found = compare_vocabularies(first, second)
    if found is None or found.agree:
        return None
    differing = found.moved + found.only_in_base + found.only_in_model
    token, one, other = _first_difference(found)
    raise InputError(
        f"two different vocabularies: {differing} tokens differ, the first is {token!r}: "
        f"id {one} in {first.label}, {other} in {second.label}",
        where=f"{first.label} and {second.label}",
        remedy="Merge checkpoints that share one tokenizer, or write 'tokenizer_source: base' (or union) into the "
        "recipe: embeddings are then aligned by token.",
    )


def _first_difference(found: VocabularyComparison) -> tuple[str, int | str, int | str]:
    rows: list[tuple[int, str, int | str, int | str]] = [
        *((one, token, one, other) for token, (one, other) in found.moved_examples.items()),
        *((row, token, row, "none") for token, row in found.base_examples.items()),
        *((row, token, "none", row) for token, row in found.model_examples.items()),
    ]
    return min(rows, key=lambda row: row[:2])[1:]


def _same_files(one: Path, other: Path) -> bool:
    """Say whether two tokenizers are the same bytes; if not, they may still give the same ids."""
    names = (one.name,) if one.name == "tokenizer.json" else (one.name, *_ADDITIONS)
    return one.name == other.name and all(_content(one.parent / n) == _content(other.parent / n) for n in names)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def token_ids(checkpoint: Checkpoint) -> dict[str, int] | None:
    """Return token → id of a checkpoint's tokenizer, tokens added to it included; None when none is beside it.

    Raises:
        InputError: the file is there and garbled.
    """
    path = _vocabulary_file(checkpoint.folder)
    if path is None:
        return None
    if path.name in SENTENCEPIECE_FILES:
        return fast_tokenizer(path.parent).get_vocab()
    if path.name == "tokenizer.json":
        return _ids_of_tokenizer_json(path)
    if path.name == "vocab.txt":
        found = {token: row for row, token in enumerate(path.read_text(encoding="utf-8").splitlines())}
    else:
        found = _plain_ids(path, read_json(path))
    return found | _added_later(path.parent)


def fast_tokenizer(folder: Path) -> Any:
    """Return what transformers makes of a folder's tokenizer files; no code from the folder is run.

    Raises:
        InputError: it can make nothing of them.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds; each means the same to the user
        raise InputError(
            f"transformers cannot read this tokenizer ({type(error).__name__}: {str(error).splitlines()[0]:.120})",
            where=folder,
            remedy="Copy its files again from their source, tokenizer_config.json and config.json among them; or save "
            "it as a tokenizer.json: AutoTokenizer.from_pretrained(source).save_pretrained(folder).",
        ) from error


def has_tokenizer(folder: Path) -> bool:
    """Say whether a folder holds a tokenizer's vocabulary."""
    return _vocabulary_file(folder) is not None


def embedding_rows(checkpoint: Checkpoint) -> int | None:
    """Return how many rows the input embedding has; None without one."""
    embedding, _ = embedding_and_head(checkpoint.tensors)
    return None if embedding is None else checkpoint.tensors[embedding].shape[0]


def _vocabulary_file(folder: Path | None) -> Path | None:
    if folder is None:
        return None
    return next((folder / name for name in _VOCABULARY_FILES if (folder / name).is_file()), None)


def _ids_of_tokenizer_json(path: Path) -> dict[str, int]:
    data = read_json(path)
    try:
        vocabulary = data["model"]["vocab"]
        listed = isinstance(vocabulary, Mapping)
        ids = dict(vocabulary) if listed else {token: row for row, (token, _) in enumerate(vocabulary)}
        return ids | {token["content"]: token["id"] for token in data.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError) as error:
        raise _garbled(path, error) from error


def _added_later(folder: Path) -> dict[str, int]:
    """Return the tokens that were added to a tokenizer which is not kept as one tokenizer.json."""
    found: dict[str, int] = {}
    settings, plain = folder / "tokenizer_config.json", folder / "added_tokens.json"
    if settings.is_file():
        try:
            added = read_json(settings).get("added_tokens_decoder") or {}
            found |= {entry["content"]: int(row) for row, entry in added.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _garbled(settings, error) from error
    return found | (_plain_ids(plain, read_json(plain)) if plain.is_file() else {})


def _plain_ids(path: Path, data: Mapping[str, Any]) -> dict[str, int]:
    if not all(isinstance(row, int) for row in data.values()):
        raise _garbled(path, "an id is no whole number")
    return dict(data)


def _garbled(path: Path, reason: object) -> InputError:
    return InputError(
        f"the tokenizer file cannot be read ({reason})", where=path, remedy="Copy it again from its source."
    )


def _some(examples: Any) -> str:
    return ", ".join(examples)
