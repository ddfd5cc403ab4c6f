"""How fast a live model becomes another merge: against copying memory, against mergekit, and against the disk.

    python benchmarks/resident_speed.py                              random weights in the shape of SmolLM2-135M
    python benchmarks/resident_speed.py --base BASE --dapt D1 D2     real ones, converted to bfloat16
    python benchmarks/resident_speed.py --rounds 5 --slow-rounds 1   a quick look

Timed, in this process and after a warm-up: `ResidentMerger.apply` of a recipe with a weight that it has not seen, its
report included. The floor is copying the base and the task vectors' models once, with all threads. Beside it
`mergekit.merge_methods.api.merge_state_dicts` on the same tensors, and three ways over the disk, each followed by
`from_pretrained` in this process: our own merge as a function, our own as a command (`dapt-merge merge`) and mergekit's
(`mergekit-yaml`), start-up included: what a search that merges by commands does for every trial. The first time is
that of a new merger, which has yet to select and to hash its inputs. Everything is run in turn; the slow ones, mergekit
and the disk, in fewer rounds. Medians are told. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from merge_speed import beside, machine, versions
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dapt_merge import make_recipe, open_checkpoint
from dapt_merge.atomic import write_text
from dapt_merge.merging import plan_merge
from dapt_merge.merging.resident import ResidentMerger
from dapt_merge.merging.stream import merge_to_disk
from dapt_merge.recipe import Recipe

RESULTS = Path(__file__).resolve().parent / "resident_speed"
SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
BASE_RMS, DELTA_RMS = 0.02, 0.001
OVER_THE_DISK = {
    "disk": "`merge_to_disk`, a function",
    "command": "`dapt-merge merge`, a process",
    "mergekit command": "`mergekit-yaml`, a process",
}

State = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A row of the table: a method on so many task vectors, and what it must hold to."""

    method: str
    task_vectors: int
    settings: tuple[tuple[str, float], ...] = ()
    at_most_times_floor: float | None = None
    at_most_times_floor_first: float | None = None
    at_least_times_faster: float | None = None
    disk: bool = False

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"{self.method}, base + {self.task_vectors}"


CASES = (
    Case("linear", 1, (), 2, None, 10, disk=True),
    Case("task_arithmetic", 1),
    Case("slerp", 1, (), 2, None, 5),
    Case("dare_linear", 1, (("density", 0.5),), 5, 20, 15),
    Case("ties", 1, (("density", 0.3),), 5, 20, 50, disk=True),
    Case("ties", 2, (("density", 0.3),), 5, 20, 50),
    Case("dare_ties", 2, (("density", 0.5),), 5, 20),
    Case("breadcrumbs", 2, (("density", 0.3), ("gamma", 0.01))),
    Case("della", 2, (("density", 0.5), ("epsilon", 0.15))),
)


class Bench:
    """Models in memory and in folders, and everything that is timed on them."""

    def __init__(self, folders: list[Path], states: list[State], work: Path, threads: int) -> None:
        self.folders, self.states, self.work, self.threads = folders, states, work, threads
        self.labels = [str(folder) for folder in folders]
        self.checkpoints = {label: open_checkpoint(label) for label in self.labels}
        self.model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.bfloat16)
        self.merger = ResidentMerger(self.model, self.checkpoints)
        self._copies = [{name: torch.empty_like(tensor) for name, tensor in state.items()} for state in states]
        self._seen = 0

    def weight(self) -> float:
        """Return a weight that no recipe had yet: what a search proposes."""
        self._seen += 1
        return 0.3 + 0.4 * (self._seen * 0.6180339887 % 1)

    def recipe(self, case: Case) -> Recipe:
        weight: Any = self.weight()
        return make_recipe(
            self.labels[0],
            self.labels[1 : 1 + case.task_vectors],
            case.method,
            weight=weight,
            **dict(case.settings),
        )

    def floor(self, case: Case) -> None:
        torch.set_num_threads(self.threads)
        for state, copies in zip(self.states[: case.task_vectors + 1], self._copies, strict=False):
            for name, tensor in state.items():
                copies[name].copy_(tensor)

    def again(self, case: Case) -> Callable[[], object]:
        recipe = self.recipe(case)
        return lambda: self.merger.apply(recipe, threads=self.threads)

    def first(self, case: Case) -> Callable[[], object]:
        checkpoints = {label: open_checkpoint(label) for label in self.labels[: case.task_vectors + 1]}
        merger, recipe = ResidentMerger(self.model, checkpoints), self.recipe(case)
        return lambda: merger.apply(recipe, threads=self.threads)

    def disk(self, case: Case) -> Callable[[], object]:
        recipe, out = self.recipe(case), self.work / "out"

        def merge_and_load() -> None:
            merge_to_disk(plan_merge(recipe, self.checkpoints), out, overwrite=True, threads=self.threads)
            AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)

        return merge_and_load

    def command(self, case: Case) -> Callable[[], object]:
        path = self.work / "recipe.yaml"
        path.write_text(self.recipe(case).to_yaml(), encoding="utf-8")
        threads = ["--threads", str(self.threads)]
        return self._run_and_load([str(beside("dapt-merge")), "merge", str(path), *threads, "-o"])

    def mergekit_command(self, case: Case) -> Callable[[], object] | None:
        program = beside("mergekit-yaml")
        if not program.is_file():
            return None
        weight = self.weight()
        base, model = self.labels[:2]  # the cases over the disk have one task vector
        weights = {base: 1 - weight, model: weight} if case.method == "linear" else {model: weight}
        content: dict[str, Any] = {
            "merge_method": case.method,
            "models": [
                {"model": label, "parameters": {"weight": share, **dict(case.settings)}}
                for label, share in weights.items()
            ],
            "dtype": "bfloat16",
        }
        if case.method != "linear":
            content["base_model"] = base
        path = self.work / "mergekit.yaml"
        path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
        return self._run_and_load([str(program), str(path)], "--no-copy-tokenizer")

    def _run_and_load(self, command: list[str], *flags: str) -> Callable[[], object]:
        """Return what runs a command that writes a folder, and loads that."""
        out = self.work / "by-command"
        shutil.rmtree(out, ignore_errors=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        environment.pop("OMP_NUM_THREADS", None)

        def run_and_load() -> None:
            subprocess.run([*command, str(out), *flags], env=environment, capture_output=True, check=True)
            AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)

        return run_and_load

    def mergekit(self, case: Case) -> Callable[[], object] | None:
        try:
            from mergekit.merge_methods.api import merge_state_dicts
        except ImportError:
            return None
        models = dict(enumerate(self.states[: case.task_vectors + 1]))
        weight = self.weight()
        parameters: dict[str, Any] = (
            {"t": weight} if case.method == "slerp" else {"weight": weight, **dict(case.settings)}
        )
        base: int | None = 0
        if case.method == "linear":
            base, parameters["weight"] = None, [1 - weight, weight]

        def merge() -> None:
            torch.set_num_threads(self.threads)
            with torch.no_grad():
                merge_state_dicts(models, case.method, parameters=parameters, base=base)

        return merge


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(bench: Bench, rounds: int, slow_rounds: int) -> dict[str, dict[str, list[float]]]:
    """Run everything in turn; return case → what was timed → seconds of each round."""
    seconds: dict[str, dict[str, list[float]]] = {case.name: {} for case in CASES}
    for case in CASES:
        bench.again(case)()
        bench.floor(case)

    def note(case: Case, kind: str, work: Callable[[], object] | None) -> None:
        if work is not None:
            seconds[case.name].setdefault(kind, []).append(timed(work))

    for number in range(rounds):
        for case in CASES:
            note(case, "floor", lambda case=case: bench.floor(case))  # type: ignore[misc]
            note(case, "again", bench.again(case))
            if number < slow_rounds:
                note(case, "first", bench.first(case))
                note(case, "mergekit", bench.mergekit(case))
                if case.disk:
                    note(case, "disk", bench.disk(case))
                    note(case, "command", bench.command(case))
                    note(case, "mergekit command", bench.mergekit_command(case))
    return seconds


def summary(case: Case, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    row: dict[str, Any] = {"method": case.method, "task_vectors": case.task_vectors, "median_seconds": medians}
    row["times_floor"] = medians["again"] / medians["floor"]
    row["at_most_times_floor"] = case.at_most_times_floor
    row["at_least_times_faster"] = case.at_least_times_faster
    if "first" in medians:
        row["first_times_floor"] = medians["first"] / medians["floor"]
        row["at_most_times_floor_first"] = case.at_most_times_floor_first
    for kind in ("mergekit", *OVER_THE_DISK):
        if kind in medians:
            row[f"times_faster_than_{kind.replace(' ', '_')}"] = medians[kind] / medians["again"]
    return row


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| method | task vectors | floor | again | × floor | first | × floor | mergekit | × faster |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        seconds = row["median_seconds"]
        cells = [
            row["method"],
            str(row["task_vectors"]),
            _ms(seconds["floor"]),
            _ms(seconds["again"]),
            _held(row["times_floor"], row["at_most_times_floor"], "≤"),
            _ms(seconds.get("first")),
            _held(row.get("first_times_floor"), row.get("at_most_times_floor_first"), "≤"),
            _ms(seconds.get("mergekit")),
            _held(row.get("times_faster_than_mergekit"), row["at_least_times_faster"], "≥"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table_over_the_disk(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| method | task vectors | merged to a folder by | with `from_pretrained` | again | × faster |",
        "|---|--:|---|--:|--:|--:|",
    ]
    for row in rows:
        seconds = row["median_seconds"]
        for kind, way in OVER_THE_DISK.items():
            if kind not in seconds:
                continue
            faster = row[f"times_faster_than_{kind.replace(' ', '_')}"]
            cells = [row["method"], str(row["task_vectors"]), way, _ms(seconds[kind]), _ms(seconds["again"])]
            lines.append("| " + " | ".join([*cells, _held(faster, 30, "≥")]) + " |")
    return lines


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:.0f} ms"


def _held(value: float | None, bound: float | None, sign: str) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if bound is None else f"{value:.1f} ({sign} {bound:g})"


def random_models(work: Path, count: int) -> list[Path]:
    """Write a base and models near it, in the shape of SmolLM2-135M."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M))
    folders = [work / "base", *(work / f"dapt-{number}" for number in range(1, count + 1))]
    with torch.no_grad():
        base = {name: torch.randn_like(value) * BASE_RMS for name, value in model.named_parameters()}
        for folder in folders:
            for name, value in model.named_parameters():
                step = 0.0 if folder == folders[0] else torch.randn_like(value) * DELTA_RMS
                value.copy_(base[name] + step)
            _save(model, folder)
    return folders


def _save(model: Any, folder: Path) -> None:
    half = type(model)(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(folder)


def converted(sources: list[Path], work: Path) -> list[Path]:
    """Write the given models in bfloat16."""
    folders = [work / f"model-{number}" for number in range(len(sources))]
    for source, folder in zip(sources, folders, strict=True):
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, help="a model folder (default: random weights)")
    parser.add_argument("--dapt", type=Path, nargs=2, help="two checkpoints of it")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--slow-rounds", type=int, default=5, help="of mergekit, of the disk and of first times")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if (arguments.base is None) != (arguments.dapt is None):
        parser.error("--base and --dapt go together")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        given = arguments.base is not None
        folders = converted([arguments.base, *arguments.dapt], work) if given else random_models(work, 2)
        checkpoints = [open_checkpoint(each) for each in folders]
        states = [{name: each.read(name).clone() for name in each.tensors} for each in checkpoints]
        bench = Bench(folders, states, work, arguments.threads)
        seconds = measure(bench, arguments.rounds, arguments.slow_rounds)
    rows = [summary(case, seconds[case.name]) for case in CASES]
    elements = sum(tensor.numel() for tensor in states[0].values())
    found = {
        "model": "as given, in bfloat16" if given else "random weights in the shape of SmolLM2-135M, bfloat16",
        "elements": elements,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "slow_rounds": arguments.slow_rounds,
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
        "seconds": seconds,
    }
    heading = [
        "# Merging into a live model",
        "",
        f"{elements / 1e6:.0f}M parameters, {found['model']}; {arguments.threads} threads on "
        f"{found['machine']['processor']}; medians of {arguments.rounds} rounds "
        f"({arguments.slow_rounds} of first times, mergekit and the disk), run in turn. In brackets what is aimed at.",
        "",
    ]
    notes = [
        "",
        "floor: base and models copied once with all threads. again: `ResidentMerger.apply` with a new weight, report "
        "included. first: a new merger, which selects and hashes its inputs. mergekit: `merge_state_dicts` on the same "
        "tensors.",
        "",
        "## Instead of the disk",
        "",
        "What a search would do for every trial: merge to a folder, then load it with `from_pretrained`.",
        "",
        *table_over_the_disk(rows),
        "",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in found["versions"].items()) + ".",
    ]
    text = "\n".join([*heading, *table(rows), *notes]) + "\n"
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out / "results.md", text)
    write_text(arguments.out / "results.json", json.dumps(found, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
