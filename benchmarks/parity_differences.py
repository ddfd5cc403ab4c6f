"""Where the two engines part on purpose, or where mergekit cannot run: each seen happening, none taken on trust.

Every function here runs both and returns one line of the table; `holds` says that both still behave as written, so that
a new mergekit that behaves otherwise is noticed. The reasons stand in the methods' docstrings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from parity_cases import SIZES
from torch import Tensor


@dataclass(frozen=True)
class Line:
    """One difference: the method, the situation, what each engine does there, and whether both were seen to do it."""

    method: str
    situation: str
    ours: str
    mergekit: str
    holds: bool


@dataclass(frozen=True)
class Situation:
    """A tensor of a few elements on which the engines part.

    Attributes:
        base: None for a method without one.
        ours, mergekit: what they give: the numbers, words of the error, or None for anything finite.
    """

    method: str
    what: str
    base: Sequence[float] | Tensor | None
    models: Sequence[Sequence[float] | Tensor]
    values: dict[str, Any]
    ours: Sequence[float] | str | None
    mergekit: Sequence[float] | str | None

    def line(self) -> Line:
        """Run both engines, and say whether they give what is written."""
        base = None if self.base is None else torch.as_tensor(self.base)
        models = [torch.as_tensor(model) for model in self.models]
        own, other = ours(self.method, base, models, self.values), theirs(self.method, base, models, self.values)
        holds = _is(own, self.ours) and _is(other, self.mergekit)
        return Line(self.method, self.what, _in_words(own), _in_words(other), holds)


def ours(name: str, base: Tensor | None, models: Sequence[Tensor], values: dict[str, Any]) -> Tensor | str:
    """Return our result, or the first line of the error."""
    from dapt_merge.errors import DaptMergeError
    from dapt_merge.methods.apply import combine
    from dapt_merge.methods.contract import TensorContext
    from dapt_merge.methods.registry import get_method

    try:
        return combine(get_method(name), base, models, values, TensorContext("w"))
    except DaptMergeError as error:
        return str(error).splitlines()[0]


def theirs(name: str, base: Tensor | None, models: Sequence[Tensor], values: dict[str, Any]) -> Tensor | str:
    """Return mergekit's result, or the kind of its error."""
    from mergekit.merge_methods.api import merge_tensors

    tensors, start = ([*models], 0) if base is None else ([base, *models], 1)
    given = dict(values)
    for key in {"weight", "density", "gamma", "epsilon"}.intersection(values):
        each = values[key] if isinstance(values[key], list) else [values[key]] * len(models)
        given[key] = each if name == "linear" else dict(enumerate(map(float, each), start=start))
    position = None if base is None else 0
    try:
        return merge_tensors(tensors, name, parameters=given, ids=list(range(len(tensors))), base_index=position)
    except Exception as error:  # its errors are of many kinds; which one is what is shown
        return type(error).__name__


def _is(result: Tensor | str, expected: Sequence[float] | str | None) -> bool:
    if isinstance(result, str) or isinstance(expected, str):
        return isinstance(result, str) and isinstance(expected, str) and expected in result
    if expected is None:
        return bool(torch.isfinite(result).all())
    numbers = torch.tensor(list(expected), dtype=torch.float64)
    return torch.allclose(result.flatten().double(), numbers, rtol=1e-5, atol=0, equal_nan=True)


def _in_words(result: Tensor | str) -> str:
    if isinstance(result, str):
        return result
    return " ".join(f"{value:.4g}" for value in result.flatten().tolist()) or "an empty tensor"


_ZERO, _ONE, _AT_22_DEGREES = [0.0] * 4, [1.0] * 4, [math.sin(math.pi / 8)] * 4
_BAND, _ONE_ELEMENT = {"density": 1.0, "gamma": 0.25}, {"density": 0.2, "gamma": 0.0}
_HALF = {"weight": 1, "density": 0.5}
_COLUMN = torch.tensor([[0.1], [0.2], [-0.3]])
_SMALL = [[3e-4, 4e-4], [4e-4, 3e-4]]
SITUATIONS = [
    Situation("della", "a matrix of one column, density 0.5", _COLUMN, [2 * _COLUMN], _HALF, None, "RuntimeError"),
    Situation("della", "a single number, density 0.5", torch.tensor(0.1), [0.4], _HALF, None, "IndexError"),
    Situation("della", "an empty tensor, density 0.5", torch.zeros(3, 0), [torch.zeros(3, 0)], _HALF, (), "IndexError"),
    Situation("della_linear", "density 0.8 with ε 0.2: probabilities up to 1", _ZERO, [_ONE],
              {"weight": 1, "density": 0.8, "epsilon": 0.2}, None, "ValueError"),
    Situation("arcee_fusion", "an empty tensor", torch.zeros(0, 3), [torch.zeros(0, 3)], {}, (), "IndexError"),
    Situation("linear", "weights 1 and −1", None, [_ZERO, _ONE], {"weight": [1, -1]}, "add to 0", [-math.inf] * 4),
    Situation("multislerp", "weights 1 and −1", None, [_ONE, [2.0] * 4], {"weight": [1, -1]}, "add to 0",
              [math.nan] * 4),
    Situation("ties", "NaN in an input; every method alike", _ZERO, [[math.nan, 1, 1, 1]], {"weight": 1}, "holds NaN",
              [math.nan, 1, 1, 1]),
    Situation("slerp", "a quarter of the way from a zero vector to ones", _ZERO, [_ONE], {"t": 0.25}, [0.25] * 4,
              _AT_22_DEGREES),
    Situation("nuslerp", "a quarter of the way from a zero vector to ones", None, [_ZERO, _ONE],
              {"weight": [0.75, 0.25]}, [0.25] * 4, _AT_22_DEGREES),
    Situation("karcher", "1e-6 and 3e-6, shorter than tol", None, [[1e-6] * 4, [3e-6] * 4], {}, [2e-6] * 4, _ZERO),
    Situation("breadcrumbs", "δ = 1 2 3 100, density 1, gamma 0.25", _ZERO, [[1.0, 2.0, 3.0, 100.0]],
              {"weight": 1, **_BAND}, [1, 2, 3, 0], [1, 2, 3, 100]),
    Situation("breadcrumbs", "δ = 1 2 3 100, density 0.2, gamma 0: ⌊0.2·4⌋ = 0", _ZERO, [[1.0, 2.0, 3.0, 100.0]],
              {"weight": 1, **_ONE_ELEMENT}, [0, 0, 0, 100], _ZERO),
    Situation("model_stock", "one DAPT checkpoint", _ZERO, [_ONE], {}, "expected at least 2", "ValueError"),
    # cos −0.4 and t = −0.8/0.6: away from both models
    Situation("model_stock", "δ = (1, 0) and (−4, √84): cos −0.4, t < 0", [0.0, 0.0], [[1.0, 0.0], [-4.0, 84**0.5]],
              {}, [0, 0], [2, -2 / 3 * 84**0.5]),
    # cos 24/25, t = 1.92/1.96 of the mean 3.5e-4; mergekit divides the product 2.4e-7 by 1e-6: cos 0.24
    Situation("model_stock", "δ = 1e-4·(3, 4) and 1e-4·(4, 3): cos 0.96", [0.0, 0.0], _SMALL, {},
              [3.5e-4 * 1.92 / 1.96] * 2, [3.5e-4 * 0.48 / 1.24] * 2),
    Situation("sce", "δ = 1e-4·(4, −1) and 1e-4·(2, 3): weights 17/30 and 13/30", [0.0, 0.0],
              [[4e-4, -1e-4], [2e-4, 3e-4]], {}, [94e-4 / 30, 3e-4], [3e-4, 3e-4]),
    Situation("sce", "one position differs, select_topk 0.5: ⌊0.5·1⌋ = 0", [0.0, 0.0], [[1.0, 2.0], [1.0, 4.0]],
              {"select_topk": 0.5}, [0, 3.6], [0, 0]),
    Situation("ties", "one task vector (1, 2), weight 0.3, defaults", [0.0, 0.0], [[1.0, 2.0]], {"weight": 0.3},
              [0.3, 0.6], [1, 2]),
]  # fmt: skip


def rescaled_drops() -> Line:
    """Return what DARE multiplies kept elements with: 1/density in the paper, the ratio of L1 norms in mergekit."""
    delta = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)  # theirs draws from the global generator: with seed 0 it would repeat the numbers of delta
    factors = []
    for engine in (ours, theirs):
        result = engine("dare_linear", torch.zeros(64, 64), [delta], {"weight": 1, "density": 0.002})
        assert not isinstance(result, str)
        factors.append(float((result / delta)[result != 0].mean()))
    seen = abs(factors[0] - 500) < 0.1 and abs(factors[1] - 500) > 20
    what = "64×64, density 0.002: factor of what is kept, default rescale"
    return Line("dare_linear", what, f"{factors[0]:.0f}", f"{factors[1]:.0f}", seen)


def fusion_in_small_steps() -> list[Line]:
    """Return, for shrinking task vectors, the share of elements that float32 divergences put on the wrong side."""
    lines = []
    for step in (1e-2, 1e-3, 1e-4):
        generator = torch.Generator().manual_seed(0)
        base = 0.02 * torch.randn(256, 256, generator=generator)
        model = base + step * torch.randn(256, 256, generator=generator)
        exact = _outliers(base.double(), model.double())
        wrong = []
        for engine in (ours, theirs):
            result = engine("arcee_fusion", base, [model], {})
            assert not isinstance(result, str)
            wrong.append(float(((result != base) != exact).double().mean()))
        situation = f"256×256, weights of rms 0.02, δ of rms {step:g}: share on the wrong side"
        lines.append(Line("arcee_fusion", situation, f"{wrong[0]:.2g}", f"{wrong[1]:.2g}", wrong[0] <= wrong[1] / 10))
    return lines


def _outliers(base: Tensor, model: Tensor) -> Tensor:
    p, q = (torch.softmax(tensor, dim=1) + 1e-8 for tensor in (model, base))
    importance = (model - base).abs() * (p * (p / q).log()).sum(dim=1, keepdim=True)
    ascending = importance.flatten().sort().values
    lower, median, upper = (ascending[int(share * (len(ascending) - 1))] for share in (0.25, 0.5, 0.75))
    return importance >= median + 1.5 * (upper - lower)


# transformers class and configuration → what mergekit does with it: its error, or how many tensors it leaves out
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str | int]] = {
    "BertForSequenceClassification": ("BertConfig", {}, 0),
    "CamembertForMaskedLM": ("CamembertConfig", {}, 0),
    "Qwen2ForCausalLM": ("Qwen2Config", {"tie_word_embeddings": True}, 0),
    "BertModel": ("BertConfig", {}, "TypeError"),
    "BertForMaskedLM": ("BertConfig", {}, "Tensor bert.pooler.dense.weight required"),
    "BertForPreTraining": ("BertConfig", {}, 4),
    "T5ForConditionalGeneration": (
        "T5Config", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        "Tensor decoder.block.0.layer.2.DenseReluDense.wi_0.weight required",
    ),
}  # fmt: skip


def architecture(name: str, folder: Path) -> Line:
    """Return what each engine makes of a whole model of that class, as its library saves it."""
    import transformers as hf

    from dapt_merge import load_recipe, open_checkpoint
    from dapt_merge.errors import DaptMergeError
    from dapt_merge.merging import merge_to_disk, plan_merge
    from dapt_merge.merging.mergekit_engine import merge_with_mergekit

    config, keys, expected = ARCHITECTURES[name]
    common = {"vocab_size": 96} if "d_model" in keys else {**SIZES, "intermediate_size": 48}
    for seed, label in enumerate(("base", "one")):
        torch.manual_seed(seed)
        getattr(hf, name)(getattr(hf, config)(**{**common, **keys})).save_pretrained(folder / label)
    recipe = load_recipe(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(folder / "base"),
            "models": [{"model": str(folder / "one"), "parameters": {"weight": 0.5}}],
            "dtype": "float32",
        }
    )
    merge_to_disk(plan_merge(recipe), folder / "native")
    native, stored = (len(open_checkpoint(folder / label).tensors) for label in ("native", "base"))
    line = f"{native} of {stored} tensors"
    try:
        merge_with_mergekit(recipe, folder / "mergekit")
        kept = len(open_checkpoint(folder / "mergekit").tensors)
        return Line(name, "whole model", line, f"{kept} of {stored} tensors", stored - kept == expected)
    except DaptMergeError as error:
        reason = str(error).splitlines()[0].removeprefix("mergekit failed: ")
        return Line(name, "whole model", line, reason.split(" but ")[0], native == stored and str(expected) in reason)
