"""Embeddings of models with different vocabularies, brought to one: row i means the same token in all of them.

The idea: fix the tokens of the output (the base's, another model's, or the union), and read each model's embedding and
head with their rows gathered by token string. A row that a model lacks is the base's, or where the base lacks it too
the mean of those that have it: then a model without a token moves nothing there, and a token of one model alone comes
through unchanged. Rows without a token (padding) stay those of the model that gives the tokenizer. Tensors are gathered
when they are read and never kept. What tokenizers do with text this module does not know.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from dapt_merge.checkpoints.checkpoint import Checkpoint, TensorInfo
from dapt_merge.checkpoints.companions import COMPANIONS
from dapt_merge.checkpoints.groups import embedding_and_head, tensor_group
from dapt_merge.checkpoints.vocabulary import token_ids
from dapt_merge.errors import InputError

_TOKENIZER_FILES = tuple(name for name in COMPANIONS if "token" in name or "vocab" in name or name == "merges.txt")
_NAMED = 5


@dataclass(frozen=True)
class Alignment:
    """The vocabulary of the output, and where each model has its rows.

    Attributes:
        source: "union", or the reference of the model whose tokenizer the output carries.
        folder: where that tokenizer lies.
        tokens: token → row in the output.
        rows: how many rows the output's embedding has, padding included.
        places: reference → for each row of the output the model's own row, or −1.
        added: tokens that the union adds to the tokenizer's own, in the order of their ids.
    """

    source: str
    folder: Path | None
    tokens: Mapping[str, int]
    rows: int
    places: Mapping[str, Tensor]
    added: tuple[str, ...]
    report: Mapping[str, Mapping[str, Any]]

    def sentences(self) -> list[str]:
        """Say for the report which models were changed, and how."""
        lines = [
            f"{label}: of {found['tokens']} tokens {found['moved']} changed their id, {found['dropped']} are dropped,"
            f" {found['filled']} rows come from other models"
            for label, found in self.report.items()
            if found["moved"] or found["dropped"] or found["filled"]
        ]
        return [f"tokenizer_source {self.source}: {line}" for line in lines]

    def write_tokenizer(self, folder: Path) -> None:
        """Replace the tokenizer files in an output folder by those that fit the merged rows."""
        if self.folder is None:
            return
        for name in _TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)
            if (self.folder / name).is_file():
                (folder / name).write_bytes((self.folder / name).read_bytes())
        if self.added:
            _add_tokens(folder, {token: self.tokens[token] for token in self.added})


def align(checkpoints: Mapping[str, Checkpoint], source: str) -> tuple[dict[str, Checkpoint], Alignment]:
    """Return the checkpoints with the vocabulary that `source` names, and the account of it.

    Args:
        checkpoints: reference → checkpoint, the base first.
        source: "base", "union" or one of the references.

    Raises:
        InputError: a model's vocabulary cannot be read, or `source` is none of the models.
    """
    first = next(iter(checkpoints))
    giver = first if source in ("base", "union") else source
    if giver not in checkpoints:
        raise InputError(
            f"tokenizer_source '{source}' is none of the models",
            where="tokenizer_source",
            remedy=f"Give base, union, or one of: {', '.join(checkpoints)}.",
        )
    rows = {label: _rows(checkpoint) for label, checkpoint in checkpoints.items()}
    known = {label: _vocabulary(checkpoints, label, giver, rows) for label in checkpoints}
    tokens = dict(known[giver])
    added: list[str] = []
    if source == "union":
        added = [token for ids in known.values() for token in sorted(ids, key=lambda t: ids[t]) if token not in tokens]
        added = list(dict.fromkeys(added))
        start = max(tokens.values(), default=-1) + 1
        tokens |= {token: start + number for number, token in enumerate(added)}
    total = max(rows[giver], max(tokens.values(), default=-1) + 1)
    padding = sorted(set(range(total)) - set(tokens.values()))
    places = {label: _places(known[label], rows[label], tokens, padding, total) for label in checkpoints}
    report = {label: _account(known[label], tokens, places[label]) for label in checkpoints}
    alignment = Alignment(source, checkpoints[giver].folder, tokens, total, places, tuple(added), report)
    return {label: _aligned(checkpoints, label, first, alignment) for label in checkpoints}, alignment


def _rows(checkpoint: Checkpoint) -> int:
    embedding, _ = embedding_and_head(checkpoint.tensors)
    if embedding is None:
        raise InputError(
            "no embedding was found to align", where=checkpoint.label, remedy="Leave tokenizer_source out."
        )
    return checkpoint.tensors[embedding].shape[0]


def _vocabulary(
    checkpoints: Mapping[str, Checkpoint], label: str, giver: str, rows: Mapping[str, int]
) -> dict[str, int]:
    for name in (label, giver):
        found = token_ids(checkpoints[name])
        if found is not None and (name == label or rows[label] == rows[giver]):
            return found
    raise InputError(
        "the model has no tokenizer.json, vocab.json or vocab.txt to align its rows by",
        where=checkpoints[label].label,
        remedy="Save its tokenizer beside it: AutoTokenizer.from_pretrained(source).save_pretrained(folder).",
    )


def _places(own: Mapping[str, int], rows: int, tokens: Mapping[str, int], padding: list[int], total: int) -> Tensor:
    """Return for each row of the output the row of one model that means the same, or −1."""
    places = torch.full((total,), -1, dtype=torch.int64)
    for token, row in tokens.items():
        found = own.get(token, -1)
        places[row] = found if found < rows else -1
    used = set(own.values())
    for row in padding:
        if row < rows and row not in used:
            places[row] = row
    return places


def _account(own: Mapping[str, int], tokens: Mapping[str, int], places: Tensor) -> dict[str, Any]:
    moved = [token for token, row in own.items() if token in tokens and tokens[token] != row]
    dropped = [token for token in own if token not in tokens]
    return {
        "tokens": len(own),
        "moved": len(moved),
        "dropped": len(dropped),
        "filled": int((places < 0).sum()),
        "examples": [*moved[:_NAMED], *dropped[:_NAMED]],
    }


def _aligned(checkpoints: Mapping[str, Checkpoint], label: str, first: str, alignment: Alignment) -> Checkpoint:
    """Return a checkpoint whose tensors over the vocabulary have the output's rows."""
    own = checkpoints[label]
    key = xxhash.xxh3_128_hexdigest(json.dumps([alignment.rows, sorted(alignment.tokens.items())]).encode())
    identity = torch.equal(alignment.places[label], torch.arange(_rows(own))) if alignment.rows == _rows(own) else False
    names = set() if identity else _over_the_vocabulary(own)

    def read(name: str) -> Tensor:
        return _gathered(checkpoints, label, first, name, alignment) if name in names else own.read_stored(name)

    infos = [_resized(info, alignment.rows) if name in names else info for name, info in own.tensors.items()]
    config = {**own.config, "vocab_size": alignment.rows} if "vocab_size" in own.config else own.config
    aligned = Checkpoint(
        own.label, read, infos, folder=own.folder, config=config, aliases=own.aliases, remarks=own.remarks
    )
    aligned.vocabulary_key = key
    return aligned


def _over_the_vocabulary(checkpoint: Checkpoint) -> set[str]:
    """Return the tensors with a row for each token: embedding, head, and the head's bias."""
    embedding, head = embedding_and_head(checkpoint.tensors)
    rows = _rows(checkpoint)
    biases = {
        name for name, info in checkpoint.tensors.items() if info.shape == (rows,) and tensor_group(name).kind == "head"
    }
    return biases | {name for name in (embedding, head) if name is not None}


def _resized(info: TensorInfo, rows: int) -> TensorInfo:
    shape = (rows, *info.shape[1:])
    return replace(
        info,
        dtype=torch.float32,
        shape=shape,
        nbytes=4 * math.prod(shape),
        stored_dtype=info.stored_dtype or info.dtype,
    )


def _gathered(checkpoints: Mapping[str, Checkpoint], label: str, first: str, name: str, alignment: Alignment) -> Tensor:
    """Return one model's rows in the order of the output; missing ones from the base, else the mean of the others."""
    own = checkpoints[label].read(name)
    result = torch.zeros((alignment.rows, *own.shape[1:]))
    missing = _fill(result, own, alignment.places[label], torch.arange(alignment.rows))
    if label != first and len(missing):
        missing = _fill(result, checkpoints[first].read(name), alignment.places[first], missing)
    count = torch.zeros(len(missing))
    for other, checkpoint in checkpoints.items() if len(missing) else ():
        places = alignment.places[other][missing]
        has = places >= 0
        if bool(has.any()) and other != first:
            result[missing[has]] += checkpoint.read(name)[places[has]].float()
            count += has
    if len(missing):
        result[missing] /= count.clamp(min=1).reshape(-1, *([1] * (own.dim() - 1)))
    return result


def _fill(result: Tensor, source: Tensor, places: Tensor, wanted: Tensor) -> Tensor:
    """Copy the wanted rows that the source has; return those that it has not."""
    found = places[wanted]
    has = found >= 0
    result[wanted[has]] = source[found[has]].float()
    return wanted[~has]


def _add_tokens(folder: Path, added: Mapping[str, int]) -> None:
    """Enter the union's tokens into tokenizer.json as added tokens: they are matched as whole strings."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            "a union of vocabularies can only be written to a tokenizer.json",
            where=folder,
            remedy="Save the base's tokenizer as a fast one (tokenizer.json), or use tokenizer_source: base.",
        )
    content = json.loads(path.read_text(encoding="utf-8"))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content.setdefault("added_tokens", []).extend({"id": row, "content": t, **plain} for t, row in added.items())
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
