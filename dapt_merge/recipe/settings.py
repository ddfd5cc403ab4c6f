"""One parameter's setting: a value, a gradient over the layers, or a list of filters, each with a value or a gradient.

The idea: every spelling becomes a short list of clauses, tried in order; the first whose filter fits the tensor's name
gives the value at the tensor's depth. A model's own clauses, then the recipe's, then the method's default: that is the
precedence. What this module does not know: recipes, layers' numbers, methods beyond a parameter's declaration.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dapt_merge.errors import InputError, nearest
from dapt_merge.methods.contract import Parameter

Scalar = float | bool | str


@dataclass(frozen=True)
class Clause:
    """The value, or the anchors of a gradient, for the tensors that a filter fits.

    `filter` is a substring of tensor names; None fits every tensor.
    """

    filter: str | None
    anchors: tuple[Scalar, ...]

    def fits(self, tensor_name: str) -> bool:
        """Say whether the clause applies to a tensor. (Filters by group name would be told apart here.)"""
        return self.filter is None or self.filter in tensor_name

    @property
    def is_gradient(self) -> bool:
        """Whether the value depends on the layer."""
        return len(self.anchors) > 1

    def at(self, depth: float) -> Scalar:
        """Return the value at a depth from 0 (first layer) to 1 (last layer).

        Numbers are interpolated linearly between evenly spaced anchors; flags and words step from one to the next.

        Example:
            >>> Clause(None, (0.0, 0.5, 0.3)).at(0.75)
            0.4
        """
        position = depth * (len(self.anchors) - 1)
        index = int(position)
        here = self.anchors[index]
        following = self.anchors[min(index + 1, len(self.anchors) - 1)]
        if isinstance(here, bool | str) or isinstance(following, bool | str) or here == following:
            return here
        share = position - index
        return (1 - share) * here + share * following


def read_setting(raw: object, parameter: Parameter, where: str) -> tuple[Clause, ...]:
    """Read what a recipe says for one parameter into clauses, in the order in which they are tried.

    Raises:
        InputError: a wrong type, a value out of range, an empty list, an unknown key in a filter entry. `where` is
            the path of the key in the recipe, for example `models.0.parameters.weight`.
    """
    if isinstance(raw, Mapping):
        return (_read_condition(raw, parameter, where),)
    if isinstance(raw, Sequence) and not isinstance(raw, str) and any(isinstance(entry, Mapping) for entry in raw):
        return tuple(_read_condition(entry, parameter, f"{where}.{index}") for index, entry in enumerate(raw))
    return (Clause(None, _read_anchors(raw, parameter, where)),)


def truncate(clauses: Sequence[Clause]) -> tuple[Clause, ...]:
    """Leave out the clauses that can never be reached because an earlier one fits every tensor."""
    for index, clause in enumerate(clauses):
        if clause.filter is None:
            return tuple(clauses[: index + 1])
    return tuple(clauses)


def _read_condition(raw: object, parameter: Parameter, where: str) -> Clause:
    if not isinstance(raw, Mapping):
        raise InputError(
            f"a list of filters holds {_shown(raw)}, which has no 'value:'",
            where=where,
            remedy="Write each entry as '- filter: PART_OF_NAME' and 'value: …'; leave the filter out for the rest.",
        )
    for key in raw:
        if key not in ("filter", "value"):
            raise InputError(
                f"unknown key {_shown(key)} beside a filter.{nearest(str(key), ['filter', 'value'])}",
                where=f"{where}.{key}",
                remedy="An entry has a 'value' and, unless it fits every tensor, a 'filter'.",
            )
    if "value" not in raw:
        raise InputError("this entry has no 'value'", where=where, remedy="Add 'value: …' to the entry.")
    name_part = raw.get("filter")
    if name_part is not None and (not isinstance(name_part, str) or not name_part):
        raise InputError(
            f"filter is {_shown(name_part)}; it must be a part of tensor names",
            where=f"{where}.filter",
            remedy="Write for example 'filter: self_attn', or leave the filter out to fit every tensor.",
        )
    anchors = _read_anchors(raw["value"], parameter, f"{where}.value")
    return Clause(None if name_part == "*" else name_part, anchors)


def _read_anchors(raw: object, parameter: Parameter, where: str) -> tuple[Scalar, ...]:
    if isinstance(raw, Sequence) and not isinstance(raw, str):
        if not raw:
            raise InputError(
                f"{parameter.name} is an empty list", where=where, remedy="Give one value, or a list over the layers."
            )
        anchors = tuple(_read_scalar(entry, parameter, f"{where}.{index}") for index, entry in enumerate(raw))
        return anchors[:1] if len(set(anchors)) == 1 else anchors
    return (_read_scalar(raw, parameter, where),)


def _read_scalar(raw: object, parameter: Parameter, where: str) -> Scalar:
    if not isinstance(raw, str | bool | int | float):
        raise InputError(
            f"'{parameter.name}' is {_shown(raw)}, expected {parameter.expected}",
            where=where,
            remedy="Give a single value, a list of values over the layers, or a list of filters.",
        )
    return parameter.check(_as_meant(raw, parameter), where)


def _as_meant(raw: Scalar, parameter: Parameter) -> Scalar:
    """Undo what YAML 1.1 and mergekit's older examples do to single values."""
    if parameter.kind == "number" and isinstance(raw, str):
        try:
            return float(raw)  # YAML reads 1e-3, without a decimal point, as a word
        except ValueError:
            return raw
    takes_flags = parameter.kind == "flag" or any(isinstance(choice, bool) for choice in parameter.choices)
    if takes_flags and not isinstance(raw, bool | str) and raw in (0, 1):
        return bool(raw)
    return raw


def _shown(value: object) -> str:
    """Show a value of unknown size in an error: a YAML file can hold a very large one."""
    return "nothing" if value is None else reprlib.repr(value)
