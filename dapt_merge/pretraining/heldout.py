"""What a run does to text that it never reads: bits per byte on both axes, and the rule that ends it early.

The texts are lm-eval tasks, scored by the same code as every other score, on the live model: with its compute dtype
and in windows of the training length. How weights move is not known here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from dapt_merge.atomic import write_text
from dapt_merge.errors import InputError
from dapt_merge.evaluation.scorer import Scorer
from dapt_merge.evaluation.statistics import suite_score
from dapt_merge.evaluation.suites import Suite, load_suite
from dapt_merge.pretraining.config import EarlyStop, HeldOut

METRIC = "bits_per_byte"
Measurement = tuple[int, Mapping[str, float]]  # tokens trained on, name → bits per byte


def heldout_suites(entries: Sequence[HeldOut], folder: Path) -> list[Suite]:
    """Return the suites of a run; a file of texts becomes an lm-eval task in `folder`.

    Raises:
        InputError: a suite that cannot be used, a file that is missing or of another kind, two suites of one name.
    """
    suites = [
        load_suite(entry.suite.expanduser()) if entry.suite is not None else _suite_of_file(entry, folder)
        for entry in entries
    ]
    names = [suite.name for suite in suites]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two held-out suites are called '{name}'", where="heldout", remedy="Rename one of them.")
    return suites


def _suite_of_file(entry: HeldOut, folder: Path) -> Suite:
    assert entry.path is not None
    assert entry.axis is not None
    path = entry.path.expanduser().absolute()
    if not path.is_file() or path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise InputError(
            "a held-out file is a .jsonl file with one document a line",
            where=path,
            remedy="Correct the path under 'heldout', or name a suite (.yaml).",
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    task = f"heldout_{entry.axis}_{path.stem}_{digest}"
    content = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{" + entry.text_field + "}}",
        "metric_list": [{"metric": METRIC, "aggregation": METRIC, "higher_is_better": False}],
        "metadata": {"version": digest},
    }
    write_text(folder / f"{task}.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return Suite(name=path.stem, axis=entry.axis, language=entry.language, tasks=[task], include_path=[folder])


class HeldOutMonitor:
    """Scores held-out suites on a model with the weights that it has when `measure` is called.

    Args:
        suites: of bits-per-byte tasks.
        model: the causal model that is trained, without what wraps it.
        tokenizer: its tokenizer.
        sequence_length: the longest window in tokens.
        documents: score only so many of each task.

    Raises:
        InputError: a task without bits per byte.
    """

    def __init__(
        self, suites: Sequence[Suite], model: Any, tokenizer: Any, *, sequence_length: int, documents: int | None
    ) -> None:
        self._suites = list(suites)
        self._scorer = Scorer(suites, model, tokenizer, max_length=sequence_length, limit=documents)
        self._model = model

    def measure(self) -> dict[str, float]:
        """Return bits per byte by axis and language: `domain`, `domain/fr`, `general`, `general/en` …

        A suite is the mean of its tasks, a language the mean of its suites, an axis the mean of its languages. The
        model is left in training mode.
        """
        scores = self._scorer.score()
        self._model.train()
        by_language: dict[str, dict[str, list[float]]] = {}
        for suite in self._suites:
            tasks = self._scorer.suite_tasks[suite.name]
            other = [task for task in tasks if scores[task].metric != METRIC]
            if other:
                metric = scores[other[0]].metric
                raise InputError(
                    f"the task '{other[0]}' is scored by {metric}, and training is watched in {METRIC}",
                    where=f"heldout, suite {suite.name}",
                    remedy="Name suites of texts (output_type: loglikelihood_rolling).",
                )
            value = float(suite_score(scores, tasks, METRIC))
            by_language.setdefault(suite.axis, {}).setdefault(suite.language or "", []).append(value)
        found = {}
        for axis, languages in sorted(by_language.items()):
            found[axis] = fmean(fmean(values) for values in languages.values())
            found |= {f"{axis}/{name}": fmean(values) for name, values in sorted(languages.items()) if name}
        return found


def refuse_unmeasured_rule(rule: EarlyStop | None, suites: Sequence[Suite]) -> None:
    """Raise InputError when a rule asks for an axis that no held-out text measures."""
    if rule is None:
        return
    wanted = {"general": rule.general_rise, "domain": rule.domain_gain_per_million_tokens}
    for axis, limit in wanted.items():
        if limit is not None and all(suite.axis != axis for suite in suites):
            raise InputError(
                f"the rule for stopping early asks for {axis} text, and there is none",
                where="early_stop",
                remedy=f"Add a {axis} suite or file under 'heldout'.",
            )


def stop_reason(rule: EarlyStop, measurements: Sequence[Measurement], warmup_tokens: int) -> str | None:
    """Return why the last measurement ends the run, or None.

    Args:
        rule: as declared.
        measurements: of the run so far, in order; the first one is the base's.
        warmup_tokens: before these, nobody asks for a gain.

    Example:
        >>> rule = EarlyStop(general_rise=0.02)
        >>> stop_reason(rule, [(0, {"general": 1.0}), (500, {"general": 1.03})], 0)
        'general bits per byte have risen by 0.0300 above the base, more than 0.02'
    """
    if len(measurements) < 2:
        return None
    tokens, now = measurements[-1]
    if rule.general_rise is not None:
        rise = now["general"] - measurements[0][1]["general"]
        if rise > rule.general_rise:
            return f"general bits per byte have risen by {rise:.4f} above the base, more than {rule.general_rise:g}"
    wanted = rule.domain_gain_per_million_tokens
    before_tokens, before = measurements[-2]
    if wanted is not None and before_tokens >= warmup_tokens and tokens > before_tokens:
        gain = (before["domain"] - now["domain"]) / (tokens - before_tokens) * 1e6
        if gain < wanted:
            return f"domain bits per byte fall by {gain:.4f} a million tokens, less than {wanted:g}"
    return None
