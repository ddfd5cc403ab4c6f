"""The Littré's medical senses: real French medical prose, of the nineteenth century, if the dictionary can be had.

The idea: an entry is a list of senses, each of which may open with its field ("Terme de médecine."); only the senses of
medicine, anatomy, surgery, pharmacy and physiology are kept, without the quotations, and a headword lies whole on one
side of the split. What this module does not know: whether the dictionary is wanted.
"""

from __future__ import annotations

import gzip
import html
import random
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dapt_merge.demo.documents import Document, Split
from dapt_merge.demo.french import tidy
from dapt_merge.demo.leaks import connected_groups, ngrams, normalised, words
from dapt_merge.demo.packages import LITTRE

_FIELD = re.compile(
    r"Termes? (?:de |d')(?:médecine|anatomie|chirurgie|pharmacie|physiologie|pathologie|thérapeutique|obstétrique)"
)
_QUOTATION = re.compile(r'<span foreground="#0000CD">.*', re.DOTALL)
_FEWEST_WORDS = 12
_MOST_CHARACTERS = 700


def read_medical_senses(folder: Path) -> list[Document]:
    """Read the medical senses of the unpacked dictionary; one document for each headword, in the order of the file."""
    senses: dict[str, list[str]] = {}
    for headword, entry in _entries(folder):
        found = [sense for sense in _senses(entry) if _FIELD.search(sense)]
        senses.setdefault(headword, []).extend(sense for sense in found if sense not in senses.get(headword, ()))
    return [_document(headword, " ".join(found)) for headword, found in senses.items() if found]


def split_senses(
    documents: Sequence[Document], counts: Mapping[Split, int], seed: int
) -> tuple[list[Document], list[Document]]:
    """Return (held-out documents, training documents), split by headword and by any shared run of eight words."""
    marks = [{normalised(document.id), *ngrams(document.text)} for document in documents]
    groups: dict[int, list[Document]] = {}
    for index, group in enumerate(connected_groups(marks)):
        groups.setdefault(group, []).append(documents[index])
    alone = [members[0] for members in groups.values() if len(members) == 1]
    eligible = [d for d in alone if len(words(d.text)) >= _FEWEST_WORDS and len(d.text) <= _MOST_CHARACTERS]
    random.Random(f"{seed}:littré").shuffle(eligible)
    held_out: list[Document] = []
    for side, count in counts.items():
        held_out.extend(document.with_split(side) for document in eligible[:count])
        eligible = eligible[count:]
    taken = {document.id for document in held_out}
    return held_out, [document for document in documents if document.id not in taken]


def _entries(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (headword, marked-up entry). The index is headword, NUL, offset and length (big-endian 32 bits each)."""
    index = next(folder.rglob("XMLittre.idx")).read_bytes()
    with gzip.open(next(folder.rglob("XMLittre.dict.dz")), "rb") as stream:
        content = stream.read()
    spellings: dict[tuple[int, int], str] = {}
    position = 0
    while position < len(index):
        end = index.index(b"\0", position)
        offset, length = struct.unpack(">II", index[end + 1 : end + 9])
        headword, position = index[position:end].decode("utf-8"), end + 9
        # Several spellings point at one entry, some of them with the accents stripped: the accented one stands for all.
        known = spellings.setdefault((offset, length), headword)
        if _accents(headword) > _accents(known):
            spellings[offset, length] = headword
    for (offset, length), headword in spellings.items():
        yield headword, content[offset : offset + length].decode("utf-8")


def _accents(text: str) -> int:
    return sum(ord(character) > 127 for character in text)


def _senses(entry: str) -> Iterator[str]:
    body = entry.split("ÉTYMOLOGIE")[0].split("HISTORIQUE")[0]
    for sense in re.split(r"\n\n|\n {4}", body):
        text = tidy(html.unescape(re.sub(r"<[^>]+>", "", _QUOTATION.sub("", sense))))
        yield re.sub(r"^\d+° ", "", text)


def _document(headword: str, text: str) -> Document:
    name = tidy(headword).split(",")[0].split(" (")[0]
    return Document(
        id=f"littré-{tidy(headword).lower()}",
        text=f"{name.capitalize()}. {text}",
        source="littre",
        licence=LITTRE.licence,
        language="fr",
        split="train",
        group=name.lower(),
    )
