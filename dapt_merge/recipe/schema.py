"""What a recipe is: the models, the method, its parameters, the output's dtype, the seed.

A `Recipe` checks itself completely when it is made, so that the code behind it never meets a bad one: structure and
types here, the models against the method and the parameter values in `parts`. It compiles each parameter to clauses
once, because a search resolves the same recipe for hundreds of tensors in every trial. What this module does not know:
files, tensors, checkpoints.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from dapt_merge.checkpoints.token_sources import (
    ModelEmbedding,
    ModelToken,
    TokenizerSettings,
    TokenSource,
    ZeroEmbedding,
)
from dapt_merge.errors import InputError, nearest
from dapt_merge.methods.contract import Method
from dapt_merge.methods.registry import get_method
from dapt_merge.recipe.parts import (
    Part,
    check_additions,
    check_structure,
    compile_parts,
    sections_of,
)

__all__ = [
    "Average",
    "ModelEmbedding",
    "ModelInput",
    "ModelToken",
    "Module",
    "Recipe",
    "Slice",
    "SliceSource",
    "TokenSource",
    "TokenizerSettings",
    "ZeroEmbedding",
]

DTYPES = ("float32", "bfloat16", "float16", "float64")


# mergekit reads numbers that are written as texts ("8") or with a point (8.0) too.
WholeNumber = Annotated[int, Field(strict=False)]
Number = Annotated[float, Field(strict=False)]

# A key whose lines are all commented out is there and holds nothing.
Parameters = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]


class Average(BaseModel):
    """The mean of a run's checkpoints, taken before the method (arXiv 2505.12082, 2507.17634).

    `window` averages the last so many equally (default: all), `decay` gives each checkpoint that many times the weight
    of the one after it. `checkpoints` lists them in the order of training; without it they are the `checkpoint-STEP`
    folders of the entry's `model`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    checkpoints: list[str] | None = Field(default=None, min_length=1)
    window: int | None = Field(default=None, ge=1)
    decay: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _one_mean(self) -> Average:
        if self.window is not None and self.decay is not None:
            raise InputError(
                "average has both a window and a decay",
                where="average",
                remedy="Give one: a window for a plain mean of the last checkpoints, a decay for an exponential one.",
            )
        return self

    @property
    def words(self) -> str:
        """The mean in a few words, as it stands in references and reports."""
        if self.decay is not None:
            return f"average, decay {self.decay:g}"
        return "average of all" if self.window is None else f"average of the last {self.window}"


class ModelInput(BaseModel):
    """One entry under `models:`: a checkpoint (folder or hub id) and the parameters that are its own.

    With `average` it stands for the mean of the run in the folder `model`, or of a list of checkpoints; `model` is then
    left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str = Field(min_length=1)
    average: Average | None = None
    parameters: Parameters = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _named_by_its_list(cls, value: object) -> object:
        average = value.get("average") if isinstance(value, dict) else None
        listed = average.get("checkpoints") if isinstance(average, dict) else None
        if not isinstance(value, dict) or not isinstance(listed, list) or not all(isinstance(x, str) for x in listed):
            return value
        name = ", ".join(listed)
        if value.get("model", name) != name:
            raise InputError(
                "both 'model' and 'average.checkpoints' are given",
                where="average.checkpoints",
                remedy="Leave 'model' out for a list; or name the run's folder there and leave the list out.",
            )
        return {**value, "model": name}

    @property
    def reference(self) -> str:
        """What plans, reports and fingerprints call this input."""
        return self.model if self.average is None else f"{self.model} ({self.average.words})"


class SliceSource(ModelInput):
    """One entry under a slice's `sources:`: the layers of a checkpoint from the first up to, not with, the second."""

    layer_range: list[WholeNumber] = Field(min_length=2, max_length=2)

    @field_validator("layer_range")
    @classmethod
    def _forward(cls, value: list[int]) -> list[int]:
        if not 0 <= value[0] < value[1]:
            raise ValueError("a layer range is [first, end] with 0 <= first < end; the layer 'end' is not part of it")
        return value


class Slice(BaseModel):
    """Some consecutive layers of the output, and the layers that are merged into them.

    The sources give equally many layers each. `parameters` hold for all sources that have none of their own, and come
    before the recipe's; `base_model` replaces the recipe's for these layers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sources: list[SliceSource] = Field(min_length=1)
    base_model: str | None = Field(default=None, min_length=1)
    # mergekit reads it and uses it nowhere.
    residual_weight: Number | None = None
    parameters: Parameters = Field(default_factory=dict)


Models = Annotated[list[ModelInput], BeforeValidator(lambda value: [] if value is None else value)]


class Module(BaseModel):
    """One module of a model (`encoder`, `text_decoder`, …; `default` where there is one): its models or its slices.

    `parameters` come before the recipe's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    models: Models = Field(default_factory=list)
    slices: list[Slice] | None = Field(default=None, min_length=1)
    parameters: Parameters = Field(default_factory=dict)


class Recipe(BaseModel):
    """A complete, valid description of one merge, in mergekit's dialect.

    It merges whole `models`, or builds a stack of layers from `slices`: the output's layers are those of the first
    slice, then of the second, …, numbered anew. What lies before the layers comes from the first slice's sources and
    what lies behind them from the last one's; a gradient runs over the layers of its slice. Or it says one of the two
    for each of the model's `modules`, all of which must be there.

    Raises:
        InputError: when made with an unknown method or parameter, a value out of range, a required parameter or base
            missing, a model listed twice, too few or too many models, slices whose sources differ in length.
        pydantic.ValidationError: unknown keys or wrong types; `load_recipe` turns these into InputErrors too.

    Example:
        >>> recipe = Recipe(
        ...     merge_method="slerp", base_model="base", models=[ModelInput(model="dapt")], parameters={"t": 0.5}
        ... )
        >>> recipe.task_models()
        ('dapt',)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    merge_method: str
    base_model: str | None = Field(default=None, min_length=1)
    models: Models = Field(default_factory=list)
    slices: list[Slice] | None = Field(default=None, min_length=1)
    modules: dict[str, Module] | None = Field(default=None, min_length=1)
    parameters: Parameters = Field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    # What lm_head and the final norm get of a gradient: None and "last" its last value, "mergekit" its first.
    gradient_outer: Literal["last", "mergekit"] | None = None
    # Whose vocabulary the output has: "base", "union" or a model. None: all must have the same one.
    tokenizer_source: str | None = Field(default=None, min_length=1)
    # The same in mergekit's longer form, with the rows of single tokens; one of the two.
    tokenizer: TokenizerSettings | None = None
    # Of the output's tokenizer: "auto" (what most models have), a built-in's name, or the template. None: as it is.
    chat_template: str | None = Field(default=None, min_length=1)
    # Our own from here on; mergekit knows none of them.
    # What the merged difference from the base is added to (an instruct model, say); None: the base itself.
    target: str | None = Field(default=None, min_length=1)
    # Tensors that stay the base's (the target's, where there is one): groups, or parts of names with * for anything.
    freeze: list[str] = Field(default_factory=list)
    rounding: Literal["nearest", "stochastic"] = "nearest"
    allow_config_mismatch: bool = False

    @field_validator("dtype", "out_dtype")
    @classmethod
    def _known_dtype(cls, value: str | None) -> str | None:
        name = None if value is None else value.removeprefix("torch.")
        if name == "int64":  # mergekit takes it, and writes a model of zeros
            raise ValueError(f"weights in int64 are rounded to whole numbers. Choose one of {', '.join(DTYPES)}")
        if name is not None and name not in DTYPES:
            raise ValueError(f"'{value}' is not a dtype known here.{nearest(name, DTYPES)} Known: {', '.join(DTYPES)}")
        return name

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        check_structure(self)
        check_additions(self)
        _ = self.parts
        return self

    @property
    def method(self) -> Method:
        """The declared method of this recipe."""
        try:
            return get_method(self.merge_method)
        except InputError as error:
            raise InputError(error.what, where="merge_method", remedy=error.remedy) from None

    @property
    def vocabulary(self) -> TokenizerSettings | None:
        """What the output's vocabulary is to be, whichever key says so; None: that of all inputs, which must agree."""
        if self.tokenizer_source is not None:
            return TokenizerSettings(source=self.tokenizer_source)
        return self.tokenizer

    @property
    def output_dtype(self) -> str | None:
        """The dtype that the merged tensors are rounded to, once; None keeps the stored dtype of the inputs."""
        return self.out_dtype or self.dtype

    @property
    def input_dtype(self) -> str | None:
        """The narrower dtype that inputs are rounded to first; only where `dtype` and `out_dtype` are both given.

        `dtype` alone is the output's dtype: the inputs keep all their digits, since rounding them would lose updates
        that only the output may lose.
        """
        narrow = self.dtype in ("bfloat16", "float16")
        return self.dtype if narrow and self.out_dtype not in (None, self.dtype) else None

    @property
    def arithmetic(self) -> str | None:
        """The dtype that the recipe asks to compute in; None leaves it to what inputs and outputs hold.

        float64 wherever the recipe names it. float32 where that is `dtype` beside another `out_dtype`, of wider inputs
        too; of others it is the default.
        """
        if "float64" in (self.dtype, self.out_dtype) and self.dtype != "float32":
            return "float64"
        return "float32" if self.dtype == "float32" and self.out_dtype not in (None, "float32") else None

    @property
    def stacks_layers(self) -> bool:
        """Whether the output's layers are put together from slices, in any of its modules."""
        return any(section.slices is not None for section in sections_of(self))

    def merge_base(self) -> str | None:
        """Return the reference whose tensors the method gets as θ₀, or None when it gets no base.

        Not always `base_model`: see `parts.averages_the_base`. The configuration and the tokenizer of the output
        come from `base_model` in any case. With slices or modules: the first one's.
        """
        base = self.parts[0].base
        return None if base is None else base.model

    def task_models(self) -> tuple[str, ...]:
        """Return the references of the models that the method gets as θ₁…θₙ (with slices: in the first slice)."""
        return tuple(source.model for source in self.parts[0].models)

    def references(self) -> tuple[str, ...]:
        """Return every checkpoint that the merge reads, once each, `base_model` first."""
        named = [name for name in (self.base_model, self.target) if name is not None]
        named += [entry.reference for entry in self.entries()]
        once = {os.path.normpath(name): name for name in reversed(named)}
        return tuple(once[path] for path in dict.fromkeys(os.path.normpath(name) for name in named))

    def entries(self) -> tuple[ModelInput, ...]:
        """Return the entries of `models`, or of all slices' `sources`, of all modules."""
        sections = sections_of(self)
        models = [entry for section in sections for entry in section.models]
        return (*models, *(source for section in sections for s in section.slices or () for source in s.sources))

    def config_reference(self) -> str:
        """Return the checkpoint whose configuration and tokenizer the output carries."""
        return self.target or self.references()[0]

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What is merged with what, and with which settings: one part, or with slices one for each."""
        return compile_parts(self)

    def to_yaml(self) -> str:
        """Return the recipe as YAML that `load_recipe` (and, without our own keys, mergekit) reads back."""
        content = self.model_dump(exclude_none=True, exclude_defaults=True)
        return yaml.dump(content, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True)


class _RecipeDumper(yaml.SafeDumper):
    """Writes gradients on one line, and no anchors for values that happen to be shared."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: _RecipeDumper, data: list[Any]) -> yaml.Node:
    plain = all(isinstance(entry, int | float | str) for entry in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=plain)


_RecipeDumper.add_representer(list, _represent_list)
