"""What every text source of the demo gives: documents with a source, a licence, a side of the split and a group.

The idea: a document belongs to a *group* (one web page, one dictionary word, one cluster of rewordings), and a split
never cuts through a group. What this module does not know: how the groups are found.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "search", "report"]


@dataclass(frozen=True)
class Document:
    """One text. `language` is an ISO 639-1 code; `group` names what must stay on one side of the split.

    Example:
        >>> Document("d1", "Texte.", source="icd11", licence="…", language="fr", split="train", group="d1").split
        'train'
    """

    id: str
    text: str
    source: str
    licence: str
    language: str
    split: Split
    group: str

    def with_split(self, split: Split) -> Document:
        """Return the same document on another side of the split."""
        return dataclasses.replace(self, split=split)


def write_jsonl(path: Path, rows: Iterable[Document | Mapping[str, Any]]) -> int:
    """Write one JSON object a line (UTF-8), and return the number of lines."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for row in rows:
            content = dataclasses.asdict(row) if isinstance(row, Document) else dict(row)
            stream.write(json.dumps(content, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file."""
    with Path(path).open(encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)
