"""Repairs keep every letter, normalisation sees through rewordings of form, pieces lose no sentence order."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapt_merge.demo import documents, french, general_prose, leaks
from dapt_merge.demo.french import join_lines, readable_name, tidy, unglue
from dapt_merge.demo.general_prose import is_english_prose, pieces
from dapt_merge.demo.leaks import PhraseIndex, connected_groups, ngrams, normalised

WORDS = st.lists(st.text("abcdé", min_size=1, max_size=4), min_size=1, max_size=12)


@pytest.mark.parametrize("module", [documents, french, general_prose, leaks])
def test_the_examples_in_the_documentation_run(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_nothing_that_carries_meaning_is_deleted() -> None:
    text = "où œdème île 500 µg ≥ 0,5 % ± 37,5 °C æ ü ë ù"
    assert tidy(text) == text


@given(WORDS, WORDS, WORDS)
def test_a_passage_with_its_spaces_lost_is_found_in_the_original(
    before: list[str], passage: list[str], after: list[str]
) -> None:
    found = unglue("".join(passage), "\n".join(before) + "\n" + " \n".join(passage) + "\n" + " ".join(after))
    assert found is not None
    assert "".join(found.split()) == "".join(passage)


def test_a_passage_that_is_not_there_is_not_invented() -> None:
    assert unglue("tout autre chose", "Précaution d'emploi") is None
    assert unglue("", "Précaution") is None


def test_a_line_break_inside_a_compound_leaves_no_space() -> None:
    assert join_lines("bloc auriculo-\nventriculaire :\n- un\n- deux") == "bloc auriculo-ventriculaire : - un - deux"


def test_drug_names_keep_what_is_always_written_in_capitals() -> None:
    accents = {"paracetamol": "paracétamol"}
    assert readable_name("IMAO-B, VITAMINE D, CYP3A4 ET PARACETAMOL", accents) == (
        "IMAO-B, vitamine D, CYP3A4 et paracétamol"
    )


@given(st.text(max_size=40))
def test_normalisation_is_idempotent_and_ignores_case(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)
    assert normalised(f"  «{text}»!") == normalised(text)


@given(WORDS, WORDS, WORDS)
def test_a_phrase_is_found_wherever_it_stands(before: list[str], phrase: list[str], after: list[str]) -> None:
    assert " ".join(phrase) in PhraseIndex([" ".join([*before, *phrase, *after])])


def test_a_phrase_is_not_put_together_from_two_texts() -> None:
    assert "fin début" not in PhraseIndex(["la fin", "début de"])


def test_a_short_text_is_one_run_of_its_words() -> None:
    assert ngrams("Surveillance clinique.") == {("surveillance", "clinique")}
    assert len(ngrams("a b c d e f g h i")) == 2


@given(st.lists(st.sets(st.integers(0, 8), max_size=3), max_size=12))
def test_things_that_share_a_mark_are_in_one_group(links: list[set[int]]) -> None:
    groups = connected_groups(links)
    for i, first in enumerate(links):
        for j, second in enumerate(links):
            assert not first & second or groups[i] == groups[j]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(10, 120))
def test_pieces_are_whole_sentences_in_order_and_short_enough(lengths: list[int], limit: int) -> None:
    text = " ".join(" ".join(["Word"] * length) + "." for length in lengths)
    position = 0
    for piece in pieces(text, limit):
        assert limit / 3 <= len(piece) <= limit
        assert piece.endswith(".")
        position = text.index(piece, position) + len(piece)


def test_code_lists_and_random_strings_are_not_prose() -> None:
    prose = "The king of the land was known to his people for the justice that he brought to it. " * 4 + "So it was."
    assert is_english_prose(prose)
    assert not is_english_prose("x7 Gq2 pL9 " * 60)
    assert not is_english_prose("Ada may refer to:\n" + "Ada, a town in the state of Ohio\n" * 30)
    assert not is_english_prose("Le roi était connu de son peuple pour la justice. " * 8)
