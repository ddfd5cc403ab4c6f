"""Does replay make DAPT forget less? One run with 25% replay against one without, at equal domain tokens.

    python benchmarks/replay.py --demo DEMO -o /tmp/replay          about ten minutes on two quiet cores
    python benchmarks/replay.py --demo DEMO -o /tmp/replay batch_tokens=1024 …   overrides for both runs

DEMO is the folder that `dapt-merge demo` wrote. The runs are `recipes/pretrain-baseline.yaml` and
`recipes/pretrain-baseline-replay-25.yaml` with one checkpoint and nothing measured on the way. Both are scored on the
demo's report items, which no run, search or preset was chosen by; differences are paired by item, with 95% bootstrap
intervals. Replay is general English of the kinds that are measured (web pages, news, encyclopedia), other documents.
Both runs go on after a kill. Results: benchmarks/replay/result.{json,md}, whatever they are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
PRESETS = {"without replay": "pretrain-baseline", "25% replay": "pretrain-baseline-replay-25"}
AXES = ("domain", "general")
METRIC = "bits_per_byte"


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one of the runs, and return what it read and where it ended."""
    from dapt_merge.pretraining import load_pretrain_config, pretrain

    settings = yaml.safe_load((HERE.parent / "recipes" / f"{PRESETS[name]}.yaml").read_text(encoding="utf-8"))
    for key in ("heldout", "heldout_documents"):
        settings.pop(key)
    settings |= {"base": str(options.base), "output": str(options.out / PRESETS[name]), "checkpoints": 1}
    files = {"domain": "domain-train.jsonl", "replay": "replay.jsonl"}
    for source in settings["corpus"]:
        source["path"] = str(options.demo / "corpora" / files[source["role"]])
    began = time.monotonic()
    overrides = [f"seed={options.seed}", *options.overrides]
    (folder,) = pretrain(load_pretrain_config(settings, overrides), on_note=lambda text: print(f"  {text}", flush=True))
    details = json.loads((folder / "dapt_checkpoint.json").read_text(encoding="utf-8"))
    kept = ("step", "domain_tokens", "replay_tokens", "loss", "relative_delta_norm", "precision")
    return {"folder": str(folder), "seconds": round(time.monotonic() - began), **{key: details[key] for key in kept}}


def suites(demo: Path) -> dict[str, Any]:
    """Load the demo's report suites of both axes."""
    from dapt_merge.evaluation import load_suite

    return {axis: load_suite(demo / "suites" / f"report-{axis}.yaml") for axis in AXES}


def compare(scores: dict[str, Any], tasks: dict[str, list[str]]) -> dict[str, Any]:
    """Return, for each axis: every model's bits per byte, its gain over the base, and what replay changes."""
    from dapt_merge.evaluation.statistics import gain, suite_score

    found: dict[str, Any] = {}
    for axis in AXES:
        models = {
            name: {"bits_per_byte": float(suite_score(records, tasks[axis], METRIC))}
            for name, records in scores.items()
        }
        for name in PRESETS:
            models[name]["gain"] = interval(gain(scores[name], scores["base"], tasks[axis], METRIC))
        plain, replayed = (scores[name] for name in PRESETS)
        found[axis] = {"models": models, "replay_gains": interval(gain(replayed, plain, tasks[axis], METRIC))}
        found[axis]["by_task"] = {task: interval(gain(replayed, plain, [task], METRIC)) for task in tasks[axis]}
    return found


def interval(value: Any) -> dict[str, float]:
    return {"estimate": value.estimate, "low": value.low, "high": value.high}


def shown(value: dict[str, float]) -> str:
    return f"{value['estimate']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]"


def verdict(general: dict[str, float], domain: dict[str, float]) -> list[str]:
    """Say in words what replay did, and what it cost."""
    if general["low"] > 0:
        first = f"With replay the model forgets less, beyond noise: {shown(general)} bits per byte on general text."
    elif general["high"] < 0:
        first = f"With replay the model forgets more, beyond noise: {shown(general)} bits per byte on general text."
    else:
        first = f"Whether replay makes a difference to general text cannot be told: {shown(general)} bits per byte."
    sign = "gains" if domain["low"] > 0 else "costs" if domain["high"] < 0 else "does not measurably change"
    return [first, f"On the domain it {sign}: {shown(domain)} bits per byte."]


def page(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    first, second = result["runs"].values()
    domain, general = (result["axes"][axis] for axis in AXES)
    lines = [
        "# DAPT with 25% replay against DAPT without",
        "",
        *verdict(general["replay_gains"], domain["replay_gains"]),
        "",
        f"SmolLM2-135M on the demo's French biomedical text; {first['domain_tokens']:,} domain tokens without replay,",
        f"{second['domain_tokens']:,} with, and {second['replay_tokens']:,} of replay on top; {first['step']} and "
        f"{second['step']} steps, seed {result['seed']}. Report items, 95% paired bootstrap",
        "intervals; a gain is positive when it is better.",
        "",
        "| | domain, bits/byte | gain over the base | general, bits/byte | gain over the base | ‖δ‖/‖θ₀‖ |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("base", *PRESETS):
        cells = [name]
        for axis in (domain, general):
            model = axis["models"][name]
            cells += [f"{model['bits_per_byte']:.4f}", shown(model["gain"]) if "gain" in model else ""]
        moved = result["runs"].get(name, {}).get("relative_delta_norm")
        lines.append(f"| {' | '.join([*cells, '' if moved is None else f'{100 * moved:.2f}%'])} |")
    lines += ["", "What replay changes, task by task:", "", "| task | gain by replay |", "|---|---|"]
    lines += [f"| {task} | {shown(value)} |" for axis in (domain, general) for task, value in axis["by_task"].items()]
    machine = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    return "\n".join([*lines, "", f"Measured with: {machine}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="the folder that `dapt-merge demo` wrote")
    parser.add_argument("--base", type=Path, help="the base model [default: DEMO/base]")
    parser.add_argument("--out", "-o", type=Path, required=True, help="where the two runs are written")
    parser.add_argument("--results", type=Path, default=HERE / "replay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="score only so many items of each task")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    options.base = options.base or options.demo / "base"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    runs = {}
    for name in PRESETS:
        print(f"{name} …", flush=True)
        runs[name] = run(name, options)
    from dapt_merge.evaluation import evaluate
    from dapt_merge.study.scoring import evaluation_dtype

    loaded = suites(options.demo)
    dtype = evaluation_dtype("auto", None)
    scores = {}
    for name, folder in {"base": options.base, **{name: entry["folder"] for name, entry in runs.items()}}.items():
        print(f"scoring: {name} …", flush=True)
        scores[name] = evaluate(folder, list(loaded.values()), dtype=dtype, limit=options.limit)
    result = {
        "seed": options.seed,
        "overrides": options.overrides,
        "runs": runs,
        "axes": compare(scores, {axis: suite.tasks for axis, suite in loaded.items()}),
        "environment": {
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            **{name: version(name) for name in ("torch", "transformers", "lm_eval")},
            "scored_in": dtype,
        },
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.results / "result.md").write_text(page(result), encoding="utf-8")
    print(page(result))


if __name__ == "__main__":
    main()
