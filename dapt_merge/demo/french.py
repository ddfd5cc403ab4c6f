"""French clean-up: white space, text glued at line breaks, drug names in capitals.

The idea: a tokenizer and a language model see every fault of a PDF extraction, so the texts are repaired before they
are counted, split or learned. Nothing is deleted that carries meaning (accents, µ, ≥, decimals stay). What this module
does not know: which source a text comes from.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"))
_WORD = re.compile(r"[^\W\d_]+")
# Written in capitals in running text too; everything else in a drug name is lowered.
_ACRONYM = re.compile(r"IMAO|MAO|COMT|TNF|HMG|CYP|ASA|VIH|III?|IV|IA|IM|[KABCD]")


def tidy(text: str) -> str:
    """Return `text` in NFC, with typographic apostrophes made plain, invisible marks removed, white space collapsed.

    Example:
        >>> tidy("L’œdème\\u00a0:  aigu\\u200b ")
        "L'œdème : aigu"
    """
    text = unicodedata.normalize("NFC", text).translate(_INVISIBLE).replace("’", "'")
    return re.sub(r"\s+", " ", text).strip()


def join_lines(text: str) -> str:
    """Undo the line breaks of a printed column: a break is a space, except after a hyphen inside a word.

    Example:
        >>> join_lines("effets anti-\\ninflammatoires et \\nautres")
        'effets anti-inflammatoires et autres'
    """
    return tidy(re.sub(r"(?<=\w-)[ \t]*\n\s*(?=\w)", "", text))


def unglue(glued: str, original: str) -> str | None:
    """Return the stretch of `original` that equals `glued` but for white space, or None when there is none.

    The thesaurus gives each passage twice: once cut out with the line breaks lost ("sinécessaire"), once in place.

    Example:
        >>> unglue("dosage sinécessaire.", "Précaution\\ndosage si \\nnécessaire.\\n\\nRisque.")
        'dosage si \\nnécessaire.'
    """
    wanted = "".join(glued.split())
    positions = [index for index, character in enumerate(original) if not character.isspace()]
    start = "".join(original[index] for index in positions).find(wanted)
    if not wanted or start < 0:
        return None
    return original[positions[start] : positions[start + len(wanted) - 1] + 1]


def accented_forms(texts: Iterable[str]) -> dict[str, str]:
    """Map each word without accents to its most frequent lower-case spelling in `texts`."""
    counts: dict[str, Counter[str]] = {}
    for text in texts:
        for word in _WORD.findall(tidy(text).lower()):
            counts.setdefault(_without_accents(word), Counter())[word] += 1
    return {plain: min(forms, key=lambda form: (-forms[form], form)) for plain, forms in counts.items()}


def readable_name(capitals: str, accents: dict[str, str]) -> str:
    """Return a name that is printed in capitals in lower case, with the accents that capitals often lack.

    Example:
        >>> readable_name("INHIBITEURS DE L'HMG-COA REDUCTASE (CYP3A4)", {"reductase": "réductase"})
        "inhibiteurs de l'HMG-CoA réductase (CYP3A4)"
    """

    def lower(match: re.Match[str]) -> str:
        word = match.group()
        if word == "COA":
            return "CoA"
        if _ACRONYM.fullmatch(word) or re.search(r"[A-Z]\d|\d[A-Z]", word):
            return word
        return accents.get(_without_accents(word.lower()), word.lower())

    return re.sub(r"\w+", lower, tidy(capitals))


def sentence(text: str) -> str:
    """Return `text` with a capital first letter and an end mark; an empty text stays empty.

    Example:
        >>> sentence("risque accru"), sentence("Oui !"), sentence("")
        ('Risque accru.', 'Oui !', '')
    """
    text = text.strip().rstrip(" ;,:")
    if not text:
        return ""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?…" else ".")


def _without_accents(word: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))
