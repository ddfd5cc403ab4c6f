"""Each filter strikes at its bound and nowhere else; boilerplate is told by how many documents repeat a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_corpora import texts

from dapt_merge.corpus.boilerplate import LineCounter, line_hash, without_boilerplate
from dapt_merge.corpus.config import Boilerplate, LanguageFilter, Quality
from dapt_merge.corpus.filters import language_fault, quality_fault, repetition, symbol_share
from dapt_merge.corpus.shingles import folded

PROSE = (
    "Le paracétamol est un antalgique de palier 1 : 500 mg à 1 g par prise, sans dépasser 4 g par jour chez l'adulte ; "
    "chez l'enfant, 60 mg/kg/jour. Une hépatite aiguë (≥ 10 fois la normale) peut survenir en cas de surdosage."
)
ENGLISH = (
    "The patient was admitted with a fever of unknown origin and was given antibiotics for two weeks; no pathogen was "
    "found, and she recovered without any further treatment before the end of the month in which she had been admitted."
)


def test_ordinary_prose_passes_all_filters() -> None:
    for text in (PROSE, ENGLISH, *texts(20, 1)):
        assert quality_fault(text, folded(text), Quality()) is None


@pytest.mark.parametrize(
    ("text", "bounds", "fault"),
    [
        ("x" * 49, Quality(), "shorter than minimum_characters"),
        ("x" * 50, Quality(), None),
        ("x" * 51, Quality(maximum_characters=50), "longer than maximum_characters"),
        ("|---|---|" * 20, Quality(), "above maximum_symbol_share"),
        ("|---|---|" * 20, Quality(maximum_symbol_share=None), None),
        ("cliquez ici pour vous abonner " * 20, Quality(), "above maximum_repetition_share"),
        ("cliquez ici pour vous abonner " * 20, Quality(maximum_repetition_share=None), None),
    ],
)
def test_a_bound_strikes_where_it_is_set(text: str, bounds: Quality, fault: str | None) -> None:
    assert quality_fault(text, folded(text), bounds) == fault


def test_symbols_are_what_is_neither_letter_nor_digit() -> None:
    assert symbol_share("où à œ µ 10³ 日本") == 0
    assert symbol_share("a_b") == pytest.approx(1 / 3)
    assert symbol_share("  ") == 0


def test_repetition_is_not_asked_of_short_texts() -> None:
    assert repetition("a b c " * 10) == 0
    assert repetition("a b c " * 20) > 0.9


def test_another_language_is_told_only_of_texts_long_enough() -> None:
    assert language_fault(ENGLISH, "fr", LanguageFilter()) == "language: en"
    assert language_fault(PROSE, "fr", LanguageFilter()) is None
    assert language_fault(ENGLISH[:100], "fr", LanguageFilter()) is None
    assert language_fault(ENGLISH[:100], "fr", LanguageFilter(minimum_characters=50)) == "language: en"


def repeated_lines(folder: Path, documents: list[str], settings: Boilerplate) -> np.ndarray:
    counter = LineCounter(folder, settings)
    for document in documents:
        counter.add(document)
    return counter.repeated()


def test_lines_of_many_documents_go_and_all_others_stay(tmp_path: Path) -> None:
    settings = Boilerplate(documents=5)
    footer, rare, short = "Tous droits réservés, CHU de Nulle-Part", "Compte rendu de consultation", "Oui."
    documents = [f"{text}\n{footer if i % 2 else footer.upper() + ' '}\n{short}" for i, text in enumerate(texts(5, 1))]
    documents += [f"{text}\n{rare}" for text in texts(4, 2)]
    repeated = repeated_lines(tmp_path, documents, settings)
    assert repeated.tolist() == [line_hash(footer)]
    kept, gone = without_boilerplate(documents[1], repeated, settings)
    assert gone == [footer]
    assert kept == f"{texts(5, 1)[1]}\n{short}"
    assert without_boilerplate(documents[-1], repeated, settings) == (documents[-1], ())


def test_a_line_repeated_within_one_document_counts_once(tmp_path: Path) -> None:
    line = "une ligne qui revient sans cesse"
    assert len(repeated_lines(tmp_path, ["\n".join([line] * 50)] * 4, Boilerplate(documents=5))) == 0


def test_a_document_of_one_line_is_text_however_often_it_occurs(tmp_path: Path) -> None:
    settings = Boilerplate(documents=3)
    documents = ["Une seule ligne, répétée partout."] * 9
    repeated = repeated_lines(tmp_path, documents, settings)
    assert without_boilerplate(documents[0], repeated, settings)[0] == documents[0]


def test_counting_on_disk_in_parts_equals_counting_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import Counter

    from dapt_merge.corpus import boilerplate

    monkeypatch.setattr(boilerplate, "_HELD_HASHES", 7)
    generator = np.random.default_rng(0)
    documents = ["\n".join(f"ligne numéro {n} du texte" for n in generator.integers(0, 30, 6)) for _ in range(60)]
    counts = Counter(line for document in documents for line in set(document.splitlines()))
    expected = {line_hash(line) for line, count in counts.items() if count >= 10}
    assert expected
    assert set(repeated_lines(tmp_path, documents, Boilerplate(documents=10)).tolist()) == expected
