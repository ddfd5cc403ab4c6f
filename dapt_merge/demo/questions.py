"""Multiple-choice questions with four options: from published sets, and made from ICD-11.

The idea: a small model is asked to complete, not to name a letter, so each option must stand alone as an answer:
questions whose options refer to each other ("both", "none of the above") are left out. What this module does not know:
prompts and scores.
"""

from __future__ import annotations

import difflib
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dapt_merge.demo.classifications import Concept
from dapt_merge.demo.french import tidy
from dapt_merge.demo.leaks import normalised

_OPTIONS = 4
_MOST_QUESTION_CHARACTERS = 130
_MOST_OPTION_CHARACTERS = 45
_CANDIDATES = 60
_REFERS_TO_OPTIONS = re.compile(
    r"\b(?:both|all|none|neither|any) (?:of )?(?:the )?(?:above|these|options?|are)\b|\b[a-d] (?:and|&|et|or) [a-d]\b"
    r"|\b(?:all|none|both)\b$|^none\b|^(?:aucun|toutes?|nulle|tous|les deux)|réponses?\b|ci-dessus|\bstatement [12]\b"
    r"|précédent|_{2,}|[$\\]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Question:
    """A question, its four options and the index of the right one."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    group: str


def read_medmcqa(folder: Path) -> list[Question]:
    """Read the short English medical questions (MedMCQA); those whose options can stand alone."""
    parsed = []
    for row in _rows(folder, "medmcqa/samples.jsonl"):
        content = row["input"][-1]["content"].split("\n\n", 1)[1]
        parsed.append(_parse(content, r"\n[a-d]\) ", "abcd".find(row["ideal"][:1].lower())))
    return _usable(parsed, "medmcqa")


def read_mmlu(folder: Path) -> list[Question]:
    """Read the short English questions of MMLU that can stand alone."""
    rows = _rows(folder, "sandbagging/samples-all-large.jsonl")
    return _usable([_parse(row["question"], r"\n[A-E]\. ", "ABCD".find(row["answer"])) for row in rows], "mmlu")


def read_french_exams(folder: Path) -> list[Question]:
    """Read the short French school-exam questions that have four options and can stand alone."""
    rows = _rows(folder, "french-exams-qa/samples.jsonl")
    parsed = [_parse(row["input"][-1]["content"], r"\n[A-E]\. ", "ABCD".find(row["ideal"].strip("[]"))) for row in rows]
    return _usable(parsed, "exams")


def _rows(folder: Path, name: str) -> list[Mapping[str, Any]]:
    with next(folder.rglob(name)).open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _parse(content: str, option_mark: str, answer: int) -> tuple[str, list[str], int]:
    question, *options = re.split(option_mark, re.sub(r"\s*\nAnswer:\s*$", "", content.replace("\r", "")))
    return tidy(question).rstrip(" -:–"), [tidy(option).rstrip(".") for option in options], answer


def _usable(parsed: Iterable[tuple[str, list[str], int]], name: str) -> list[Question]:
    kept: dict[str, Question] = {}
    for question, options, answer in parsed:
        distinct = len({normalised(option) for option in options} - {""}) == _OPTIONS == len(options)
        short = len(question) <= _MOST_QUESTION_CHARACTERS and max(map(len, options), default=0) <= (
            _MOST_OPTION_CHARACTERS
        )
        alone = not any(_REFERS_TO_OPTIONS.search(text) for text in (question, *options))
        if distinct and short and alone and question and 0 <= answer < _OPTIONS:
            key = normalised(question)
            kept.setdefault(key, Question(f"{name}-{len(kept)}", question, tuple(options), answer, key))
    return list(kept.values())


def chapter_questions(concepts: Sequence[Concept], chapters: Sequence[str], seed: int) -> list[Question]:
    """Ask for the ICD-11 chapter of each concept; the three wrong ones are drawn from `chapters`."""
    questions = []
    for concept in concepts:
        generator = random.Random(f"{seed}:chapter:{concept.id}")
        wrong = generator.sample([chapter for chapter in chapters if chapter != concept.chapter], _OPTIONS - 1)
        questions.append(_shuffled(concept, "chapter", concept.label, concept.chapter, wrong, generator))
    return questions


def translation_questions(concepts: Sequence[Concept], pool: Sequence[Concept], seed: int) -> list[Question]:
    """Ask for the English of each concept; the wrong ones are the most alike English labels of its chapter in `pool`.

    French and English medical words look alike, so labels that share no word with the right one would give it away.
    `pool` is the same held-out side: no option was trained on.
    """
    questions = []
    for concept in concepts:
        generator = random.Random(f"{seed}:english:{concept.id}")
        labels = {
            chapter_matches: sorted(
                {
                    other.english
                    for other in pool
                    if (other.chapter == concept.chapter) == chapter_matches
                    and normalised(other.english) != normalised(concept.english)
                }
            )
            for chapter_matches in (True, False)
        }
        candidates = generator.sample(labels[True], min(_CANDIDATES, len(labels[True])))
        candidates += generator.sample(labels[False], min(_CANDIDATES - len(candidates), len(labels[False])))
        candidates.sort(key=lambda label: (-_alike(label, concept.english), label))
        wrong = candidates[: _OPTIONS - 1]
        questions.append(_shuffled(concept, "english", concept.label, concept.english, wrong, generator))
    return questions


def _alike(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first.lower(), second.lower(), autojunk=False).ratio()


def _shuffled(
    concept: Concept, kind: str, question: str, right: str, wrong: Sequence[str], generator: random.Random
) -> Question:
    choices = [right, *wrong]
    generator.shuffle(choices)
    number = concept.id.rsplit("/", 1)[-1]
    return Question(f"icd11-{kind}-{number}", question, tuple(choices), choices.index(right), concept.parent_id)


def shared_out(
    questions: Sequence[Question], search_items: int, key: str
) -> dict[Literal["search", "report"], list[Question]]:
    """Shuffle by `key`, give the first `search_items` to the search and the others to the report."""
    shuffled = list(questions)
    random.Random(key).shuffle(shuffled)
    return {"search": shuffled[:search_items], "report": shuffled[search_items:]}
