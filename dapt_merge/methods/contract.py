"""The contract of a merge method: a pure function of tensors, and the declaration beside it.

A method's function gets the float32 tensors of one parameter (same shape) and returns the merged float32 tensor:

    function(base, models, *, <parameters>, context) -> Tensor

`base` is θ₀, `models` are θ₁…θₙ (never the base). A per-model parameter arrives as a tuple with one value per model, a
global one as a single value; the parameter `lambda` arrives as `lambda_`. `context` names the tensor and carries the
seed (random masks are a function of seed, tensor name and element index only) and collects what the merge report has
to say. A function never modifies an input, reads no file and knows no recipe.

Most methods treat every element alike once a few numbers of the whole tensor are known (a threshold, an angle). Such a
method declares `elementwise=True` and, if it needs those numbers, a `measure`; `apply.combine` then streams the tensor
in pieces that stay in the processor's cache, and no full-size float32 copy of an input is ever made. One that treats
every row alike (ranks, softmaxes) also declares `whole_rows=True`, and its pieces never cut a row. A method without
these simply gets whole tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dapt_merge.errors import InputError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from dapt_merge.methods.fused import Fused
    from dapt_merge.methods.selection import Cutoff

Value = float | bool | str
Values = dict[str, Any]  # parameter name → value, or a tuple of values (one per model) for a per-model parameter
Found = TypeVar("Found")
_FACTS_KEPT = 64  # of one tensor: a search proposes densities without end
Source = Literal["base"] | int  # an input of a merge: the base, or the position of a model


@dataclass(frozen=True)
class Parameter:
    """One knob of a method: its default (None: must be given), range and meaning.

    `choices` may hold `True` and `False` beside words: a knob that is a flag with an `"auto"`, or a set of words that
    also takes the booleans of mergekit's dialect.

    A `file` is the path of a statistics file for a model: the method does not see what is in it by this parameter, but
    gets what it holds for the tensor as `TensorContext.statistics`.
    """

    name: str
    default: Value | None
    meaning: str
    per_model: bool = False
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    choices: tuple[str | bool, ...] = ()
    file: bool = False

    @property
    def kind(self) -> Literal["number", "flag", "choice", "file"]:
        """What a single value of this parameter is."""
        if self.file:
            return "file"
        if self.choices:
            return "choice"
        return "flag" if isinstance(self.default, bool) else "number"

    @property
    def expected(self) -> str:
        """The allowed values in words, for errors and documentation.

        Example:
            >>> Parameter("density", 1.0, "share of the elements kept", low=0, high=1).expected
            'a number in [0, 1]'
        """
        if self.kind == "file":
            return "the path of a file"
        if self.kind == "choice":
            return "one of " + ", ".join(str(choice).lower() for choice in self.choices)
        if self.kind == "flag":
            return "true or false"
        if math.isinf(self.low) and math.isinf(self.high):
            return "a finite number"
        if math.isinf(self.high):
            return f"a finite number {'above' if self.low_open else 'of at least'} {self.low:g}"
        return f"a number in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}]"

    def check(self, value: object, where: str) -> Value:
        """Return one value of this parameter (numbers as float), or raise InputError with what, where and range."""
        kind = self.kind
        if kind == "file":
            if not isinstance(value, str) or not value:
                raise self._fault(value, where)
            return value
        if kind == "choice":
            matches = [choice for choice in self.choices if type(choice) is type(value) and choice == value]
            if not matches:
                raise self._fault(value, where)
            return matches[0]
        if kind == "flag":
            if not isinstance(value, bool):
                raise self._fault(value, where)
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._fault(value, where)
        below = value <= self.low if self.low_open else value < self.low
        if below or value > self.high:
            raise self._fault(value, where)
        return float(value)

    def _fault(self, value: object, where: str) -> InputError:
        return InputError(
            f"'{self.name}' is {value!r}, expected {self.expected}", where=where, remedy=f"Correct '{self.name}'."
        )

    def check_all(self, value: object, count: int, where: str) -> Value | tuple[Value, ...]:
        """Check what was given for `count` models: a scalar serves every model, a sequence has one value per model."""
        many = isinstance(value, Sequence) and not isinstance(value, str)
        if not self.per_model:
            return self.check(value, where)
        if not many:
            return (self.check(value, where),) * count
        assert isinstance(value, Sequence)
        if len(value) != count:
            raise InputError(
                f"'{self.name}' has {len(value)} values for {count} models besides the base",
                where=where,
                remedy="Give one value per model, or a single value for all.",
            )
        return tuple(self.check(item, where) for item in value)


@dataclass
class TensorContext:
    """What a method may know beside the tensors: which one it merges, the seed, and where its notes go.

    Attributes:
        name: the tensor's name; together with `seed` it fixes every random mask.
        seed: the recipe's seed.
        notes: lines of the merge report, for example `{"fallback": "linear: cos 0.99997 > 0.9995"}`.
        base_label: what errors call the base.
        model_labels: what errors call the models, in order; a model without one is called by its position.
        cutoffs: one whole-model trimming threshold per model, for `trim_scope: model` (see `ties.model_cutoffs`).
        layer: the layer that the tensor counts as, from 0: embeddings as the first, the final norm and the head as the
            last. None when that is unknown.
        num_layers: how many layers there are; None when that is unknown.
        statistics: for a method with a `file` parameter, what each model's file holds for this tensor; None for a model
            whose file has nothing on it.
        offset: index, in the flattened tensor, of the first element that an elementwise function was given.
        memories: for each model, what earlier merges of this very tensor of it and of the base have found out about the
            two (see `remembered`); empty where nothing is kept.
    """

    name: str
    seed: int = 0
    notes: dict[str, Value] = field(default_factory=dict)
    base_label: str = "the base"
    model_labels: tuple[str, ...] = ()
    cutoffs: tuple[Cutoff | None, ...] | None = None
    layer: int | None = None
    num_layers: int | None = None
    statistics: tuple[Tensor | None, ...] = ()
    offset: int = 0
    memories: tuple[MutableMapping[Hashable, Any], ...] = ()

    def remembered(self, position: int, fact: Hashable, find: Callable[[], Found]) -> Found:
        """Return what `find` finds out about the base and the model at `position`, which `fact` names completely."""
        if not self.memories:
            return find()
        memory = self.memories[position]
        if fact not in memory:
            if len(memory) >= _FACTS_KEPT:
                memory.pop(next(iter(memory)))
            memory[fact] = find()
        found: Found = memory[fact]
        return found

    def label(self, source: Source) -> str:
        """Name an input for an error."""
        if source == "base":
            return self.base_label
        return self.model_labels[source] if source < len(self.model_labels) else f"model {source + 1}"


@dataclass(frozen=True)
class Method:
    """A registered method: the function and everything that a recipe, `explain` and the documentation need of it.

    Attributes:
        base: whether θ₀ is needed ("required"), used when given ("optional") or never used ("unused").
        min_models: fewest models besides the base.
        max_models: most models besides the base (None: any number).
        reference: where the formula comes from.
        random: whether the result depends on the seed.
        dead_knobs: `(values, number of models) -> sentences`, each naming a parameter that cannot change the result.
            The values may be incomplete; defaults are filled in first.
        elementwise: the function may be given any run of elements (1-d, `context.offset` says where it starts).
        whole_rows: every such run holds whole rows (see `pieces.Operands.row_elements`).
        measure: `(operands, values, context) -> Any`, the numbers of the whole tensor that an elementwise function
            needs; they reach it as the keyword `measured`.
        check: `(complete values, where) -> None`, raises InputError for values that are allowed, but not together.
        copy_of: `(complete values, number of models, base given) -> Source | None`: the input that the result is, bit
            for bit, or None. This is what makes end points exact and free.
        placed: `(complete values, context) -> values`, what the values come to at the tensor's place in the model; all
            of the above but `dead_knobs` and `check` see only these.
        kernel: `(operands, **what the function gets) -> Fused`: what an elementwise function does, for the compiled
            loops (see `fused`). They give the function's bits; the function runs where they cannot.
    """

    name: str
    function: Callable[..., Tensor]
    parameters: tuple[Parameter, ...]
    base: Literal["required", "optional", "unused"]
    min_models: int
    max_models: int | None
    reference: str
    random: bool = False
    dead_knobs: Callable[[dict[str, object], int], list[str]] | None = None
    elementwise: bool = False
    whole_rows: bool = False
    measure: Callable[..., Any] | None = None
    check: Callable[[Values, str], None] | None = None
    copy_of: Callable[[Values, int, bool], Source | None] | None = None
    placed: Callable[[Values, TensorContext], Values] | None = None
    kernel: Callable[..., Fused] | None = None

    def parameter(self, name: str) -> Parameter | None:
        """Return the declared parameter of that name, or None."""
        return next((parameter for parameter in self.parameters if parameter.name == name), None)

    @property
    def share(self) -> Parameter | None:
        """The parameter that says how far the result goes from the base (0) to a model (1), or None.

        It is `weight`, or the `t` of interpolations; not the `t` of `nearswap`, which is a distance.
        """
        t = self.parameter("t")
        return self.parameter("weight") or (t if t is not None and t.high == 1 else None)

    def complete(self, values: Mapping[str, object], count: int, where: str) -> Values:
        """Check `values` for `count` models and fill in the defaults.

        Returns:
            Every declared parameter: a tuple of `count` values when it is per model, else one value.

        Raises:
            InputError: a name is unknown, a value is missing or out of range, or values do not go together; `where`
                says where they stood.
        """
        known = tuple(parameter.name for parameter in self.parameters)
        for name in values:
            if name not in known:
                raise InputError(
                    f"the method '{self.name}' has no parameter '{name}'.{nearest(name, known)}",
                    where=where,
                    remedy=f"Use its parameters: {', '.join(known) or 'none'}.",
                )
        complete: Values = {}
        for parameter in self.parameters:
            value = values.get(parameter.name, parameter.default)
            if value is None:
                raise InputError(
                    f"the method '{self.name}' needs a value for '{parameter.name}' ({parameter.meaning})",
                    where=where,
                    remedy=f"Give '{parameter.name}': {parameter.expected}.",
                )
            complete[parameter.name] = parameter.check_all(value, count, where)
        if self.check is not None:
            self.check(complete, where)
        return complete
