"""Which row of which model stands for which token, when models with different vocabularies are brought to one.

The idea: fix the tokens of the output (the base's, another model's, or the union), and say for each of its rows where
the row lies in each model. A row that a model lacks is the base's, or where the base lacks it too the mean of those
that have it: then a model without a token moves nothing there, and a token of one model alone comes through unchanged.
Rows without a token (padding) are kept. A recipe may settle single tokens (`token_sources`). The rules for tokens are
mergekit's; that padding is kept is ours. This module reads vocabularies and no weights: `gathering` does that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from dapt_merge.checkpoints.checkpoint import Checkpoint
from dapt_merge.checkpoints.token_sources import ModelEmbedding, ModelToken, TokenizerSettings, TokenSource
from dapt_merge.checkpoints.vocabulary import compare_ids, embedding_rows, token_ids
from dapt_merge.errors import InputError, nearest
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

# What a row gets in a model that has none of its own, where it is not the row of one certain model.
ZERO, MEAN, MEAN_OF_OWN = -1, -2, -3


@dataclass(frozen=True)
class Alignment:
    """The vocabulary of the output, and where each model has its rows.

    Attributes:
        source: "base", "union", or the reference of the model whose tokenizer the output carries.
        folder: where that tokenizer lies; None for a model in memory.
        tokens: token → row in the output.
        rows: how many rows the output's embedding has, padding included.
        places: reference → for each row of the output the model's own row, or −1 where it gets another.
        donors: for each row, what a model without its own gets: the position of another model in `places`, `ZERO`,
            `MEAN` (of the models that have it) or `MEAN_OF_OWN` (of all the model's other rows: new padding).
        donor_rows: the row of that other model.
        added: tokens that the output's tokenizer does not have yet, in the order of their ids.
        moved_ids: reference → own id → id in the output (None: dropped), for the ids that change.
        report: reference → how its tokens fared: counts, and examples as token → [own id, id in the output].
        notes: sentences for the report beside the counts.
    """

    source: str
    folder: Path | None
    tokens: Mapping[str, int]
    rows: int
    places: Mapping[str, Tensor]
    donors: Tensor
    donor_rows: Tensor
    added: tuple[str, ...]
    moved_ids: Mapping[str, Mapping[int, int | None]]
    report: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]

    def fingerprint(self) -> str:
        """Return one name for the output's tokens and for where every row of it comes from."""
        total = xxhash.xxh3_128(json.dumps([self.rows, sorted(self.tokens.items())]).encode())
        for part in (*self.places.values(), self.donors, self.donor_rows):
            total.update(part.numpy().data)
        return f"xxh3:{total.hexdigest()}"

    def to_dict(self) -> dict[str, Any]:
        """Return the account of the output's vocabulary as JSON-ready data."""
        return {
            "source": self.source,
            "tokens": len(self.tokens),
            "rows": self.rows,
            "added": len(self.added),
            "fingerprint": self.fingerprint(),
        }

    def sentences(self) -> list[str]:
        """Say for the report which models were changed, and how."""
        lines = [
            f"{label}: of {found['tokens']} tokens {found['moved']} changed their id, {found['dropped']} are dropped,"
            f" {found['filled']} rows come from other models"
            for label, found in self.report.items()
            if found["moved"] or found["dropped"] or found["filled"]
        ]
        return [f"tokenizer_source {self.source}: {line}" for line in (*lines, *self.notes)]


def align(
    checkpoints: Mapping[str, Checkpoint], settings: TokenizerSettings, outside: Checkpoint | None = None
) -> Alignment:
    """Settle the output's vocabulary, and where each of its rows comes from.

    Args:
        checkpoints: reference → checkpoint, the base first.
        settings: whose tokens the output has; every model that it names is among the references.
        outside: the model that `settings.source` names, where it is none of the checkpoints: only its tokenizer counts.

    Raises:
        InputError: a model's vocabulary cannot be read, or the settings name a model or a token that is not there.
    """
    giver = _giver(checkpoints, settings, outside)
    rows = {label: _rows(checkpoint) for label, checkpoint in checkpoints.items()}
    known, notes = _vocabularies(checkpoints, giver, rows)
    given = known[giver] if outside is None else _tokens_of(outside)
    tokens, added = _output_tokens(known, given, settings)
    total = max(rows[giver] if outside is None else 0, max(tokens.values(), default=-1) + 1)
    total += -total % (settings.pad_to_multiple_of or 1)
    places = {label: _places(known[label], rows[label], tokens, total) for label in checkpoints}
    donors, donor_rows = _donors(places, tokens, total)
    for token, entry in settings.tokens.items():
        row = tokens[token]
        if not entry.force and all(int(own[row]) >= 0 for own in places.values()):
            notes.append(f"tokenizer.tokens.{token} changes nothing: every model has the token; 'force: true' would")
        donors[row], donor_rows[row] = _donor(token, entry, known, rows)
        for own in places.values() if entry.force else ():
            own[row] = -1
    nowhere = sorted(token for token, row in tokens.items() if donors[row] == ZERO and token not in settings.tokens)
    if nowhere:
        notes.append(f"{len(nowhere)} tokens have no row in any model and get zeros, the first is {nowhere[0]!r}")
    return Alignment(
        source=settings.source,
        folder=(outside or checkpoints[giver]).folder,
        tokens=tokens,
        rows=total,
        places=places,
        donors=donors,
        donor_rows=donor_rows,
        added=tuple(added),
        moved_ids={label: _moved_ids(known[label], tokens) for label in checkpoints},
        report={label: _account(known[label], rows[label], tokens, places[label]) for label in checkpoints},
        notes=tuple(notes),
    )


def _giver(checkpoints: Mapping[str, Checkpoint], settings: TokenizerSettings, outside: Checkpoint | None) -> str:
    """Return the model whose tokenizer the output starts from, and that the others are taken to have if they lack one:
    the first, where it is from outside.
    """
    for name in settings.models():
        if name not in checkpoints and not (outside is not None and name == settings.source):
            key = "tokenizer_source" if name == settings.source else "tokenizer.tokens"
            raise InputError(
                f"'{name}' is none of the models.{nearest(name, tuple(checkpoints))}",
                where=key,
                remedy=f"Give {'base, union, or ' * (name == settings.source)}one of: {', '.join(checkpoints)}.",
            )
    return next(iter(checkpoints)) if settings.source not in checkpoints else settings.source


def _tokens_of(outside: Checkpoint) -> dict[str, int]:
    found = token_ids(outside)
    if found is None:
        raise InputError(
            "there is no tokenizer", where=outside.label, remedy="Name a model with a tokenizer as tokenizer_source."
        )
    return found


def _rows(checkpoint: Checkpoint) -> int:
    rows = embedding_rows(checkpoint)
    if rows is None:
        raise InputError(
            "no embedding was found to align", where=checkpoint.label, remedy="Leave tokenizer_source out."
        )
    return rows


def _vocabularies(
    checkpoints: Mapping[str, Checkpoint], giver: str, rows: Mapping[str, int]
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Return reference → token → id; one without a tokenizer has the giver's if it has as many rows, and is named."""
    known, notes = {}, []
    for label, checkpoint in checkpoints.items():
        found = token_ids(checkpoint)
        if found is None and rows[label] == rows[giver]:
            found = token_ids(checkpoints[giver])
            notes.append(f"{label} has no tokenizer beside it and is taken to have that of {giver}")
        if found is None:
            raise InputError(
                "the model has no tokenizer to align its rows by (no tokenizer.json, vocab.json, vocab.txt or"
                " tokenizer.model)",
                where=checkpoint.label,
                remedy="Save its tokenizer beside it: AutoTokenizer.from_pretrained(source).save_pretrained(folder).",
            )
        known[label] = found
    return known, notes


def _output_tokens(
    known: Mapping[str, Mapping[str, int]], given: Mapping[str, int], settings: TokenizerSettings
) -> tuple[dict[str, int], list[str]]:
    """Return token → row of the output, and the tokens among them that the tokenizer it starts from lacks."""
    tokens = dict(given)
    new: dict[str, None] = {}
    if settings.source == "union":
        for ids in known.values():
            new |= dict.fromkeys(token for token in sorted(ids, key=lambda t: ids[t]) if token not in tokens)
    new |= dict.fromkeys(token for token in settings.tokens if token not in tokens)
    start = max(tokens.values(), default=-1) + 1
    return tokens | {token: start + number for number, token in enumerate(new)}, list(new)


def _places(own: Mapping[str, int], rows: int, tokens: Mapping[str, int], total: int) -> Tensor:
    """Return for each row of the output the row of one model that means the same, or −1."""
    places = torch.full((total,), -1, dtype=torch.int64)
    for token, row in tokens.items():
        found = own.get(token, -1)
        places[row] = found if found < rows else -1
    used = set(own.values())
    padding = sorted(set(range(min(total, rows))) - set(tokens.values()) - used)
    places[padding] = torch.tensor(padding, dtype=torch.int64)
    return places


def _donors(places: Mapping[str, Tensor], tokens: Mapping[str, int], total: int) -> tuple[Tensor, Tensor]:
    """Return what a model without a row of its own gets: the base's, the only one's, or the mean of those there are."""
    table = torch.stack(list(places.values()))
    has = table >= 0
    count = has.sum(dim=0)
    # The first model that has the row: the base where it has it, else the only one; several others are averaged.
    donors = has.to(torch.int8).argmax(dim=0)
    donor_rows = table.gather(0, donors[None])[0]
    donors[(count > 1) & ~has[0]] = MEAN
    donors[count == 0] = ZERO
    padding = torch.ones(total, dtype=torch.bool)
    padding[list(tokens.values())] = False
    donors[padding & (count == 0)] = MEAN_OF_OWN
    return donors, donor_rows


def _donor(
    token: str, entry: TokenSource, known: Mapping[str, Mapping[str, int]], rows: Mapping[str, int]
) -> tuple[int, int]:
    """Return the donor and its row that the recipe settles for one token."""
    if not isinstance(entry, ModelEmbedding | ModelToken):
        return ZERO, -1
    model = entry.source if isinstance(entry, ModelEmbedding) else entry.model
    wanted = token if isinstance(entry, ModelEmbedding) else entry.token
    row = known[model].get(wanted) if wanted is not None else getattr(entry, "token_id", None)
    if row is None or row >= rows[model]:
        what = f"no token {wanted!r}" if wanted is not None else f"no row {row}: it has {rows[model]}"
        hint = "" if wanted is None else nearest(wanted, tuple(known[model]))
        raise InputError(
            f"{model} has {what}.{hint}",
            where=f"tokenizer.tokens.{token}",
            remedy="Name a token that the model has, another model, or {kind: zero}.",
        )
    return list(known).index(model), int(row)


def _moved_ids(own: Mapping[str, int], tokens: Mapping[str, int]) -> dict[int, int | None]:
    return {row: tokens.get(token) for token, row in own.items() if tokens.get(token) != row}


def _account(own: Mapping[str, int], rows: int, tokens: Mapping[str, int], places: Tensor) -> dict[str, Any]:
    found = compare_ids(own, tokens)
    of_tokens = places[list(tokens.values())]
    moved: dict[str, list[int | None]] = {token: list(ids) for token, ids in found.moved_examples.items()}
    dropped: dict[str, list[int | None]] = {token: [row, None] for token, row in found.base_examples.items()}
    return {
        "tokens": len(own),
        "rows": rows,
        "same": found.same,
        "moved": found.moved,
        "dropped": found.only_in_base,
        "filled": int((of_tokens < 0).sum()),
        "examples": moved | dropped,
    }
