"""Text repaired without loss of language, and an account of every character that a repair took away.

Cleaning by lists of wanted characters destroys words ("où" to "o"), units ("500 µg" to "500 g") and numbers. Here
nothing is deleted for being rare: mojibake, HTML entities, control characters and invisible marks are repaired by
ftfy, composed letters are composed (NFC, never NFKC, which turns 10³ into 103), the f-ligatures of typesetting become
letters again; quotation marks, œ, æ, µ, °, ±, ≥ and no-break spaces stay. And what is gone all the same is counted,
by class, with samples from before and after.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

# Typesetting's ligatures are two letters drawn as one; œ and æ are letters of their own.
_LIGATURES = {0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st", 0xFB06: "st"}
_LIGATURE = re.compile("[\ufb00-\ufb06]")
# What ftfy could change has one of these: an entity, a control character, a surrogate or a letter that most mojibake
# starts with; two neighbours beyond ASCII; an œ that ends a word. Looking for them takes a tenth of ftfy's time.
_SUSPICIOUS = (
    re.compile("[&\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u206a-\u206f\ud800-\udfff\ufeff\ufff9-\ufffcÃÂ]"),
    re.compile("[\x80-\U0010ffff][\x80-\U0010ffff]"),
    re.compile("[Œœ](?![A-Za-z])"),
)
_INVISIBLE = {0x00AD: None, 0xFEFF: None}
_WIDE_SPACE = re.compile(r"(?<=\S) {2,}(?=\S)")
_LINE_END_SPACE = re.compile(r"[ \t]+(?=\n)")
_BLANK_LINES = re.compile(r"\n{3,}")
_SAMPLES_PER_CLASS = 3
_SAMPLE_MARGIN = 24


def repair_unicode(text: str) -> str:
    """Repair mojibake, entities, control characters and f-ligatures, and compose letters (NFC).

    Example:
        >>> repair_unicode("oÃ¹ connaÃ®tre 500 Âµg &lt; 0,5 Â°C, coeﬃcient")
        'où connaître 500 µg < 0,5 °C, coefficient'
        >>> repair_unicode("où, œdème, 500 µg, 0,5 ± 0,1 °C, ≥ 10³, l’été « x »")
        'où, œdème, 500 µg, 0,5 ± 0,1 °C, ≥ 10³, l’été « x »'
    """
    if is_suspicious(text):
        import ftfy

        text = ftfy.fix_text(text, _ftfy_settings())
    elif not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    return text.translate(_LIGATURES) if _LIGATURE.search(text) else text


def is_suspicious(text: str) -> bool:
    """Say whether a text has anything that ftfy could repair."""
    return any(pattern.search(text) for pattern in _SUSPICIOUS)


@cache
def _ftfy_settings() -> Any:
    import ftfy

    # Typographic quotes are French and English orthography; full-width forms are Japanese and Chinese orthography.
    return ftfy.TextFixerConfig(
        uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, normalization="NFC", explain=False
    )


def tidy_whitespace(text: str) -> str:
    r"""Narrow runs of spaces and of blank lines, and drop the invisible marks of typesetting (soft hyphens).

    Indentation, tabs between words and no-break spaces stay.

    Example:
        >>> tidy_whitespace("500  mg \r\n\n\n\n  trai\u00adtement ")
        '500 mg\n\n  traitement'
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\u00ad" in text or "\ufeff" in text:
        text = text.translate(_INVISIBLE)
    if "  " in text:
        text = _WIDE_SPACE.sub(" ", text)
    if " \n" in text or "\t\n" in text:
        text = _LINE_END_SPACE.sub("", text)
    if "\n\n\n" in text:
        text = _BLANK_LINES.sub("\n\n", text)
    return text.strip("\n").rstrip()


def lone_surrogates_replaced(text: str) -> str:
    """Return the text with halves of surrogate pairs, which no UTF-8 can hold, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@dataclass
class CharacterLosses:
    """What was lost between texts before and after a repair, by class of character; adds up over processes."""

    counts: Counter[str] = field(default_factory=Counter)
    gained: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    changed_documents: int = 0

    def add(self, before: str, after: str) -> None:
        """Count the characters of one document that its repair took away."""
        self.changed_documents += 1
        held, left = Counter(before), Counter(after)
        self.gained.update(left - held)
        for character, count in (held - left).items():
            self.counts[character] += count
            kind = character_class(character)
            shown = self.samples.setdefault(kind, [])
            if len(shown) < _SAMPLES_PER_CLASS:
                shown.append(_sample(before, after, character))

    def merge(self, other: CharacterLosses) -> None:
        """Add what another process counted."""
        self.counts.update(other.counts)
        self.gained.update(other.gained)
        self.changed_documents += other.changed_documents
        for kind, samples in other.samples.items():
            mine = self.samples.setdefault(kind, [])
            mine.extend(samples[: _SAMPLES_PER_CLASS - len(mine)])

    def by_class(self) -> list[dict[str, Any]]:
        """Return one row a class, most lost first: class, characters with counts, samples before and after."""
        classes: dict[str, Counter[str]] = {}
        for character, count in self.counts.items():
            classes.setdefault(character_class(character), Counter())[character] += count
        rows = [
            {
                "class": kind,
                "lost": counts.total(),
                "characters": {shown_character(c): n for c, n in counts.most_common(12)},
                "other_characters": max(0, len(counts) - 12),
                "samples": [{"before": before, "after": after} for before, after in self.samples.get(kind, [])],
            }
            for kind, counts in classes.items()
        ]
        return sorted(rows, key=lambda row: (-row["lost"], row["class"]))


_CLASSES = {
    "Lu": "letter, capital",
    "Ll": "letter, small",
    "Lt": "letter, title case",
    "Lm": "letter, modifier",
    "Lo": "letter, other",
    "Mn": "combining mark",
    "Mc": "combining mark, spacing",
    "Me": "combining mark, enclosing",
    "Nd": "digit",
    "Nl": "number letter",
    "No": "number, other",
    "Pc": "punctuation, connector",
    "Pd": "punctuation, dash",
    "Ps": "punctuation, opening",
    "Pe": "punctuation, closing",
    "Pi": "punctuation, opening quote",
    "Pf": "punctuation, closing quote",
    "Po": "punctuation, other",
    "Sm": "symbol, mathematics",
    "Sc": "symbol, currency",
    "Sk": "symbol, modifier",
    "So": "symbol, other",
    "Zs": "space",
    "Zl": "line separator",
    "Zp": "paragraph separator",
    "Cc": "control character",
    "Cf": "invisible format mark",
    "Cs": "half of a surrogate pair",
    "Co": "private use",
    "Cn": "unassigned",
}


def character_class(character: str) -> str:
    """Name a character's class: its Unicode category, with letters beyond ASCII apart.

    Example:
        >>> character_class("ù"), character_class("°"), character_class("o")
        ('letter, small (beyond ASCII)', 'symbol, other', 'letter, small')
    """
    name = _CLASSES[unicodedata.category(character)]
    return f"{name} (beyond ASCII)" if name.startswith("letter") and not character.isascii() else name


def shown_character(character: str) -> str:
    """Return the character, with its code point where it cannot be seen."""
    code = f"U+{ord(character):04X}"
    visible = unicodedata.category(character)[0] not in "ZCM"
    return f"{character} {code}" if visible else code


def _sample(before: str, after: str, character: str) -> tuple[str, str]:
    """Show the surroundings of a lost character in both texts."""
    start = before.find(character)
    found = 0
    while start >= 0:
        context = before[max(0, start - 10) : start]
        found = after.find(context)
        if found >= 0 and after[found + len(context) : found + len(context) + 1] != character:
            break
        start = before.find(character, start + 1)
    if start < 0:
        # Its surroundings changed as well: show the first difference instead.
        start = next((i for i, (one, two) in enumerate(zip(before, after, strict=False)) if one != two), len(after))
        context, found = before[max(0, start - 10) : start], max(0, start - 10)
    left = max(0, start - _SAMPLE_MARGIN)
    left_after = max(0, found + len(context) - _SAMPLE_MARGIN)
    return (
        before[left : start + _SAMPLE_MARGIN],
        after[left_after : found + len(context) + _SAMPLE_MARGIN],
    )
