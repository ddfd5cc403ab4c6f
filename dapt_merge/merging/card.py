"""The model card beside a merge: its `README.md`, with the front matter that the Hugging Face hub reads.

Everything in it stands in the report, in what the inputs say of their own training, or was given; what is not known is
left out or said to be unknown, so a licence, a language or a score is never guessed. What this module does not know:
how scores come about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dapt_merge.checkpoints.checkpoint import Checkpoint
from dapt_merge.checkpoints.hub import looks_like_hub_id
from dapt_merge.merging.report import MergeReport

CARD_FILE = "README.md"
_HUB_SNAPSHOT = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)/snapshots/[0-9a-f]{40}$")
# Beside a checkpoint of `dapt-merge pretrain`: what it was trained on, and how long.
_TRAINING_FILE = "dapt_checkpoint.json"


@dataclass(frozen=True)
class CardScore:
    """One score of the merged model: on which suite and metric, its standard error, the gain over the base."""

    suite: str
    metric: str
    score: float
    standard_error: float | None
    gain: float | None = None
    unit: str = ""


def model_card(
    report: MergeReport,
    checkpoints: Mapping[str, Checkpoint],
    *,
    scores: Sequence[CardScore] = (),
    scores_note: str | None = None,
) -> str:
    """Return the card of a merge as Markdown.

    Args:
        report: of the merge.
        checkpoints: its inputs, by their references.
        scores: what was measured of this very model; none are known when a merge is first written.
        scores_note: what must be known to read the scores, for example that their items chose the merge.
    """
    method = yaml.safe_load(report.recipe)["merge_method"]
    trained = {name: found for name, checkpoint in checkpoints.items() if (found := _training(checkpoint))}
    parts = [
        _front_matter(method, checkpoints, trained, scores),
        f"# Merge by {method}\n",
        f"Written by dapt-merge {report.versions['dapt-merge']}; the whole account is in `merge_report.json`.\n",
        f"## Recipe\n\n```yaml\n{_all_recipes(report)}\n```\n",
        _section("Inputs", [f"- `{_code(name)}`: content `{found}`" for name, found in report.inputs.items()]),
        *([_section("Training data of the inputs", _data(trained))] if trained else []),
        _section("Result", _result(report)),
        _section("Warnings", [f"- {' '.join(warning.split())}" for warning in report.warnings] or ["None."]),
        _scores(scores, scores_note),
        "## Check\n\n`dapt-merge merge --verify FOLDER` recomputes the merge from its inputs and compares every bit.\n",
        _section("Versions", [f"- {package} {version}" for package, version in report.versions.items()]),
    ]
    return "\n".join(parts)


def hub_id(reference: str, checkpoint: Checkpoint) -> str | None:
    """Return the hub id that a checkpoint was opened by, or None for what lies on the disk or in memory."""
    found = None if checkpoint.folder is None else _HUB_SNAPSHOT.search(checkpoint.folder.as_posix())
    if found is not None:
        return f"{found['owner']}/{found['name']}"
    is_local = checkpoint.folder is None or Path(reference).expanduser().exists()
    # A name alone is as well that of another recipe's output: only the cache's folder, above, tells it from one.
    return reference if "/" in reference and looks_like_hub_id(reference) and not is_local else None


def _all_recipes(report: MergeReport) -> str:
    steps = [f"name: {step['name']}\n{step['recipe'].rstrip()}" for step in report.steps]
    return "\n---\n".join([*steps, report.recipe.rstrip()])


def _front_matter(
    method: str,
    checkpoints: Mapping[str, Checkpoint],
    trained: Mapping[str, Mapping[str, Any]],
    scores: Sequence[CardScore],
) -> str:
    ids = [hub_id(reference, checkpoint) for reference, checkpoint in checkpoints.items()]
    known = [name for name in ids if name is not None]
    entries: dict[str, Any] = {}
    if known:
        entries |= {"base_model": known, "base_model_relation": "merge"}
    sources = [source for found in trained.values() for source in _sources(found)]
    for entry, key in (("datasets", "hub"), ("language", "language")):
        stated = list(dict.fromkeys(source[key] for source in sources if source.get(key)))
        entries |= {entry: stated} if stated else {}
    if any(checkpoint.config.get("model_type") for checkpoint in checkpoints.values()):
        entries["library_name"] = "transformers"
    entries["tags"] = ["merge", "dapt-merge"]
    if scores:
        entries["model-index"] = [{"name": f"{method} merge", "results": [_evaluation(score) for score in scores]}]
    text = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
    # The hub takes ids only; a local path would be refused there, or name another's model.
    local = len(ids) - len(known)
    note = f"# base_model: {local} of {len(ids)} inputs were no hub models; add their hub ids.\n" if local else ""
    return f"---\n{text}{note}---\n"


def _evaluation(score: CardScore) -> dict[str, Any]:
    """Return one score in the form that the hub's `model-index` has."""
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": score.suite, "name": score.suite},
        "metrics": [{"type": score.metric, "value": score.score}],
    }


def _training(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint says of the run that made it; nothing where it says nothing that can be read."""
    try:
        found = json.loads(((checkpoint.folder or Path()) / _TRAINING_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and checkpoint.folder is not None else {}


def _sources(training: Mapping[str, Any]) -> list[dict[str, Any]]:
    config = training.get("config")
    corpus = config.get("corpus") if isinstance(config, Mapping) else None
    listed = corpus.get("sources") if isinstance(corpus, Mapping) else corpus
    return [source for source in listed if isinstance(source, dict)] if isinstance(listed, list) else []


def _data(trained: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Name the data sets and files of each run, the latter without their folders, which are nobody's business."""
    lines = []
    for name, training in trained.items():
        sources = [
            " ".join(
                [
                    f"`{_code(str(source.get('name') or source.get('hub') or Path(str(source.get('path'))).name))}`",
                    f"({', '.join(str(source[key]) for key in ('role', 'language', 'licence') if source.get(key))})",
                ]
            )
            for source in _sources(training)
        ]
        tokens = training.get("tokens_seen")
        read = f"{tokens:,} tokens" if isinstance(tokens, int) else "tokens not stated"
        lines.append(f"- `{_code(name)}`: {read} of {', '.join(sources) or 'texts that are not stated'}")
    return lines


def _result(report: MergeReport) -> list[str]:
    dtypes = sorted({line["out_dtype"] for line in report.lines})
    in_dtypes = f" in {', '.join(dtypes)}" if dtypes else ""
    lines = [
        f"- {report.tensors:,} tensors{in_dtypes}, {report.bytes_written:,} bytes",
        f"- content `{report.output}`, merge `{report.fingerprint}`",
    ]
    if report.engine != "native":
        return [*lines, f"- computed by {report.engine}, which does not tell of fallbacks or of what rounding lost"]
    if report.lost_share is None:
        lines.append("- rounding loss: not measured, or nothing was rounded")
    else:
        lines.append(
            f"- rounding loss: {report.lost_share:.1%} of {report.updated_elements:,} updated elements fell back to the"
            " value that they started from"
        )
    kinds = sorted({str(notes["fallback"]).split(":")[0] for notes in report.notes.values() if "fallback" in notes})
    lines.append(f"- fallbacks: {report.fallbacks:,} tensors" + (f" ({', '.join(kinds)})" if kinds else ""))
    return lines


def _scores(scores: Sequence[CardScore], note: str | None) -> str:
    if not scores:
        return "## Scores\n\nNone are known: this model was not scored when it was written.\n"
    lines = ["| suite | metric | score | gain over the base |", "|---|---|---|---|"]
    for score in scores:
        error = "" if score.standard_error is None else f" ± {score.standard_error:.4f}"
        gain = "" if score.gain is None else f"{score.gain:+.4f} {score.unit}".strip()
        lines.append(f"| {_cell(score.suite)} | {_cell(score.metric)} | {score.score:.4f}{error} | {gain} |")
    return "## Scores\n\n" + (f"{note}\n\n" if note else "") + "\n".join(lines) + "\n"


def _section(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return text.replace("`", "'")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
