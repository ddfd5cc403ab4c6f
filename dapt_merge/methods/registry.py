"""Merge methods by name: the ones in this folder, and those of other installed packages.

A package adds methods by naming a module under the entry point group `dapt_merge.methods`; importing the module runs
its `@method` lines. Registration knows nothing of how a method is run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dapt_merge.errors import InputError, nearest
from dapt_merge.methods.contract import Method, Parameter, Source, Values
from dapt_merge.methods.fused import Fused
from dapt_merge.methods.lines import combinations

if TYPE_CHECKING:
    from torch import Tensor

ENTRY_POINT_GROUP = "dapt_merge.methods"
_BUILT_IN = (
    "averaging",
    "passthrough",
    "spherical",
    "task_arithmetic",
    "ties",
    "dare",
    "della",
    "breadcrumbs",
    "model_stock",
    "sce",
    "nearswap",
    "ram",
    "arcee_fusion",
    "nuslerp",
    "spherical_means",
    "singular_vectors",
    "fisher",
    "regmean",
)

_methods: dict[str, Method] = {}
_loaded = False

Function = TypeVar("Function", bound="Callable[..., Tensor]")


def method(
    name: str,
    *,
    parameters: tuple[Parameter, ...] = (),
    base: Literal["required", "optional", "unused"] = "required",
    min_models: int = 1,
    max_models: int | None = None,
    reference: str,
    random: bool = False,
    dead_knobs: Callable[[Values, int], list[str]] | None = None,
    elementwise: bool = False,
    whole_rows: bool = False,
    measure: Callable[..., Any] | None = None,
    check: Callable[[Values, str], None] | None = None,
    copy_of: Callable[[Values, int, bool], Source | None] | None = None,
    kernel: Callable[..., Fused] | None = None,
) -> Callable[[Function], Function]:
    """Register the decorated function as a merge method and return it unchanged (see `contract.Method`).

    `dead_knobs` and `copy_of` are given complete, checked values.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> from dapt_merge.methods.registry import _methods
        >>> @method("largest", base="unused", min_models=2, reference="an example")
        ... def largest(base, models, *, context):
        ...     return torch.stack(models).amax(dim=0)
        >>> get_method("largest").min_models
        2
        >>> _ = _methods.pop("largest")
    """

    def register(function: Function) -> Function:
        if name in _methods:
            raise ValueError(f"the merge method '{name}' is registered twice")
        declared = Method(
            name=name,
            function=function,
            parameters=parameters,
            base=base,
            min_models=min_models,
            max_models=max_models,
            reference=reference,
            random=random,
            elementwise=elementwise,
            whole_rows=whole_rows,
            measure=measure,
            check=check,
            copy_of=copy_of,
            kernel=kernel,
        )
        _methods[name] = declared if dead_knobs is None else _with_dead_knobs(declared, dead_knobs)
        return function

    return register


def get_method(name: str) -> Method:
    """Return the method of that name.

    Raises:
        InputError: there is none; the nearest known name is suggested.
    """
    _load()
    if name not in _methods:
        names = method_names()
        raise InputError(
            f"there is no merge method '{name}'.{nearest(name, names)}", remedy=f"Use one of: {', '.join(names)}."
        )
    return _methods[name]


def method_names() -> tuple[str, ...]:
    """Return the names of all methods, sorted."""
    _load()
    return tuple(sorted(_methods))


def _load() -> None:
    global _loaded
    if not _loaded:
        for module in _BUILT_IN:
            import_module(f"dapt_merge.methods.{module}")
        _load_entry_points()
        _methods.update((scaled.name, scaled) for scaled in combinations(_methods.values()))
        _loaded = True


def _with_dead_knobs(declared: Method, dead_knobs: Callable[[Values, int], list[str]]) -> Method:
    """Let callers pass what a recipe holds: the explanation itself sees every value, checked."""

    def explain(values: dict[str, object], count: int) -> list[str]:
        return dead_knobs(declared.complete(values, count, f"parameters of {declared.name}"), count)

    return replace(declared, dead_knobs=explain)


def _load_entry_points() -> None:
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry_point.load()
        except Exception as error:  # another package's fault must not take the built-in methods away
            warnings.warn(f"merge methods of '{entry_point.value}' could not be loaded: {error}", stacklevel=2)
