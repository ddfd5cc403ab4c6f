"""What a recipe is: the models, the method, its parameters, the output's dtype, the seed.

A `Recipe` checks itself completely when it is made, so that the code behind it never meets a bad one: structure and
types here, parameter values through `settings`. It compiles each parameter to clauses once, because a search resolves
the same recipe for hundreds of tensors in every trial. What this module does not know: files, tensors, checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dapt_merge.errors import InputError, nearest
from dapt_merge.methods.contract import Method, Parameter
from dapt_merge.methods.registry import get_method
from dapt_merge.recipe.settings import Clause, read_setting, truncate

DTYPES = ("float32", "bfloat16", "float16")
# mergekit's memory switch for a sign mask: it cannot change the result, so it is taken and reported.
INERT_PARAMETERS = ("int8_mask",)
# Valid mergekit keys that this version cannot honour: each with what to do instead.
UNSUPPORTED_KEYS = {
    "slices": "List whole models under 'models:'; put what differs by layer into gradients or filters.",
    "modules": "List whole models under 'models:'.",
    "tokenizer_source": "Leave it out: the models must share one vocabulary, and the base's tokenizer is copied.",
    "tokenizer": "Leave it out: the models must share one vocabulary, and the base's tokenizer is copied.",
    "chat_template": "Leave it out: the base's chat template is copied.",
}


class ModelInput(BaseModel):
    """One entry under `models:`: a checkpoint (folder or hub id) and the parameters that are its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str = Field(min_length=1)
    parameters: dict[str, Any] = Field(default_factory=dict)


class Recipe(BaseModel):
    """A complete, valid description of one merge, in mergekit's dialect.

    Raises:
        InputError: when made with an unknown method or parameter, a value out of range, a required parameter or base
            missing, a model listed twice, too few or too many models.
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
    models: list[ModelInput] = Field(min_length=1)
    parameters: dict[str, Any] = Field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    # What lm_head and the final norm get of a gradient: None and "last" its last value, "mergekit" its first.
    gradient_outer: Literal["last", "mergekit"] | None = None

    @field_validator("parameters", mode="before")
    @classmethod
    def _empty_parameters(cls, value: object) -> object:
        return {} if value is None else value

    @field_validator("dtype", "out_dtype")
    @classmethod
    def _known_dtype(cls, value: str | None) -> str | None:
        name = None if value is None else value.removeprefix("torch.")
        if name is not None and name not in DTYPES:
            raise ValueError(f"'{value}' is not a dtype known here.{nearest(name, DTYPES)} Known: {', '.join(DTYPES)}")
        return name

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        _check_models(self)
        _ = self.clauses
        return self

    @property
    def method(self) -> Method:
        """The declared method of this recipe."""
        try:
            return get_method(self.merge_method)
        except InputError as error:
            raise InputError(error.what, where="merge_method", remedy=error.remedy) from None

    @property
    def output_dtype(self) -> str | None:
        """The dtype that the merged tensors are rounded to, once; None keeps the stored dtype of the inputs."""
        return self.out_dtype or self.dtype

    @property
    def base_is_a_model_like_others(self) -> bool:
        """Whether the base, listed among the models, is averaged with its own weight instead of being θ₀.

        True for methods that use no base, and for `linear`, where mergekit pays no heed to `base_model` and users
        write both models with weights that add up.
        """
        listed = self.base_model is not None and any(same_model(entry.model, self.base_model) for entry in self.models)
        return self.method.base == "unused" or (listed and self.merge_method == "linear")

    def merge_base(self) -> str | None:
        """Return the reference whose tensors the method gets as θ₀, or None when it gets no base.

        Not always `base_model`: see `base_is_a_model_like_others`. The configuration and the tokenizer of the output
        come from `base_model` in any case.
        """
        return None if self.base_is_a_model_like_others else self.base_model

    def task_entries(self) -> tuple[ModelInput, ...]:
        """Return the entries of the models that the method gets as θ₁…θₙ, in the order of the recipe."""
        if not self.base_is_a_model_like_others:
            return tuple(entry for entry in self.models if not same_model(entry.model, self.base_model))
        listed = any(same_model(entry.model, self.base_model) for entry in self.models)
        added = [] if listed or self.base_model is None else [ModelInput(model=self.base_model)]
        return (*self.models, *added)

    def task_models(self) -> tuple[str, ...]:
        """Return the references of the models that the method gets as θ₁…θₙ: those besides `merge_base()`."""
        return tuple(entry.model for entry in self.task_entries())

    def references(self) -> tuple[str, ...]:
        """Return every checkpoint that the merge reads, once each, `base_model` first."""
        base = () if self.base_model is None else (self.base_model,)
        return base + tuple(entry.model for entry in self.models if not same_model(entry.model, self.base_model))

    @cached_property
    def clauses(self) -> Mapping[str, tuple[tuple[Clause, ...], ...]]:
        """The clauses of each parameter in order of precedence: for each task model, or once for a global parameter."""
        return _compile(self)

    def to_yaml(self) -> str:
        """Return the recipe as YAML that `load_recipe` (and, without our own keys, mergekit) reads back."""
        content = self.model_dump(exclude_none=True, exclude_defaults=True)
        for entry in content["models"]:
            if not entry.get("parameters"):
                entry.pop("parameters", None)
        return yaml.dump(content, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True)


def same_model(first: str, second: str | None) -> bool:
    """Say whether two references name one checkpoint, whatever the spelling of the path (`./base/` and `base`)."""
    return second is not None and os.path.normpath(first) == os.path.normpath(second)


def _check_models(recipe: Recipe) -> None:
    method = recipe.method
    for index, entry in enumerate(recipe.models):
        _refuse_adapter(entry.model, f"models.{index}.model")
        if any(same_model(entry.model, earlier.model) for earlier in recipe.models[:index]):
            raise InputError(
                f"the model '{entry.model}' is listed twice",
                where=f"models.{index}.model",
                remedy="List each model once; give it the sum of the weights instead.",
            )
    if recipe.base_model is not None:
        _refuse_adapter(recipe.base_model, "base_model")
    elif method.base == "required":
        raise InputError(
            f"{method.name} needs a base model and the recipe names none",
            where="base_model",
            remedy="Add 'base_model: PATH' (the model that DAPT started from).",
        )
    count, least, most = len(recipe.task_entries()), method.min_models, method.max_models
    if count < least or (most is not None and count > most):
        wanted = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        raise InputError(
            f"{method.name} merges {wanted} model(s) besides the base, and the recipe names {count}",
            where="models",
            remedy="Change the list of models, or choose another merge_method.",
        )


def _refuse_adapter(reference: str, where: str) -> None:
    if "+" in reference and not os.path.exists(reference):
        raise InputError(
            f"'{reference}' names a model with a LoRA adapter, which is not supported yet",
            where=where,
            remedy="Merge the adapter into a full model first (peft: merge_and_unload, then save_pretrained).",
        )


def _compile(recipe: Recipe) -> dict[str, tuple[tuple[Clause, ...], ...]]:
    method = recipe.method
    shared = _read_parameters(recipe.parameters, method, "parameters", own=False)
    own = {
        entry.model: _read_parameters(entry.parameters, method, f"models.{index}.parameters", own=True)
        for index, entry in enumerate(recipe.models)
    }
    compiled = {}
    for parameter in method.parameters:
        default = () if parameter.default is None else (Clause(None, (parameter.default,)),)
        rest = (*shared.get(parameter.name, ()), *default)
        sources = [own.get(model, {}) for model in recipe.task_models()] if parameter.per_model else [{}]
        chains = tuple(truncate((*source.get(parameter.name, ()), *rest)) for source in sources)
        for model, chain in zip(recipe.task_models(), chains, strict=False):
            if not chain:
                raise _missing(parameter, method, model if parameter.per_model else None)
        compiled[parameter.name] = chains
    return compiled


def _read_parameters(raw: Mapping[str, Any], method: Method, where: str, *, own: bool) -> dict[str, tuple[Clause, ...]]:
    """Read one `parameters:` block; `own` says that it belongs to one model."""
    known = [parameter.name for parameter in method.parameters]
    clauses = {}
    for name, value in raw.items():
        if name in INERT_PARAMETERS:
            continue
        parameter = method.parameter(name)
        if parameter is None:
            raise InputError(
                f"{method.name} has no parameter '{name}'.{nearest(name, known)}",
                where=f"{where}.{name}",
                remedy=f"Its parameters are: {', '.join(known)}." if known else "It has no parameters.",
            )
        if own and not parameter.per_model:
            raise InputError(
                f"'{name}' of {method.name} holds for the whole merge, not for one model",
                where=f"{where}.{name}",
                remedy=f"Move it to 'parameters.{name}' at the top level of the recipe.",
            )
        clauses[name] = read_setting(value, parameter, f"{where}.{name}")
    return clauses


def _missing(parameter: Parameter, method: Method, model: str | None) -> InputError:
    for_whom = f" for '{model}'" if model else ""
    return InputError(
        f"{method.name} needs a value for '{parameter.name}' ({parameter.meaning}) and the recipe gives none{for_whom}",
        where=f"parameters.{parameter.name}",
        remedy=f"Add 'parameters: {{{parameter.name}: …}}' to the recipe"
        + (" or to each model." if parameter.per_model else "."),
    )


class _RecipeDumper(yaml.SafeDumper):
    """Writes gradients on one line, and no anchors for values that happen to be shared."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: _RecipeDumper, data: list[Any]) -> yaml.Node:
    plain = all(isinstance(entry, int | float | str) for entry in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=plain)


_RecipeDumper.add_representer(list, _represent_list)
