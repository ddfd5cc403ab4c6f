"""The ANSM's thesaurus of drug interactions as French prose, split so that no rewording crosses sides.

The idea: five editions repeat each other, the same pair stands under both drugs, and one mechanism is told for a whole
class in the same words. So the entries are grouped by unordered pair *and* by any shared run of eight words, and only
small, separate groups are held out. What this module does not know: how many items are wanted.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapt_merge.demo.documents import Document, Split
from dapt_merge.demo.french import accented_forms, join_lines, readable_name, sentence, unglue
from dapt_merge.demo.leaks import connected_groups, ngrams, normalised, words
from dapt_merge.demo.packages import DRUG_INTERACTIONS

_LEVELS = {
    "CONTRE-INDICATION": "contre-indication",
    "Association DECONSEILLEE": "association déconseillée",
    "Précaution d'emploi": "précaution d'emploi",
    "A prendre en compte": "à prendre en compte",
    "Il convient de prendre en compte": "à prendre en compte",
}
_TEXTS = (
    "Interaction entre {first} et {second}. Niveau de contrainte : {level}. {mechanism} {conduct}",
    "Traitement en cours : {first}. Médicament associé : {second}. {mechanism} Conclusion : {level}. {conduct}",
    "Association médicamenteuse : {first} avec {second} ({level}). {mechanism} {conduct}",
)
_PAGE_FOOTER = re.compile(
    r"\s*(Thésaurus des interactions médicamenteuses|Interactions médicamenteuses - Thésaurus)\.?"
)
# A full stop without the space after it, and a second indication that begins without any stop before it.
_LOST_GAP = re.compile(r"(?<=[a-zéè0-9])\.(?=[A-ZÉÀ][a-zé' ])|(?<=[a-zéè]{4})(?=Pour )")
_LARGEST_HELD_OUT_GROUP = 6
_FEWEST_HELD_OUT_WORDS = 12


@dataclass(frozen=True)
class Interaction:
    """One entry: two drugs or classes, the constraint level, the mechanism and what to do, all in clean French."""

    first: str
    second: str
    level: str
    mechanism: str
    conduct: str

    @property
    def pair(self) -> tuple[str, ...]:
        """The two names, normalised, in an order that does not depend on which one the entry stands under."""
        return tuple(sorted((normalised(self.first), normalised(self.second))))

    @property
    def body(self) -> str:
        """The prose without the two names."""
        return f"{self.mechanism} {self.conduct}".strip()


def read_interactions(folder: Path) -> list[Interaction]:
    """Read every edition of the unpacked thesaurus, newest first; each pair with each wording once."""
    rows: list[Mapping[str, Any]] = []
    for file in sorted(folder.rglob("*.json"), key=lambda path: (path.parent.name, path.name), reverse=True):
        edition = json.loads(file.read_text(encoding="utf-8"))
        rows.extend(row for row in edition if "interaction_mechanism" in row)
    accents = accented_forms(row["interaction_mechanism"] + " " + row["description"] for row in rows)
    kept: dict[tuple[object, ...], Interaction] = {}
    for row in rows:
        interaction = _interaction(row, accents)
        if interaction.body:
            kept.setdefault((interaction.pair, normalised(interaction.body)), interaction)
    return list(kept.values())


def _interaction(row: Mapping[str, Any], accents: dict[str, str]) -> Interaction:
    levels, conduct = [], []
    for level in row["severity_levels"]:
        levels.append(_LEVELS[level["level"]])
        # An advice that cannot be found in place cannot be unglued: it is left out.
        advice = _prose(unglue(level["info"], row["description"]) or "")
        if advice:
            conduct.append(f"{levels[-1].capitalize()} : {advice}" if len(row["severity_levels"]) > 1 else advice)
    return Interaction(
        first=readable_name(row["main_drug"], accents),
        second=readable_name(row["plus_drug"], accents),
        level=" ou ".join(dict.fromkeys(levels)),
        mechanism=_prose(row["interaction_mechanism"]),
        conduct=" ".join(conduct),
    )


def _prose(passage: str) -> str:
    without_footer = _PAGE_FOOTER.sub("", join_lines(passage))
    return sentence(_LOST_GAP.sub(". ", without_footer).lstrip(" :-"))


def split_interactions(
    interactions: Sequence[Interaction], counts: Mapping[Split, int], seed: int
) -> tuple[list[Document], list[Document]]:
    """Return (held-out documents, training documents).

    Args:
        interactions: as read.
        counts: for each held-out side, how many groups it gets. The longest document of a group is held out, if it
            shares no run of words with another side; the others of the group are not used at all.
        seed: chooses the groups, and the template of each text.
    """
    marks = [{item.pair, *ngrams(item.body)} for item in interactions]
    groups: dict[int, list[Interaction]] = {}
    for index, group in enumerate(connected_groups(marks)):
        groups.setdefault(group, []).append(interactions[index])
    eligible = [group for group, members in groups.items() if _may_be_held_out(members)]
    random.Random(f"{seed}:ansm groups").shuffle(eligible)
    held_out: list[Document] = []
    taken = set()
    for side, count in counts.items():
        for group in [eligible.pop() for _ in range(min(count, len(eligible)))]:
            taken.add(group)
            longest = max(groups[group], key=lambda item: (len(item.body), item.body))
            document = _document(longest, group, seed).with_split(side)
            other_sides = [other for other in held_out if other.split != side]
            held_out.extend(_without_shared_runs([document], other_sides))
    rest = [_document(item, group, seed) for group, members in groups.items() if group not in taken for item in members]
    return held_out, _without_shared_runs(rest, held_out)


def _may_be_held_out(members: Sequence[Interaction]) -> bool:
    longest = max(len(words(item.body)) for item in members)
    return len(members) <= _LARGEST_HELD_OUT_GROUP and longest >= _FEWEST_HELD_OUT_WORDS


def _without_shared_runs(documents: Iterable[Document], held_out: Iterable[Document]) -> list[Document]:
    # Runs that only arise across the seams of a template ("… précaution d'emploi. Surveillance clinique …").
    forbidden = {run for document in held_out for run in ngrams(document.text)}
    return [document for document in documents if not ngrams(document.text) & forbidden]


def _document(interaction: Interaction, group: int, seed: int) -> Document:
    content = f"{interaction.pair}|{normalised(interaction.body)}"
    name = hashlib.sha256(content.encode()).hexdigest()[:12]
    template = random.Random(f"{seed}:template:{name}").choice(_TEXTS)
    text = template.format(
        first=interaction.first,
        second=interaction.second,
        level=interaction.level,
        mechanism=interaction.mechanism,
        conduct=interaction.conduct,
    )
    return Document(
        id=f"ansm-{name}",
        text=" ".join(text.split()),
        source="ansm",
        licence=DRUG_INTERACTIONS.licence,
        language="fr",
        split="train",
        group=f"ansm-{group}",
    )
