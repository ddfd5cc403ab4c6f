"""The contract of a merge method: a pure function of tensors, and the declaration beside it.

A method's function gets the float32 tensors of one parameter (same shape) and returns the merged float32 tensor:

    function(base, models, *, <parameters>, context) -> Tensor

`base` is θ₀, `models` are θ₁…θₙ (never the base). A per-model parameter arrives as a tuple with one value per model, a
global one as a single value. `context` names the tensor and carries the seed (random masks are a function of seed,
tensor name and element index only) and collects what the merge report has to say. A function never modifies an input,
reads no file and knows no recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Value = float | bool | str


@dataclass(frozen=True)
class Parameter:
    """One knob of a method: its default (None: must be given), range and meaning."""

    name: str
    default: Value | None
    meaning: str
    per_model: bool = False
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    choices: tuple[str, ...] = ()

    @property
    def kind(self) -> Literal["number", "flag", "choice"]:
        if self.choices:
            return "choice"
        return "flag" if isinstance(self.default, bool) else "number"


@dataclass
class TensorContext:
    """What a method may know beside the tensors: which one it merges, the seed, and where its notes go.

    `notes` become lines of the merge report, for example `{"fallback": "linear: cos 0.99997 > 0.9995"}`.
    """

    name: str
    seed: int = 0
    notes: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A registered method: the function and everything that a recipe, `explain` and the documentation need of it.

    `min_models` and `max_models` count the models besides the base. `base` says whether θ₀ is needed ("required"),
    used when given ("optional") or never used ("unused").
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

    def parameter(self, name: str) -> Parameter | None:
        return next((parameter for parameter in self.parameters if parameter.name == name), None)
