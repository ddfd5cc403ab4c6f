"""The compiled walk gives the library's own answer: the same language, and the same probability to the bit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from small_corpora import texts

from dapt_merge.corpus.languages import known_languages, language_of

PLAIN = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
VARIED = [
    "",
    " \n\t",
    "a",
    "0,5 µg ± 0,1 °C",
    "🙂🙃🚑💊",
    "Le patient présente une fièvre depuis trois jours.",
    "The patient has had a fever for three days. 🤒",
    "Der Patient hat seit drei Tagen Fieber; er wird überwacht.",
    "患者は三日前から発熱している。",
    "У пациента лихорадка третий день.",
    "المريض يعاني من الحمى منذ ثلاثة أيام",
    "रोगी को तीन दिनों से बुखार है",
    "<table><tr><td>12</td></tr></table>",
    "\x00\x01\ufffd\U0010ffff",
]


@pytest.mark.parametrize("text", [*VARIED, *texts(5, 0), "".join(VARIED) * 50])
def test_the_compiled_walk_answers_as_the_library_does(text: str) -> None:
    assert language_of(text) == tuple(PLAIN.classify(text))


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_text_gets_the_librarys_answer(text: str) -> None:
    assert language_of(text) == tuple(PLAIN.classify(text))


def test_the_languages_known_are_the_models() -> None:
    assert {"fr", "en", "de", "ja"} <= set(known_languages())
    assert list(known_languages()) == sorted(known_languages())
