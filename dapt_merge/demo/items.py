"""The demo's items as lm-eval tasks: local JSON Lines, one YAML file a task, one suite file an axis.

The idea: whatever is measured is data that lm-eval runs without this package, and what chooses a merge (*search*)
shares no item with what judges it (*report*). Texts are scored in bits per byte, questions by accuracy. What this
module does not know: models and scores.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dapt_merge.demo.documents import Document, write_jsonl
from dapt_merge.demo.questions import Question

Purpose = Literal["search", "report"]
TEMPLATE_CONTROL = "icd11_template_control_bpb"


@dataclass(frozen=True)
class Prompt:
    """How a question becomes lm-eval text: `question` is filled in; the option follows after one space."""

    text: str


PROMPTS: Mapping[str, Prompt] = {
    "icd11_chapter_fr": Prompt("« {{question}} »\nChapitre de la CIM-11 :"),
    "icd11_fr_en": Prompt("« {{question}} »\nEn anglais :"),
    "medmcqa_en": Prompt("Question: {{question}}\nAnswer:"),
    "mmlu_en": Prompt("Question: {{question}}\nAnswer:"),
    "exams_fr": Prompt("Question : {{question}}\nRéponse :"),
}


@dataclass(frozen=True)
class SuitePlan:
    """Which tasks make up a suite: its name without the purpose, its axis, its language (None when mixed)."""

    name: str
    axis: Literal["domain", "general"]
    language: str | None
    tasks: tuple[str, ...]
    description: str


def task_name(purpose: Purpose, name: str) -> str:
    """Return the lm-eval name of a demo task, such as `demo_search_ansm_fr_bpb`."""
    return f"demo_{purpose}_{name}"


def write_text_task(
    folder: Path, final_folder: Path, purpose: Purpose, name: str, documents: Sequence[Document]
) -> str:
    """Write texts as a bits-per-byte task (rolling log likelihood over UTF-8 bytes); return the task's name.

    Args:
        folder: where the files are written now.
        final_folder: where they will lie, absolute: lm-eval resolves data files against the current folder.
        purpose: "search" or "report", a part of the task's name.
        name: the task's name without demo and purpose.
        documents: the texts, one item each.
    """
    rows = [{"id": d.id, "text": d.text, "source": d.source, "group": d.group} for d in documents]
    body = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    }
    return _write_task(folder, final_folder, task_name(purpose, name), rows, body)


def write_choice_task(
    folder: Path, final_folder: Path, purpose: Purpose, name: str, questions: Sequence[Question]
) -> str:
    """Write questions as a four-option completion task scored by accuracy; arguments as in `write_text_task`."""
    rows = [{**dataclasses.asdict(question), "choices": list(question.choices)} for question in questions]
    body = {
        "output_type": "multiple_choice",
        "doc_to_text": PROMPTS[name].text,
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    return _write_task(folder, final_folder, task_name(purpose, name), rows, body)


def _write_task(
    folder: Path, final_folder: Path, task: str, rows: Sequence[Mapping[str, Any]], body: Mapping[str, Any]
) -> str:
    items = folder / f"{task}.jsonl"
    write_jsonl(items, rows)
    digest = hashlib.sha256(items.read_bytes()).hexdigest()[:12]
    content = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(final_folder / items.name)}},
        "test_split": "test",
        **body,
        # Scores kept under an older version of the items are never mistaken for scores of these.
        "metadata": {"version": f"1-{digest}"},
    }
    header = f"# {len(rows)} items. Run it by itself:\n#   lm-eval run --tasks {task} --include_path {final_folder}\n"
    text = header + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    (folder / f"{task}.yaml").write_text(text, encoding="utf-8")
    return task


def write_suite(folder: Path, purpose: Purpose, plan: SuitePlan) -> str:
    """Write one suite file, which finds its tasks in the sibling folder `tasks`; return the file's name."""
    content = {
        "name": f"{purpose}-{plan.name}",
        "axis": plan.axis,
        "language": plan.language,
        "tasks": [task_name(purpose, task) for task in plan.tasks],
        "include_path": ["../tasks"],
        "description": plan.description,
    }
    if plan.language is None:
        del content["language"]
    file = folder / f"{purpose}-{plan.name}.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return file.name
