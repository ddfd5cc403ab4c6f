"""Repairs are safe for languages: what the study's own cleaning destroyed survives, and every loss is accounted for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapt_merge.corpus.characters import (
    CharacterLosses,
    character_class,
    lone_surrogates_replaced,
    repair_unicode,
    tidy_whitespace,
)

CASUALTIES = [
    "où",
    "connaître",
    "500 µg",
    "500 μg",
    "0,5",
    "37,2 °C ± 0,1",
    "≥ 65 ans, ≤ 3 mois",
    "cœur, œdème, cæcum, naïf, Noël, aiguë, forêt, août",
    "l’été « chaud » – dit-on… “here”",
    "10³ m², H₂O, x½, Ω",
    "10 000 €",
    "naïve façade, ÇA VA, ÉTÉ, Œuvre",
    "β-bloquants, α1, 5′-NT",
    "日本語「テスト」、全角ＡＢＣ",
    "Größe, señor, Øre, Łódź, įmonė",
    "Привет, Ελληνικά, עברית, العربية, हिन्दी",
]


@pytest.mark.parametrize("text", CASUALTIES)
def test_what_careless_cleaning_destroys_survives(text: str) -> None:
    assert tidy_whitespace(repair_unicode(text)) == text


@pytest.mark.parametrize("text", CASUALTIES[:6] + CASUALTIES[11:12])
@pytest.mark.parametrize("wrong", ["latin1", "cp1252"])
def test_mojibake_is_repaired(text: str, wrong: str) -> None:
    sentence = f"Le patient : {text}, voilà la posologie décrite."
    try:
        garbled = sentence.encode().decode(wrong)
    except UnicodeDecodeError:
        pytest.skip("this text has no such mojibake")
    assert repair_unicode(garbled) == sentence


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("p &lt; 0,05 &amp; fi&egrave;vre", "p < 0,05 & fièvre"),
        ("coeﬃcient, ﬁèvre, ﬂux", "coefficient, fièvre, flux"),
        ("e\u0301te\u0301", "été"),
        ("a\x00b\x07c\x1b[31md", "abcd"),
        ("une\u2028deux", "une\ndeux"),
        ("l\x92\u00e9t\u00e9", "l’été"),
    ],
)
def test_damage_is_repaired(before: str, after: str) -> None:
    assert repair_unicode(before) == after


@given(st.text(max_size=60))
def test_the_quick_look_never_misses_what_ftfy_would_repair(text: str) -> None:
    import ftfy

    from dapt_merge.corpus.characters import _ftfy_settings, is_suspicious

    if not is_suspicious(text):
        assert repair_unicode(text) == ftfy.fix_text(text, _ftfy_settings())


@given(st.text(alphabet="aeéèàùçœ ,.ÂÃâ€™©¢°µ²£ìîïð\xa0œ\n", max_size=40))
def test_the_quick_look_never_misses_mojibake(text: str) -> None:
    test_the_quick_look_never_misses_what_ftfy_would_repair.hypothesis.inner_test(text)


@given(st.text(max_size=80))
def test_repairs_settle_at_once(text: str) -> None:
    once = tidy_whitespace(text)
    assert tidy_whitespace(once) == once


def test_whitespace_keeps_indentation_tabs_and_no_break_spaces() -> None:
    assert tidy_whitespace("a  b\r\n\tc\td\n\n\n\n  e\u00a0: f\u202f; ") == "a b\n\tc\td\n\n  e\u00a0: f\u202f;"
    assert tidy_whitespace("trai\u00adtement\ufeff") == "traitement"


def test_every_lost_character_is_counted_in_its_class_with_samples() -> None:
    losses = CharacterLosses()
    for before in ("une ﬁèvre de 39 °C\x07 hier", "la ﬁn", "rien"):
        after = repair_unicode(before)
        if after != before:
            losses.add(before, after)
    rows = {row["class"]: row for row in losses.by_class()}
    assert losses.changed_documents == 2
    assert rows["letter, small (beyond ASCII)"]["lost"] == 2
    assert rows["letter, small (beyond ASCII)"]["characters"] == {"ﬁ U+FB01": 2}
    assert rows["letter, small (beyond ASCII)"]["samples"][0] == {
        "before": "une ﬁèvre de 39 °C\x07 hier",
        "after": "une fièvre de 39 °C hier",
    }
    assert rows["control character"]["characters"] == {"U+0007": 1}
    assert losses.gained["f"] == 2


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), max_size=6), st.integers(0, 6))
def test_losses_add_up_over_processes(pairs: list[tuple[str, str]], cut: int) -> None:
    whole, first, second = CharacterLosses(), CharacterLosses(), CharacterLosses()
    for number, (before, after) in enumerate(pairs):
        whole.add(before, after)
        (first if number < cut else second).add(before, after)
    first.merge(second)
    assert first.counts == whole.counts
    assert first.gained == whole.gained
    assert first.changed_documents == whole.changed_documents
    assert {kind: len(found) for kind, found in first.samples.items()} == {
        kind: len(found) for kind, found in whole.samples.items()
    }


@given(st.text(max_size=30), st.text(max_size=30))
def test_the_balance_of_a_repair_is_exact(before: str, after: str) -> None:
    losses = CharacterLosses()
    losses.add(before, after)
    assert len(before) - losses.counts.total() + losses.gained.total() == len(after)


def test_halves_of_surrogate_pairs_become_the_replacement_character() -> None:
    assert lone_surrogates_replaced("a\ud83db") == "a\ufffdb"
    assert lone_surrogates_replaced("é😀") == "é😀"


@given(st.characters())
def test_every_character_has_a_class(character: str) -> None:
    assert character_class(character)
