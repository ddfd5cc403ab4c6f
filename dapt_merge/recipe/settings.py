"""One parameter's setting: a value, a gradient over the layers, or one of these for each group of tensors or filter.

    weight: 0.5                                      one value
    weight: [0, 0.5, 1]                              a gradient, from the first layer to the last
    weight: {attention: 0.3, mlp: 0.7, rest: 0.5}    by group (our own; `rest` is what the named groups leave)
    weight:                                          tried in order: the first entry that fits a tensor gives its value
      - {group: norm, value: 1}                      by group (our own)
      - {filter: layers.0., value: 0.2}              by a part of the tensor's name
      - {value: 0.5}                                 the rest

The idea: every spelling becomes a short list of clauses, tried in order; the first that fits the tensor gives the value
at the tensor's depth. A model's own clauses, then the recipe's, then the method's default: that is the precedence. What
this module does not know: recipes, layers' numbers, methods beyond a parameter's declaration.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dapt_merge.checkpoints.groups import GROUPS, tensor_group
from dapt_merge.errors import InputError, nearest
from dapt_merge.methods.contract import Parameter

Scalar = float | bool | str
# In a setting by group: the tensors of none of the groups that it names.
REST = "rest"
_ENTRY_KEYS = ("filter", "group", "value")
# What mergekit takes for a flag where YAML gives a text.
_FLAGS_IN_QUOTES = {
    **dict.fromkeys(("true", "yes", "on", "t", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "f", "n", "0"), False),
}


@dataclass(frozen=True)
class Clause:
    """The value, or the anchors of a gradient, for the tensors that a filter or a group fits.

    `filter` is a substring of tensor names, `group` one of `checkpoints.groups.GROUPS`; None fits every tensor.
    """

    filter: str | None
    anchors: tuple[Scalar, ...]
    group: str | None = None

    def fits(self, tensor_name: str) -> bool:
        """Say whether the clause applies to a tensor."""
        if self.filter is not None and self.filter not in tensor_name:
            return False
        return self.group is None or tensor_group(tensor_name).kind == self.group

    @property
    def fits_all(self) -> bool:
        """Whether the clause applies to every tensor, so that none behind it is ever reached."""
        return self.filter is None and self.group is None

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
        return _read_mapping(raw, parameter, where)
    if isinstance(raw, Sequence) and not isinstance(raw, str) and any(isinstance(entry, Mapping) for entry in raw):
        return tuple(_read_condition(entry, parameter, f"{where}.{index}") for index, entry in enumerate(raw))
    return (Clause(None, _read_anchors(raw, parameter, where)),)


def truncate(clauses: Sequence[Clause]) -> tuple[Clause, ...]:
    """Leave out the clauses that can never be reached because an earlier one fits every tensor."""
    for index, clause in enumerate(clauses):
        if clause.fits_all:
            return tuple(clauses[: index + 1])
    return tuple(clauses)


def _read_mapping(raw: Mapping[object, object], parameter: Parameter, where: str) -> tuple[Clause, ...]:
    """Read a mapping: one entry of a list of filters, or a value for each of some groups."""
    if not raw or any(key in _ENTRY_KEYS for key in raw):
        return (_read_condition(raw, parameter, where),)
    for key in raw:
        if key not in (*GROUPS, REST):
            known = [*GROUPS, REST, *_ENTRY_KEYS]
            raise InputError(
                f"{_shown(key)} is neither a group of tensors nor '{REST}'.{nearest(str(key), known)}",
                where=f"{where}.{key}",
                remedy=f"The groups are {', '.join(GROUPS)}; '{REST}' is all other tensors.",
            )
    # The groups do not overlap, so their order means nothing: one order, one fingerprint.
    named = tuple(
        Clause(None, _read_anchors(raw[group], parameter, f"{where}.{group}"), group)
        for group in GROUPS
        if group in raw
    )
    return (*named, Clause(None, _read_anchors(raw[REST], parameter, f"{where}.{REST}"))) if REST in raw else named


def _read_condition(raw: object, parameter: Parameter, where: str) -> Clause:
    if not isinstance(raw, Mapping):
        raise InputError(
            f"a list of filters holds {_shown(raw)}, which has no 'value:'",
            where=where,
            remedy="Write each entry as '- filter: PART_OF_NAME' and 'value: …'; leave the filter out for the rest.",
        )
    for key in raw:
        if key not in _ENTRY_KEYS:
            raise InputError(
                f"unknown key {_shown(key)} beside a filter.{nearest(str(key), list(_ENTRY_KEYS))}",
                where=f"{where}.{key}",
                remedy="An entry has a 'value' and, unless it fits every tensor, a 'filter' or a 'group'.",
            )
    if "value" not in raw:
        raise InputError("this entry has no 'value'", where=where, remedy="Add 'value: …' to the entry.")
    name_part, group = raw.get("filter"), raw.get("group")
    if name_part is not None and (not isinstance(name_part, str) or not name_part):
        raise InputError(
            f"filter is {_shown(name_part)}; it must be a part of tensor names",
            where=f"{where}.filter",
            remedy="Write for example 'filter: self_attn', or leave the filter out to fit every tensor.",
        )
    if group is not None and group not in GROUPS:
        raise InputError(
            f"there is no group {_shown(group)}.{nearest(str(group), list(GROUPS))}",
            where=f"{where}.group",
            remedy=f"The groups are {', '.join(GROUPS)}.",
        )
    anchors = _read_anchors(raw["value"], parameter, f"{where}.value")
    return Clause(None if name_part == "*" else name_part, anchors, group)


def _read_anchors(raw: object, parameter: Parameter, where: str) -> tuple[Scalar, ...]:
    if isinstance(raw, Sequence) and not isinstance(raw, str):
        if parameter.kind == "file":
            raise InputError(
                f"'{parameter.name}' is a list; between files there is no gradient",
                where=where,
                remedy=f"Give one path; put each model's '{parameter.name}' under that model's 'parameters:'.",
            )
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
    if takes_flags and isinstance(raw, str) and raw not in parameter.choices:
        return _FLAGS_IN_QUOTES.get(raw.lower(), raw)
    if takes_flags and not isinstance(raw, bool | str) and raw in (0, 1):
        return bool(raw)
    return raw


def _shown(value: object) -> str:
    """Show a value of unknown size in an error: a YAML file can hold a very large one."""
    return "nothing" if value is None else reprlib.repr(value)
