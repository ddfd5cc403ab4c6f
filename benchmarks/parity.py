"""The parity table: every method that mergekit shares, on whole models, by both engines, and how far apart they are.

    python benchmarks/parity.py            # prints the table; about 80 seconds on one core
    python benchmarks/parity.py --write    # and keeps it in benchmarks/parity/

A deterministic method is shown by its largest difference, in roundings of the largest magnitude that enters an element,
beside the number that is allowed (`parity_bounds` derives it). A random one is compared in distribution: the share of
elements that move, and the size of the move along its expectation, as standard errors from what the formula says.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from parity_bounds import bound
from parity_cases import ARITHMETIC, CASES, DRAWN, MODELS, NAMES, save_models
from parity_differences import ARCHITECTURES, SITUATIONS, Line, architecture, fusion_in_small_steps, rescaled_drops
from parity_draws import Draws, draws
from torch import Tensor

RESULTS = Path(__file__).parent / "parity"
Tensors = Mapping[str, Tensor]


class Workbench:
    """The models on disk, and what each engine made of a recipe; every merge is run once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = cache(lambda kind: save_models(kind, folder / "models"))
        self.stored = cache(self._stored)
        self.merged = cache(self._merged)

    def _stored(self, kind: str, dtype: str, name: str) -> Tensors:
        return _read(self.models(kind)[f"{dtype}/{name}"])

    def _merged(self, engine: str, kind: str, case: str, drawn: bool, arithmetic: str) -> Tensors:
        from dapt_merge.merging import merge_to_disk, plan_merge
        from dapt_merge.merging.mergekit_engine import merge_with_mergekit
        from dapt_merge.recipe import load_recipe

        how, table = ARITHMETIC[arithmetic], DRAWN if drawn else CASES
        content = table[case].recipe(self.models(kind), how.stored, how.keys)
        recipe = load_recipe({**content, "gradient_outer": "mergekit", "seed": 7})
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            out = Path(place) / "out"
            if engine == "native":
                merge_to_disk(plan_merge(recipe), out)
            else:
                merge_with_mergekit(recipe, out)
            return {name: tensor.clone() for name, tensor in _read(out).items()}

    def pair(self, kind: str, case: str, drawn: bool, arithmetic: str) -> tuple[Tensors, Tensors]:
        """Return what we and what mergekit make of one recipe."""
        # In float32 whatever the recipe's dtype: ours is one and the same merge.
        native = "bfloat16" if arithmetic.startswith("bfloat16") else arithmetic
        return (
            self.merged("native", kind, case, drawn, native),
            self.merged("mergekit", kind, case, drawn, arithmetic),
        )


def _read(folder: Path) -> Tensors:
    from dapt_merge import open_checkpoint

    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@dataclass(frozen=True)
class Difference:
    """How far two whole models are apart.

    Attributes:
        roundings: the largest difference of a decided element, in units of rounding of its largest operand.
        allowed: the most that is allowed there, in the same units.
        outside: how many elements differ by more than is allowed.
        undecided: the share of elements that rounding decides.
        equal: the share of elements that are bit for bit alike.
        widened: how many tensors mergekit wrote in another dtype than the recipe's.
    """

    roundings: float
    allowed: float
    outside: int
    undecided: float
    equal: float
    widened: int


def difference(bench: Workbench, kind: str, case: str, arithmetic: str) -> Difference:
    """Compare the two engines' whole models for one deterministic case.

    Raises:
        ValueError: the two models have not the same tensors.
    """
    ours, theirs = bench.pair(kind, case, False, arithmetic)
    if _shapes(ours) != _shapes(theirs):
        raise ValueError(f"{kind}, {case}: the models have not the same tensors")
    declared, how = CASES[case], ARITHMETIC[arithmetic]
    inputs = [bench.stored(kind, how.stored, name) for name in NAMES[: 1 + declared.count]]
    worst = allowed = 0.0
    outside = undecided = equal = elements = 0
    for name in ours:
        base, *models = (tensors[name].double() for tensors in inputs)
        limits = bound(declared, how, base, models, ours[name].double())
        apart = (ours[name].double() - theirs[name].double()).abs()
        outside += int((apart > limits.allowed).sum())
        undecided += int(limits.undecided.sum())
        equal += int((apart == 0).sum())
        elements += apart.numel()
        decided = torch.where(limits.undecided, 0.0, apart / limits.scale).flatten()
        place = int(decided.argmax())
        if float(decided[place]) > worst or not allowed:
            worst, allowed = float(decided[place]), float((limits.allowed / limits.scale).flatten()[place])
    widened = sum(theirs[name].dtype != tensor.dtype for name, tensor in ours.items())
    return Difference(worst, allowed, outside, undecided / elements, equal / elements, widened)


def drawn(bench: Workbench, kind: str, case: str, arithmetic: str) -> tuple[Draws, Draws]:
    """Compare a random method of both engines, ours first, with the formula's expectation."""
    declared, how = DRAWN[case], ARITHMETIC[arithmetic]
    inputs = [bench.stored(kind, how.stored, name) for name in NAMES[: 1 + declared.count]]
    dtype = torch.float32 if arithmetic == "float32" else torch.bfloat16
    ours, theirs = bench.pair(kind, case, True, arithmetic)
    return draws(declared, inputs, ours, dtype), draws(declared, inputs, theirs, dtype)


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def differences(folder: Path) -> list[Line]:
    """Return every line of the last table."""
    lines = [situation.line() for situation in SITUATIONS]
    return [*lines, rescaled_drops(), *fusion_in_small_steps(), *(architecture(n, folder / n) for n in ARCHITECTURES)]


def table(bench: Workbench) -> Iterator[str]:
    """Yield the page as Markdown, line by line, while it is measured."""
    yield from _heading()
    for arithmetic, explanation in EXPLANATIONS.items():
        yield from (f"## {arithmetic}", explanation, "")
        yield from _row(["method", *MODELS])
        yield from _row(["---"] * (1 + len(MODELS)))
        for case in CASES:
            yield from _row([case, *(_cell(difference(bench, kind, case, arithmetic), arithmetic) for kind in MODELS)])
        yield ""
    yield from ("## Drawn at random", DRAWN_EXPLAINED, "")
    yield from _row(["method", "arithmetic", *MODELS])
    yield from _row(["---"] * (2 + len(MODELS)))
    for case in DRAWN:
        for arithmetic in ARITHMETIC:
            yield from _row(
                [case, arithmetic, *(_draws_cell(*drawn(bench, kind, case, arithmetic)) for kind in MODELS)]
            )
    yield from ("", "## Where the engines part", PARTING, "")
    yield from _row(["method or model", "situation", "dapt-merge", "mergekit"])
    yield from _row(["---"] * 4)
    for line in differences(bench.folder):
        yield from _row([line.method, line.situation, line.ours, line.mergekit])


EXPLANATIONS = {
    "float32": (
        "`dtype: float32`. Largest difference of an element, in roundings of 2⁻²⁴ of the largest magnitude that enters "
        "it (M = max|θ| + Σ|δ|), *of* the number that is allowed there; then the share of elements that are equal in "
        "every bit. In brackets, where there are any: the share that rounding decides."
    ),
    "bfloat16 of float32": (
        "bfloat16 checkpoints, `dtype: float32`, `out_dtype: bfloat16`. The share of elements that are equal in every "
        "bit; all others are one step of bfloat16 apart, but for those in brackets, which rounding decides (bfloat16 "
        "inputs tie often, and mergekit gives ties to no index in particular; in sce they move the weights too)."
    ),
    "bfloat16": (
        "`dtype: bfloat16`: mergekit calculates in it (linear and slerp in float32), we do not. As the first table, in "
        "roundings of 2⁻⁸. † mergekit writes float32 although the recipe says bfloat16. arcee_fusion: the error of a "
        "divergence of bfloat16 softmaxes is larger than the divergence, so that rounding decides every element."
    ),
}
DRAWN_EXPLAINED = (
    "Density 0.5, two task vectors, L1 rescaling in both. The share of elements that move (ours, mergekit's), and the "
    "larger of two deviations from what the formula expects, in standard errors (ours, mergekit's): of that share, and "
    "of the sum of the moves along their expected directions. The same four outcomes are expected of both engines."
)
PARTING = "On purpose, or because mergekit cannot run. Each line was run while this page was made."


def _heading() -> list[str]:
    from importlib.metadata import version

    versions = ", ".join(f"{name} {version(name)}" for name in ("dapt-merge", "mergekit", "torch", "transformers"))
    kinds = "; ".join(f"*{kind}*: {what}" for kind, what in MODELS.items())
    return [
        "# Parity with mergekit",
        f"{versions}. One recipe in mergekit's dialect, two engines, whole models, every tensor compared. "
        "How much is allowed is derived in [parity_bounds.py](../parity_bounds.py), the recipes are in "
        "[parity_cases.py](../parity_cases.py); `python benchmarks/parity.py --write` makes this page again, and "
        "`tests/merging/test_parity.py` asserts it.",
        "",
        f"Tiny models with random weights, two task vectors of rms 0.01. {kinds}.",
        "",
    ]


def _row(cells: Sequence[str]) -> Iterator[str]:
    yield "| " + " | ".join(cells) + " |"


def _cell(found: Difference, arithmetic: str) -> str:
    undecided = f" [{_percent(found.undecided)}]" if found.undecided else ""
    if found.outside:
        return f"**{found.outside} outside**{undecided}"
    if ARITHMETIC[arithmetic].rounded:
        return _percent(found.equal) + undecided
    dagger = "†" if found.widened else ""
    return f"{found.roundings:.1f} of {found.allowed:.0f}, {_percent(found.equal)}{undecided}{dagger}"


def _percent(share: float) -> str:
    """Two digits, and never 0 or 100 for what is only near it."""
    return f"{share:.0%}" if share in (0, 1) else f"{min(max(share, 1e-4), 0.9999):.2%}"


def _draws_cell(own: Draws, other: Draws) -> str:
    worst = [max(draw.rate_error, draw.move_error, key=abs) for draw in (own, other)]
    return f"{own.rate:.3f} {other.rate:.3f}, {worst[0]:+.1f} {worst[1]:+.1f}"


def main() -> None:
    """Print the page; with --write, keep it too."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for line in table(Workbench(Path(folder))):
            print(line, flush=True)
            lines.append(line)
    if "--write" in sys.argv[1:]:
        from dapt_merge.atomic import write_text

        RESULTS.mkdir(exist_ok=True)
        write_text(RESULTS / "mergekit.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
