"""The space of recipes: which knobs a trial has, and the recipe that a point of it stands for.

A knob is one parameter that Optuna proposes. It exists only for the methods that declare it, so that no trial carries a
value that cannot change its model. A point (a mapping of knob names to values) becomes a recipe by a pure function.
What this module does not know: how points are proposed, and what a recipe scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dapt_merge.errors import InputError, nearest

if TYPE_CHECKING:
    from dapt_merge.methods.contract import Method, Parameter
    from dapt_merge.recipe import Recipe

Value = float | bool | str
Point = dict[str, Value]
Endpoint = Literal["base", "dapt"]


@dataclass(frozen=True)
class Range:
    """A real interval, ends included; `step` makes it a finite ladder from `low`, `log` samples its logarithm."""

    low: float
    high: float
    step: float | None = None
    log: bool = False

    def values(self) -> tuple[float, ...] | None:
        """Return every value of a finite range, None for a continuous one."""
        if self.low == self.high:
            return (self.low,)
        if self.step is None:
            return None
        # Rounding removes the binary dust of 0.1 + 0.2, which would make two names of one recipe.
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(round(self.low + index * self.step, 12) for index in range(count))

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True)
class Choices:
    """An unordered finite set of values."""

    options: tuple[Value, ...]

    def values(self) -> tuple[Value, ...]:
        """Return every value."""
        return self.options

    def __contains__(self, value: object) -> bool:
        return value in self.options


@dataclass(frozen=True)
class Knob:
    """One proposed parameter: its name in the trial, the recipe's parameter that it sets, and when it exists.

    `methods` empty: for every method. `group`: only the tensors of that group (`rest`: of no named group).
    """

    name: str
    parameter: str
    setting: Range | Choices
    methods: tuple[str, ...] = ()
    group: str | None = None


@dataclass(frozen=True)
class Space:
    """Every knob, in the order of proposal: method first, then checkpoint, then what the method declares.

    `checkpoints` maps a checkpoint's label to its folder, in the order of the run: the last one is the DAPT endpoint.
    """

    base: str
    checkpoints: Mapping[str, str]
    knobs: tuple[Knob, ...]
    mask_seed: int = 0

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods."""
        return tuple(str(method) for method in self.knobs[0].setting.values() or ())

    def knobs_of(self, method: str) -> tuple[Knob, ...]:
        """Return the knobs that a trial of `method` has."""
        return tuple(knob for knob in self.knobs if not knob.methods or method in knob.methods)


def find_checkpoints(checkpoints: str | Sequence[str]) -> dict[str, str]:
    """Map labels to model folders: a run's `checkpoint-STEP/` by step, a single model, or a list as given.

    Raises:
        InputError: the folder holds no checkpoint.
    """
    from dapt_merge.checkpoints.trajectory import run_checkpoints

    if isinstance(checkpoints, str):
        run = Path(checkpoints)
        folders = run_checkpoints(run)
        if not folders and (run / "config.json").is_file():
            folders = [run]
        if not folders:
            raise InputError(
                "no checkpoint is here: no checkpoint-*/config.json and no config.json",
                where=run,
                remedy="Give the output folder of a pre-training run, or a list of model folders.",
            )
    else:
        folders = [Path(path) for path in checkpoints]
    names = [folder.name for folder in folders]
    return {folder.name if names.count(folder.name) == 1 else str(folder): str(folder) for folder in folders}


def build_space(
    raw: Mapping[str, Any], base: str, checkpoints: Mapping[str, str], *, mask_seed: int = 0, where: str = "space"
) -> Space:
    """Read the raw settings of a study into knobs.

    Args:
        raw: `method`, `checkpoint`, and parameters of the methods. A parameter is a value, a list of choices, a range
            `{low, high, step, log}`, one of these per method (`{ties: …, dare_ties: …}`), or, for the weight, one per
            tensor group (`{attention: …, mlp: …, rest: …}`).
        checkpoints: label → folder, from `find_checkpoints`.

    Raises:
        InputError: unknown method, parameter, group or checkpoint (with the nearest known one); a parameter that none
            of the methods declares; a value outside a method's range; no weight.
    """
    methods = _methods(raw.get("method"), f"{where}.method")
    selected = _checkpoint_choices(raw.get("checkpoint", "last"), checkpoints, f"{where}.checkpoint")
    knobs = [
        Knob("method", "method", Choices(tuple(method.name for method in methods))),
        Knob("checkpoint", "checkpoint", Choices(tuple(selected))),
    ]
    for name, setting in raw.items():
        if name not in ("method", "checkpoint"):
            knobs += _parameter_knobs(name, setting, methods, f"{where}.{name}")
    space = Space(base, {label: checkpoints[label] for label in selected}, tuple(knobs), mask_seed)
    _refuse_gaps(space, methods, where)
    return space


def _methods(raw: Any, where: str) -> list[Method]:
    from dapt_merge.methods.registry import get_method

    if raw is None or raw == []:
        raise InputError("the space names no method", where=where, remedy="Give method: [linear, ties].")
    names = list(dict.fromkeys(raw if isinstance(raw, list) else [raw]))
    methods = [get_method(str(name)) for name in names]
    for method in methods:
        if method.min_models > 1:
            raise InputError(
                f"'{method.name}' needs {method.min_models} task vectors, a trial merges one checkpoint",
                where=where,
                remedy="Leave it out of the space.",
            )
    return methods


def _checkpoint_choices(raw: Any, checkpoints: Mapping[str, str], where: str) -> list[str]:
    labels = list(checkpoints)
    if raw == "all":
        return labels
    wanted = [labels[-1]] if raw == "last" else [str(label) for label in (raw if isinstance(raw, list) else [raw])]
    for label in wanted:
        if label not in labels:
            raise InputError(
                f"no checkpoint '{label}'.{nearest(label, labels)}",
                where=where,
                remedy=f"Choose all, last, or from {', '.join(labels)}.",
            )
    # The run's order, whatever the list's: the last one is the DAPT endpoint.
    return [label for label in labels if label in wanted]


def _parameter_knobs(name: str, raw: Any, methods: Sequence[Method], where: str) -> list[Knob]:
    from dapt_merge.checkpoints.groups import GROUPS
    from dapt_merge.recipe.settings import REST

    declaring = [method for method in methods if _declared(method, name)]
    if not declaring:
        known = sorted({parameter.name for method in methods for parameter in method.parameters} | {"weight"})
        names = ", ".join(method.name for method in methods)
        raise InputError(
            f"'{name}' is a parameter of none of the methods {names}: it could change no merge.{nearest(name, known)}",
            where=where,
            remedy=f"Remove it, add a method that declares it, or choose from {', '.join(known)}.",
        )
    only = () if len(declaring) == len(methods) else tuple(method.name for method in declaring)
    if isinstance(raw, Mapping) and not set(raw) <= {"low", "high", "step", "log"}:
        by_method = {method.name: method for method in declaring}
        if set(raw) <= set(by_method):
            return [
                Knob(f"{key}.{name}", name, _setting(value, name, [by_method[key]], f"{where}.{key}"), (key,))
                for key, value in raw.items()
            ]
        groups = (*GROUPS, REST)
        if name == "weight" and set(raw) <= set(groups):
            return [
                Knob(f"{name}.{key}", name, _setting(value, name, declaring, f"{where}.{key}"), only, key)
                for key, value in _with_rest(raw, where).items()
            ]
        known_keys = ["low", "high", "step", "log", *by_method, *(groups if name == "weight" else ())]
        wrong = (
            next(key for key in raw if key not in known_keys) if not set(raw) <= set(known_keys) else next(iter(raw))
        )
        raise InputError(
            f"'{wrong}' does not fit here.{nearest(str(wrong), known_keys)}",
            where=where,
            remedy="Give a value, a list, {low, high}, or one of these per method or (weight only) per group.",
        )
    return [Knob(name, name, _setting(raw, name, declaring, where), only)]


def _with_rest(raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    from dapt_merge.checkpoints.groups import GROUPS
    from dapt_merge.recipe.settings import REST

    if REST not in raw and set(raw) != set(GROUPS):
        raise InputError(
            "the tensors outside the named groups have no weight", where=where, remedy=f"Add {REST}: to the groups."
        )
    return raw


def _declared(method: Method, name: str) -> Parameter | None:
    """Return the method's own parameter; a study's `weight` is the `t` of SLERP, as in `dm.merge`."""
    if name == "weight":
        return method.share
    return method.parameter(name) or method.parameter(f"{name}_")


def _setting(raw: Any, name: str, methods: Sequence[Method], where: str) -> Range | Choices:
    setting = _parse(raw, where)
    for value in _extremes(setting):
        for method in methods:
            parameter = _declared(method, name)
            assert parameter is not None
            parameter.check(value, f"{where} ({method.name})")
    return setting


def _parse(raw: Any, where: str) -> Range | Choices:
    if isinstance(raw, Mapping):
        unknown = [key for key in raw if key not in ("low", "high", "step", "log")]
        if unknown or not {"low", "high"} <= set(raw):
            what = f"unknown key '{unknown[0]}'" if unknown else "a range needs low and high"
            raise InputError(what, where=where, remedy="Write {low: 0, high: 1}, with step or log if wanted.")
        return _range(raw, where)
    if isinstance(raw, list):
        if not raw or any(isinstance(value, Mapping | list) or value is None for value in raw):
            raise InputError(f"{raw!r} is not a list of values", where=where, remedy="Write [0.2, 0.5, 0.8].")
        return Choices(tuple(dict.fromkeys(raw)))
    if isinstance(raw, bool | str):
        return Choices((raw,))
    if isinstance(raw, int | float) and math.isfinite(raw):
        return Range(float(raw), float(raw))
    raise InputError(f"{raw!r} is not a setting", where=where, remedy="Give a value, a list or {low, high}.")


def _range(raw: Mapping[str, Any], where: str) -> Range:
    low, high, step, log = raw["low"], raw["high"], raw.get("step"), raw.get("log", False)
    numbers = [low, high] if step is None else [low, high, step]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in numbers):
        raise InputError("low, high and step are finite numbers", where=where, remedy="Write {low: 0, high: 1}.")
    if low > high:
        raise InputError(f"low {low:g} is above high {high:g}", where=where, remedy="Swap them.")
    if step is not None and (step <= 0 or log):
        raise InputError("step is above 0, and not together with log", where=where, remedy="Correct the step.")
    if log and low <= 0:
        raise InputError("a log range starts above 0", where=where, remedy="Raise low, or remove log.")
    return Range(float(low), float(high), None if step is None else float(step), bool(log))


def _extremes(setting: Range | Choices) -> tuple[Value, ...]:
    return (setting.low, setting.high) if isinstance(setting, Range) else setting.options


def _refuse_gaps(space: Space, methods: Sequence[Method], where: str) -> None:
    """Refuse methods that lack a needed parameter, and knobs that a method says are dead."""
    for method in methods:
        given = {knob.parameter for knob in space.knobs_of(method.name)}
        if "weight" not in given and _declared(method, "weight"):
            raise InputError(
                f"'{method.name}' has no weight in this space",
                where=f"{where}.weight",
                remedy="Give weight: {low: 0, high: 1}.",
            )
        for parameter in method.parameters:
            name = parameter.name.rstrip("_")
            if parameter.default is None and name not in given and parameter != method.share:
                raise InputError(
                    f"'{method.name}' needs {name}, which this space does not set",
                    where=where,
                    remedy=f"Add {name}: to the space.",
                )


def propose(space: Space, suggest: Callable[[Knob], Value]) -> Point:
    """Return a point: ask `suggest` for each knob that the chosen method has, in a fixed order."""
    point: Point = {"method": suggest(space.knobs[0])}
    for knob in space.knobs_of(str(point["method"]))[1:]:
        point[knob.name] = suggest(knob)
    return point


def grid(space: Space) -> list[Point]:
    """Return every point of a finite space, each once.

    Raises:
        InputError: a knob is a continuous range.
    """
    points: list[Point] = []
    for method in space.methods:
        partial: list[Point] = [{"method": method}]
        for knob in space.knobs_of(method)[1:]:
            values = knob.setting.values()
            if values is None:
                raise InputError(
                    f"a grid needs finitely many values, '{knob.name}' is a continuous range",
                    where=f"space.{knob.parameter}",
                    remedy="Add a step, or give a list.",
                )
            partial = [{**point, knob.name: value} for point in partial for value in values]
        points += partial
    return points


def endpoint(space: Space, end: Endpoint) -> Point:
    """Return the point of the base (every weight 0) or of the DAPT model (weight 1, density 1, last checkpoint).

    The end values are kept even where the space is narrower: they are what the samplers must believe.
    """
    method = "linear" if "linear" in space.methods else space.methods[0]
    point: Point = {"method": method}
    for knob in space.knobs_of(method)[1:]:
        point[knob.name] = _end_value(space, knob, method, end)
    return point


def _end_value(space: Space, knob: Knob, method: str, end: Endpoint) -> Value:
    from dapt_merge.methods.registry import get_method

    if knob.parameter == "checkpoint":
        return list(space.checkpoints)[-1]
    exact = {"weight": 0.0 if end == "base" else 1.0, "density": 1.0, "lambda": 1.0}
    if isinstance(knob.setting, Choices):
        wanted = exact.get(knob.parameter, knob.setting.options[0])
        return wanted if wanted in knob.setting.options else knob.setting.options[0]
    if knob.parameter in exact:
        return exact[knob.parameter]
    parameter = _declared(get_method(method), knob.parameter)
    default = parameter.default if parameter is not None else None
    return float(default) if isinstance(default, int | float) and default in knob.setting else knob.setting.low


def complete_point(space: Space, given: Mapping[str, Any], where: str) -> Point:
    """Check a point that a user wrote, and fill in the knobs that have one value only and the last checkpoint.

    Raises:
        InputError: unknown knob, value outside the space, or a knob with several values left open.
    """
    names = [knob.name for knob in space.knobs]
    for name in given:
        if name not in names:
            raise InputError(
                f"unknown parameter '{name}'.{nearest(name, names)}", where=where, remedy=f"Known: {', '.join(names)}."
            )

    last = list(space.checkpoints)[-1]
    if given.get("checkpoint", "last") == "last":
        given = {**given, "checkpoint": last}

    def value_of(knob: Knob) -> Value:
        values = knob.setting.values()
        if knob.name not in given and values is not None and len(values) == 1:
            return values[0]
        if knob.name not in given or given[knob.name] not in knob.setting:
            found = repr(given[knob.name]) if knob.name in given else "nothing"
            raise InputError(
                f"'{knob.name}' has to be a value of the space, found {found}",
                where=where,
                remedy=f"Space: {knob.setting}.",
            )
        value = given[knob.name]
        return float(value) if isinstance(knob.setting, Range) else value

    point = propose(space, value_of)
    unused = [name for name in given if name not in point]
    if unused:
        raise InputError(
            f"'{unused[0]}' is no parameter of {point['method']}", where=where, remedy="Remove it from the point."
        )
    return point


def points_in(space: Space) -> Iterator[Point]:
    """Yield one point inside the space for each method: the middle of every range, the first of every list."""
    for method in space.methods:

        def middle(knob: Knob, method: str = method) -> Value:
            if knob.name == "method":
                return method
            if isinstance(knob.setting, Choices):
                return knob.setting.options[0]
            return (knob.setting.low + knob.setting.high) / 2

        yield propose(space, middle)


def copied_input(space: Space, point: Mapping[str, Value]) -> Endpoint | None:
    """Say whether a point is the base, or its DAPT checkpoint, bit for bit: the method declares when it copies."""
    from dapt_merge.methods.registry import get_method

    method = get_method(str(point["method"]))
    if method.copy_of is None:
        return None
    values, groups = _parameters(space, point)
    copies = set()
    for weight in groups.values() or [values.get("weight")]:
        named = {_declared_name(method, name): value for name, value in {**values, "weight": weight}.items()}
        complete = method.complete({k: v for k, v in named.items() if v is not None}, 1, "space")
        copies.add(method.copy_of(complete, 1, True))
    ends: dict[object, Endpoint] = {"base": "base", 0: "dapt"}
    return ends.get(copies.pop()) if len(copies) == 1 else None


def endpoint_recipe(space: Space, end: Endpoint, checkpoint: str | None = None) -> Recipe:
    """Return the one recipe that stands for the base, or for a DAPT checkpoint (default: the last)."""
    from dapt_merge.recipe import make_recipe

    last = list(space.checkpoints)[-1]
    folder = space.checkpoints[last if checkpoint is None or end == "base" else checkpoint]
    return make_recipe(space.base, [folder], "linear", weight=0.0 if end == "base" else 1.0)


def to_recipe(space: Space, point: Mapping[str, Value]) -> Recipe:
    """Turn a point into its recipe. A point that copies an input gives that input's own recipe, so that equal models
    share one name.
    """
    end = copied_input(space, point)
    if end is not None:
        return endpoint_recipe(space, end, str(point["checkpoint"]))
    from dapt_merge.recipe import make_recipe

    parameters, groups = _parameters(space, point)
    if groups:
        parameters["weight"] = groups
    folder = space.checkpoints[str(point["checkpoint"])]
    return make_recipe(space.base, [folder], str(point["method"]), seed=space.mask_seed, **parameters)


def _parameters(space: Space, point: Mapping[str, Value]) -> tuple[dict[str, Any], dict[str, Value]]:
    """Split a point into the recipe's parameters and the weights by group."""
    parameters: dict[str, Any] = {}
    groups: dict[str, Value] = {}
    for knob in space.knobs_of(str(point["method"]))[2:]:
        if knob.group is None:
            parameters[knob.parameter] = point[knob.name]
        else:
            groups[knob.group] = point[knob.name]
    return parameters, groups


def _declared_name(method: Method, name: str) -> str:
    parameter = _declared(method, name)
    return name if parameter is None else parameter.name


def describe(point: Mapping[str, Value]) -> str:
    """Say a point in a few words.

    Example:
        >>> describe({"method": "ties", "checkpoint": "checkpoint-200", "weight": 0.6, "density": 0.3})
        'ties weight 0.6 density 0.3 · checkpoint-200'
    """
    words = [str(point.get("method", "?"))]
    for name, value in point.items():
        if name not in ("method", "checkpoint"):
            shown = f"{value:.3g}" if isinstance(value, float) else str(value)
            words.append(f"{name.removeprefix(f'{words[0]}.')} {shown}")
    return " ".join(words) + (f" · {point['checkpoint']}" if "checkpoint" in point else "")


def space_warnings(space: Space) -> list[str]:
    """List what makes a space larger than the set of models it reaches."""
    from dapt_merge.recipe import recipe_warnings

    found: list[str] = []
    if {"linear", "task_arithmetic"} <= set(space.methods):
        found.append("linear and task_arithmetic give the same model for one task vector: half of their trials repeat")
    for method in space.methods:
        parameters = [knob.parameter for knob in space.knobs_of(method) if len(knob.setting.values() or "..") > 1]
        if {"weight", "lambda"} <= set(parameters):
            found.append(f"{method}: with one task vector only the product of weight and lambda matters")
    for point in points_in(space):
        warnings = recipe_warnings(to_recipe(space, point), defaults_of_mergekit=False)
        found += [f"{point['method']}: {warning}" for warning in warnings]
    return found
