"""What a corpus is: its sources, what is done to their documents, and in which shares of tokens they are read.

Every step is declared: a section that is not there is a step that is not run. `clean: {}`, `deduplicate: {}` run a step
with the defaults below; a single filter is switched off with `false`. What the values do is told by the modules of the
steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dapt_merge.errors import InputError
from dapt_merge.yaml_files import configured, explained, located

Role = Literal["domain", "replay"]
ROLES: tuple[Role, Role] = ("domain", "replay")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _switch(value: Any) -> Any:
    """Read `true` as a section with its defaults, and `false` as none."""
    return {} if value is True else None if value is False else value


class CorpusSource(_Section):
    """One part of a corpus.

    Args:
        path: a file (`.jsonl`, `.ndjson`, `.parquet`, `.txt`, `.md`, the text ones also with `.gz`), a folder of such
            files, read to any depth, or a folder written by `datasets`' `save_to_disk`.
        hub: a data set of the Hugging Face hub instead, `owner/name`.
        subset: the hub data set's configuration.
        split: which split of a data set of `datasets` or the hub.
        name: what reports call it (default: the file's, folder's or data set's name).
        role: `domain` is what the model is to learn, `replay` what it is not to forget.
        text_field: the field of a record that holds the text.
        document: what one document of a plain-text file is: the file, a paragraph (between blank lines) or a line.
        licence: of the texts, for the manifest.
        language: of the texts (ISO 639-1), for the manifest and for the language filter.
        weight: how often the source is read for each time that a source of weight 1 of the same role is.
        share: instead of the weight: the share of its role's tokens that comes from this source.

    Example:
        >>> CorpusSource(path="notes/2024.jsonl").title
        '2024'
    """

    path: Path | None = None
    hub: str | None = Field(default=None, min_length=1)
    subset: str | None = None
    split: str = "train"
    name: str | None = Field(default=None, min_length=1)
    role: Role = "domain"
    text_field: str = Field(default="text", min_length=1)
    document: Literal["file", "paragraph", "line"] = "file"
    licence: str | None = None
    language: str | None = Field(default=None, pattern=r"^[a-z]{2,3}$")
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    share: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _one_place(self) -> CorpusSource:
        if (self.path is None) == (self.hub is None):
            raise ValueError("a source is either a 'path' or a 'hub' data set")
        if self.weight == 0:
            raise ValueError("a source of weight 0 is never read: take it out, or give it a weight above 0")
        if self.share is not None and self.weight != 1.0:
            raise ValueError("'share' decides how much of the source is read, so its 'weight' has no effect")
        return self

    @property
    def title(self) -> str:
        """What reports call the source."""
        if self.name:
            return self.name
        if self.path is None:
            return f"{self.hub}/{self.subset}" if self.subset else str(self.hub)
        # A file's name without any of its suffixes: notes.jsonl.gz is notes.
        return self.path.name.split(".")[0] or str(self.path) if self.path.suffix else self.path.name or str(self.path)

    @property
    def place(self) -> str:
        """Where the source is, for messages."""
        return str(self.path) if self.path is not None else f"hub data set {self.hub}"


class Boilerplate(_Section):
    """A line that stands in at least `documents` documents is not text of any of them (footers, notices, menus)."""

    documents: int = Field(default=20, ge=2)
    minimum_characters: int = Field(default=15, ge=1)


class LanguageFilter(_Section):
    """A document is left out when another language than its source's is told with this probability.

    Documents of fewer than `minimum_characters` are kept: too short to tell.
    """

    minimum_probability: float = Field(default=0.9, ge=0, le=1)
    minimum_characters: int = Field(default=200, ge=1)


class Quality(_Section):
    """Bounds of what a document may look like. A bound of null is not applied.

    Args:
        minimum_characters: shorter documents are left out.
        maximum_characters: longer ones are.
        maximum_symbol_share: the share of the characters other than spaces that are neither letters nor digits.
        maximum_repetition_share: the share of the word trigrams that have occurred in the document before; applied
            from 50 words on.
    """

    minimum_characters: int | None = Field(default=50, ge=1)
    maximum_characters: int | None = Field(default=None, ge=1)
    maximum_symbol_share: float | None = Field(default=0.4, ge=0, le=1)
    maximum_repetition_share: float | None = Field(default=0.5, ge=0, le=1)


class Clean(_Section):
    """What is repaired in documents, and which are left out."""

    unicode: bool = True
    whitespace: bool = True
    boilerplate: Annotated[Boilerplate | None, BeforeValidator(_switch)] = Boilerplate()
    language: Annotated[LanguageFilter | None, BeforeValidator(_switch)] = LanguageFilter()
    quality: Annotated[Quality | None, BeforeValidator(_switch)] = Quality()


class NearDuplicates(_Section):
    """A document is left out when a kept one before it has at least this Jaccard similarity of word n-grams."""

    threshold: float = Field(default=0.8, gt=0, le=1)
    ngram: int = Field(default=5, ge=1)
    permutations: int = Field(default=128, ge=8, le=1024)


class Deduplicate(_Section):
    """Which repetitions are left out; the first copy, in the order of the sources, is kept."""

    exact: bool = True
    near: Annotated[NearDuplicates | None, BeforeValidator(_switch)] = NearDuplicates()


class Decontaminate(_Section):
    """Documents that hold text of an item of these suites are left out, or only reported.

    Args:
        suites: suite files.
        ngram: how many words in a row must be equal.
        minimum_share: how much of an item a document must hold: the share of the item's runs of `ngram` words. At 0
            a single run is enough.
        action: what becomes of such documents.
    """

    suites: tuple[Path, ...] = Field(min_length=1)
    ngram: int = Field(default=13, ge=3)
    minimum_share: float = Field(default=0.0, ge=0, le=1)
    action: Literal["remove", "report"] = "remove"

    @model_validator(mode="before")
    @classmethod
    def _suites_alone(cls, value: Any) -> Any:
        value = {"suites": [value]} if isinstance(value, str | Path) else value
        return {"suites": value} if isinstance(value, list | tuple) else value


class CorpusDocuments(_Section):
    """Which documents a corpus holds: sources, and what is done to them before they become tokens.

    A list alone is a list of sources whose documents are taken as they are. `first_documents` reads no more than so
    many documents of each source, for a trial.
    """

    sources: tuple[CorpusSource, ...] = Field(min_length=1)
    clean: Annotated[Clean | None, BeforeValidator(_switch)] = None
    deduplicate: Annotated[Deduplicate | None, BeforeValidator(_switch)] = None
    decontaminate: Decontaminate | None = None
    first_documents: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _sources_alone(cls, value: Any) -> Any:
        return {"sources": value} if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _usable_sources(self) -> CorpusDocuments:
        repeated = [title for title, count in Counter(s.title for s in self.sources).items() if count > 1]
        if repeated:
            places = " and ".join(s.place for s in self.sources if s.title == repeated[0])
            raise ValueError(f"two sources are called '{repeated[0]}' ({places}); give one of them another 'name'")
        for role in ROLES:
            sources = self.of_role(role)
            total = sum(source.share or 0 for source in sources)
            given = sum(source.share is not None for source in sources)
            if total > 1 + 1e-9 or (given and given == len(sources) and abs(total - 1) > 1e-9):
                raise ValueError(f"the shares of the {role} sources add up to {total:g}, expected 1")
            if role == "replay" and len(sources) == 1 and sources[0].weight != 1.0:
                raise ValueError("the 'weight' of the only replay source has no effect; set 'replay_share'")
            if given < len(sources) and total > 1 - 1e-9:
                raise ValueError(f"the shares of the {role} sources leave nothing for those without one")
        return self

    def of_role(self, role: Role) -> tuple[CorpusSource, ...]:
        """Return the sources of one role."""
        return tuple(source for source in self.sources if source.role == role)


class CorpusConfig(CorpusDocuments):
    """A corpus from its sources to packed rows of tokens.

    Args:
        tokenizer: a folder or hub id with a tokenizer, for the command line (a run has its own).
        replay_share: the share of all tokens that comes from the sources with the role `replay`.
        sequence_length: tokens in a row.
        attention: `document` keeps attention within a document, `block` lets it look at all of a row.
        tokens: the budget, of domain and replay together; rounded up to whole rows (of a run: whole steps).
        epochs: or the passes over the domain sources, to which replay comes on top.
        seed: of the order of the documents.
        output: the folder to build.
        cache_folder: where cleaned documents and tokens are kept for the next build.
        processes: how many clean and tokenise at once (default: one for each usable core).

    Example:
        >>> CorpusConfig(sources=["notes.jsonl"], tokenizer="base", epochs=2).clean is None
        True
    """

    tokenizer: str | None = None
    replay_share: float = Field(default=0.0, ge=0, lt=1)
    sequence_length: int = Field(default=2048, ge=8)
    attention: Literal["document", "block"] = "document"
    tokens: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**32)
    output: Path | None = None
    cache_folder: Path | None = None
    processes: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _nothing_inert(self) -> CorpusConfig:
        if self.tokens is not None and self.epochs is not None:
            raise ValueError("give the budget once: either 'tokens' or 'epochs'")
        refuse_inert_roles({source.role for source in self.sources}, self.replay_share)
        return self

    @property
    def documents(self) -> CorpusDocuments:
        """The part that decides the documents, whatever becomes of them."""
        return CorpusDocuments(**{name: getattr(self, name) for name in CorpusDocuments.model_fields})


def refuse_inert_roles(roles: set[Role], replay_share: float) -> None:
    """Raise ValueError when sources and the share of replay contradict each other."""
    if "domain" not in roles:
        raise ValueError("the corpus has no source with the role 'domain'")
    if "replay" in roles and replay_share == 0:
        raise ValueError("there are replay sources, but 'replay_share' is 0, so they would never be read")
    if "replay" not in roles and replay_share > 0:
        raise ValueError("'replay_share' is above 0, but no source has the role 'replay'")


def load_corpus_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> CorpusConfig:
    """Read a corpus from a YAML file, or from a mapping of the same shape, and check all of it.

    Relative paths of inputs are relative to the current folder; one that does not exist there, but does beside the
    YAML file, is taken from there.

    Args:
        source: the path of a YAML file, or a mapping.
        overrides: `key=value` each, the value in YAML; a dotted key reaches inside (`sources.0.path=notes.jsonl`).

    Raises:
        InputError: the file is missing or not YAML; a key is unknown; a value has the wrong type, is out of range or
            contradicts another one. It names the file and the key.
    """
    remedy = "Start from recipes/corpus-french-biomedical.yaml."
    content, origin = configured(source, overrides, noun="corpus", remedy=remedy, locate=locate_inputs)
    try:
        return CorpusConfig.model_validate(content)
    except ValidationError as error:
        raise explained(error, origin, lambda location: corpus_fields_at(location, CorpusConfig)) from None


def corpus_fields_at(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """Return the known keys of the section of a corpus at a location, such as `("clean", "quality")`."""
    sections: dict[str, type[BaseModel]] = {
        "sources": CorpusSource,
        "clean": Clean,
        "boilerplate": Boilerplate,
        "language": LanguageFilter,
        "quality": Quality,
        "deduplicate": Deduplicate,
        "near": NearDuplicates,
        "decontaminate": Decontaminate,
    }
    named = [sections[part] for part in location if isinstance(part, str) and part in sections]
    return list((named[-1] if named else root).model_fields)


def locate_inputs(content: dict[str, Any], folder: Path) -> None:
    """Point the inputs of a corpus that lie beside its YAML file, and not in the current folder, to there."""

    def found(reference: Any) -> Any:
        return located(reference, folder) if isinstance(reference, str) else reference

    if "tokenizer" in content:
        content["tokenizer"] = found(content["tokenizer"])
    sources = content.get("sources")
    if isinstance(sources, list):
        for index, source in enumerate(sources):
            if isinstance(source, dict) and "path" in source:
                source["path"] = found(source["path"])
            else:
                sources[index] = found(source)
    against = content.get("decontaminate")
    if isinstance(against, dict) and isinstance(against.get("suites"), list):
        against["suites"] = [found(suite) for suite in against["suites"]]
    elif isinstance(against, list):
        content["decontaminate"] = [found(suite) for suite in against]


def required_output(config: CorpusConfig) -> Path:
    """Return the folder to build.

    Raises:
        InputError: there is none.
    """
    if config.output is None:
        raise InputError("no output folder was given", where="output", remedy="Pass -o FOLDER, or set 'output'.")
    return config.output.expanduser()
