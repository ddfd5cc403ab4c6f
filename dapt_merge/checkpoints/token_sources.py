"""What a recipe may say about the vocabulary of the output: whose tokens, and where single tokens take their rows from.

    tokenizer:
      source: union                                  base | union | MODEL
      tokens:
        <|im_end|>: {source: chat-model}             the row of that model, in the models that lack the token
        <|pad|>: {source: {kind: zero}}              zeros
        <|user|>:                                    the row of another token of a model
          source: {kind: model_token, model: base, token: user}
          force: true                                in the models that have the token too
      pad_to_multiple_of: 64                         rows in all

The idea: mergekit's form, read into one small class a kind. How rows are gathered this module does not know
(`alignment` does that).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_serializer, field_validator

from dapt_merge.errors import InputError, nearest

_KINDS = ("zero", "model_token")


class ModelEmbedding(BaseModel):
    """The row that the token itself has in the model `source`.

    `force` uses it in every model; without it only models that lack the token get it. The same holds for the other
    kinds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str = Field(min_length=1)
    force: bool = False


class ZeroEmbedding(BaseModel):
    """A row of zeros."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    force: bool = False


class ModelToken(BaseModel):
    """The row that another token, named by its text or by its id, has in `model`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str = Field(min_length=1)
    token: str | None = None
    token_id: int | None = Field(default=None, ge=0)
    force: bool = False


TokenSource = ModelEmbedding | ZeroEmbedding | ModelToken


class TokenizerSettings(BaseModel):
    """The output's vocabulary, as mergekit's `tokenizer:` block describes it.

    Attributes:
        source: "base", "union", or the model whose tokenizer the output carries.
        tokens: token → where its row comes from; a token that the source lacks is added to it.
        pad_to_multiple_of: the number of rows is rounded up to a multiple of this.

    Raises:
        InputError: an entry of `tokens` is of no known form.

    Example:
        >>> settings = TokenizerSettings(tokens={"<pad>": {"source": {"kind": "zero"}}})
        >>> settings.tokens["<pad>"], settings.model_dump()["tokens"]
        (ZeroEmbedding(force=False), {'<pad>': {'source': {'kind': 'zero'}}})
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str = Field(default="union", min_length=1)
    tokens: dict[str, TokenSource] = Field(default_factory=dict)
    pad_to_multiple_of: Annotated[int, Field(strict=False, ge=1)] | None = None

    @field_validator("tokens", mode="before")
    @classmethod
    def _read_tokens(cls, value: object) -> object:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            return value  # refused with its type
        return {token: _read_entry(entry, f"tokenizer.tokens.{token}") for token, entry in value.items()}

    @field_serializer("tokens")
    def _as_written(self, tokens: dict[str, TokenSource]) -> dict[str, Any]:
        return {token: _written(entry) for token, entry in tokens.items()}

    def models(self) -> tuple[str, ...]:
        """Return every model that the block names, once each."""
        named = [self.source] if self.source not in ("base", "union") else []
        for entry in self.tokens.values():
            named += [getattr(entry, "source", None) or getattr(entry, "model", None) or ""]
        return tuple(dict.fromkeys(name for name in named if name))

    def with_models(self, renamed: Callable[[str], str]) -> TokenizerSettings:
        """Return the settings with every model's name replaced by what `renamed` makes of it."""
        tokens: dict[str, TokenSource] = {}
        for token, entry in self.tokens.items():
            key = {ModelEmbedding: "source", ModelToken: "model"}.get(type(entry))
            tokens[token] = entry if key is None else entry.model_copy(update={key: renamed(getattr(entry, key))})
        source = self.source if self.source in ("base", "union") else renamed(self.source)
        return self.model_copy(update={"source": source, "tokens": tokens})


def _read_entry(raw: object, where: str) -> TokenSource:
    """Read one entry of `tokens`."""
    if isinstance(raw, TokenSource):
        return raw
    entry = _mapping(raw, where, ("source", "force"), "Write '{source: MODEL}', with 'force: true' if you like.")
    force, source = _flag(entry.get("force", False), f"{where}.force"), entry.get("source")
    if isinstance(source, str) and source:
        return ModelEmbedding(source=source, force=force)
    if source is None:
        raise InputError(
            "this token has no 'source'", where=where, remedy="Add 'source: MODEL', or 'source: {kind: zero}'."
        )
    where = f"{where}.source"
    fields = _mapping(
        source, where, ("kind", "model", "token", "token_id"), "Write MODEL, {kind: zero} or {kind: model_token, …}."
    )
    kind = fields.get("kind")
    if kind not in _KINDS:
        found = "there is no 'kind'" if kind is None else f"there is no kind {kind!r}"
        raise InputError(
            f"{found}.{nearest(str(kind), list(_KINDS))}", where=f"{where}.kind", remedy="Give zero or model_token."
        )
    if kind == "zero":
        if len(fields) > 1:
            raise InputError("a row of zeros has no other keys than 'kind'", where=where, remedy="Remove them.")
        return ZeroEmbedding(force=force)
    return _model_token(fields, where, force)


def _model_token(fields: Mapping[str, Any], where: str, force: bool) -> ModelToken:
    model, token, token_id = fields.get("model"), fields.get("token"), fields.get("token_id")
    if not isinstance(model, str) or not model:
        raise InputError("there is no 'model' to take the row from", where=where, remedy="Add 'model: MODEL'.")
    if (token is None) == (token_id is None):
        found = "neither 'token' nor 'token_id'" if token is None else "both 'token' and 'token_id'"
        raise InputError(f"{found} is given", where=where, remedy="Name the other token by one of the two.")
    if token is not None and not isinstance(token, str):
        raise InputError(f"token is {token!r}, expected a text", where=f"{where}.token", remedy="Quote it.")
    if token_id is not None:
        token_id = _row(token_id, f"{where}.token_id")
    return ModelToken(model=model, token=token, token_id=token_id, force=force)


def _flag(value: object, where: str) -> bool:
    """Return a flag, in quotes or not, as mergekit reads it."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        raise InputError(f"force is {value!r}, expected true or false", where=where, remedy="Correct it.") from None


def _row(value: object, where: str) -> int:
    """Return a token's id, written as a number or as a text, as mergekit reads it."""
    try:
        return TypeAdapter(Annotated[int, Field(ge=0)]).validate_python(None if isinstance(value, bool) else value)
    except ValidationError:
        what = f"token_id is {value!r}, expected a whole number from 0"
        raise InputError(what, where=where, remedy="Correct it.") from None


def _mapping(raw: object, where: str, known: tuple[str, ...], remedy: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise InputError(f"expected a mapping, found {raw!r:.80}", where=where, remedy=remedy)
    for key in raw:
        if key not in known:
            raise InputError(
                f"unknown key '{key}'.{nearest(str(key), known)}",
                where=f"{where}.{key}",
                remedy=f"Known keys here: {', '.join(known)}.",
            )
    return raw


def _written(entry: TokenSource) -> dict[str, Any]:
    force = {"force": True} if entry.force else {}
    if isinstance(entry, ModelEmbedding):
        return {"source": entry.source, **force}
    if isinstance(entry, ZeroEmbedding):
        return {"source": {"kind": "zero"}, **force}
    named = {"token": entry.token} if entry.token_id is None else {"token_id": entry.token_id}
    return {"source": {"kind": "model_token", "model": entry.model, **named}, **force}
