"""General English prose: what the base already knows, for replay and for measuring forgetting.

The idea: web pages, news and encyclopedia articles from one small collection; code, random strings, lists and what is
not fit to be shown are left out; every document lies whole on one side, and items are pieces of it cut at sentence
ends. What this module does not know: how many items are wanted.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dapt_merge.demo.documents import Document, Split
from dapt_merge.demo.french import tidy
from dapt_merge.demo.leaks import connected_groups, ngrams, words
from dapt_merge.demo.packages import GENERAL_TEXT

MEASURED_SOURCES = ("c4", "openwebtext", "wikipedia")
_REPLAY_ONLY_SOURCES = ("oscar",)
_FEWEST_CHARACTERS = 250
_LONGEST_HEADING = 80
_FUNCTION_WORD = re.compile(r"the|of|and|to|in|a|is|that|for|it|was|on|with|as|he|be|by|at|his|from|are|this")
_UNFIT = re.compile(
    r"fuck\w*|dicks?|cocks?|pussy|porn\w*|blowjobs?|cum|sluts?|xxx|anal|milf|tits|rap(?:e|ed|es|ist|ists|ing)"
)
_MARKUP = re.compile(r"\bcolspan\b|\bstyle=|\{\||\|\||</\w+>|http://\S+ http|[{};]\s*[{};]")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"”')]*\s+(?=[\"“'(]?[A-Z0-9])")


def read_general_prose(folder: Path) -> list[Document]:
    """Read the English prose of the unpacked collection, each text once, in the order of the file."""
    documents = []
    with next(folder.rglob("text_compression/samples.jsonl")).open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    for number, row in enumerate(rows):
        text = "\n".join(filter(None, map(tidy, row["text"].splitlines())))
        if row["type"] in (*MEASURED_SOURCES, *_REPLAY_ONLY_SOURCES) and is_english_prose(text):
            documents.append(_document(f"{row['type']}-{number}", _without_headings(text), row["type"]))
    return documents


def is_english_prose(text: str) -> bool:
    """Say whether `text` is running English: long enough, mostly letters and sentences, no markup, not lewd.

    Example:
        >>> is_english_prose("def f(x): return x + 1\\n" * 30)
        False
    """
    sequence = words(text)
    if len(text) < _FEWEST_CHARACTERS or _MARKUP.search(text) or any(map(_UNFIT.fullmatch, sequence)):
        return False
    letters = sum(character.isalpha() or character == " " for character in text) / len(text)
    function_words = sum(map(bool, map(_FUNCTION_WORD.fullmatch, sequence))) / len(sequence)
    lines = text.splitlines()
    in_sentences = sum(len(line) for line in lines if re.search(r"[.!?][\"”')]?$", line)) / len(text)
    return letters > 0.9 and function_words > 0.2 and in_sentences > 0.6


def _without_headings(text: str) -> str:
    kept = [line for line in text.splitlines() if len(line) > _LONGEST_HEADING or line[-1] in '.!?"”']
    return "\n".join(kept)


def split_general_prose(
    documents: Sequence[Document], counts: Mapping[Split, int], seed: int
) -> tuple[list[Document], list[Document]]:
    """Return (held-out documents, replay documents); `counts` is the number of documents of each measured source.

    Documents that share a run of eight words with another one (quotations, boilerplate) are for replay only when the
    other one is not held out.
    """
    groups = connected_groups([ngrams(document.text) for document in documents])
    alone = [document for index, document in enumerate(documents) if groups.count(groups[index]) == 1]
    held_out: list[Document] = []
    for source in MEASURED_SOURCES:
        eligible = [document for document in alone if document.source == source]
        random.Random(f"{seed}:general:{source}").shuffle(eligible)
        for side, count in counts.items():
            held_out.extend(document.with_split(side) for document in eligible[:count])
            eligible = eligible[count:]
    taken = {document.id for document in held_out}
    return held_out, [document for document in documents if document.id not in taken]


def pieces(text: str, most_characters: int) -> list[str]:
    """Cut `text` at sentence ends into pieces of at most `most_characters`, and drop pieces under a third of that.

    A single sentence beyond the limit is dropped too: it is mostly a list.

    Example:
        >>> pieces("One two three. Four five six. Seven.", 20)
        ['One two three.', 'Four five six.']
        >>> pieces("One two three. Four five six. Seven.", 24)
        ['One two three.', 'Four five six. Seven.']
    """
    found, current = [], ""
    for part in _SENTENCE_END.split(text):
        joined = f"{current} {part}".strip()
        if len(joined) <= most_characters:
            current = joined
        else:
            found.append(current)
            current = part
    found.append(current)
    return [piece for piece in found if most_characters / 3 <= len(piece) <= most_characters]


def one_piece_each(documents: Iterable[Document], most_characters: int, most_pieces: int, seed: int) -> list[Document]:
    """Return pieces as documents, round by round: the first of each document, then a second of each, up to a number.

    So a shorter list is made of more independent texts. The group of a piece is its document.
    """
    rounds: list[list[Document]] = [[] for _ in range(most_pieces)]
    for document in documents:
        found = pieces(document.text, most_characters)
        random.Random(f"{seed}:pieces:{document.id}").shuffle(found)
        for number, piece in enumerate(found[:most_pieces]):
            rounds[number].append(
                Document(
                    id=f"{document.id}-{number}",
                    text=piece,
                    source=document.source,
                    licence=document.licence,
                    language=document.language,
                    split=document.split,
                    group=document.id,
                )
            )
    return [piece for one_round in rounds for piece in one_round]


def _document(name: str, text: str, source: str) -> Document:
    return Document(
        id=name, text=text, source=source, licence=GENERAL_TEXT.licence, language="en", split="train", group=name
    )
