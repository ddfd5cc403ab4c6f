"""What a corpus is made of and what became of every document, as data and as a page to read.

The page answers in this order: what is in it and under which licences; what a model reads of it; what was left out and
why; what repairs took away from the texts; what repeated what; what the items to come were found in.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dapt_merge.corpus.config import CorpusConfig
from dapt_merge.corpus.documents import REMOVED, DocumentStore
from dapt_merge.corpus.mixing import Mix
from dapt_merge.corpus.packing import PackedCounts
from dapt_merge.corpus.tokens import TokenStore, tokenizer_fingerprint

_SHOWN_CONTACTS = 12


def corpus_manifest(
    config: CorpusConfig,
    documents: DocumentStore,
    tokens: TokenStore,
    mix: Mix,
    counts: PackedCounts,
    tokenizer: Any,
    fingerprint: str,
) -> dict[str, Any]:
    """Gather everything that is known of a corpus, as plain data."""
    import datasets
    import tokenizers
    import transformers

    total = sum(mix.tokens)
    replay = sum(tokens for source, tokens in zip(config.sources, mix.tokens, strict=True) if source.role == "replay")
    sources = [
        _source_row(config, number, documents.report["sources"][number], tokens, mix)
        for number in range(len(config.sources))
    ]
    return {
        "fingerprint": fingerprint,
        "steps": config.model_dump(mode="json", include={"clean", "deduplicate", "decontaminate"}),
        "sources": sources,
        "tokens": {
            "held": sum(mix.held),
            "read": total,
            "domain": total - replay,
            "replay": replay,
            "replay_share_asked": config.replay_share,
            "replay_share": replay / total,
            "highest_id": tokens.highest_id,
            "tokenizer": getattr(tokenizer, "name_or_path", ""),
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        },
        "packing": {
            "rows": mix.rows,
            "sequence_length": config.sequence_length,
            "attention": config.attention,
            "seed": config.seed,
            **asdict(counts),
            "documents_longer_than_a_row": int((tokens.lengths > config.sequence_length).sum()),
        },
        "contamination": documents.report["contamination"],
        "duplication": documents.report["duplication"],
        "versions": {
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "datasets": datasets.__version__,
        },
    }


def _source_row(
    config: CorpusConfig, number: int, of_documents: Mapping[str, Any], tokens: TokenStore, mix: Mix
) -> dict[str, Any]:
    source = config.sources[number]
    lengths = tokens.lengths[tokens.sources == number]
    return {
        "name": source.title,
        "role": source.role,
        "licence": source.licence,
        "language": source.language,
        "place": source.place,
        **of_documents,
        "tokens_held": int(lengths.sum()),
        "tokens_of_a_document": {
            "median": int(np.median(lengths)),
            "longest": int(lengths.max()),
        },
        "weight": source.weight,
        "share_asked": source.share,
        "tokens_read": mix.tokens[number],
        "share_of_tokens": mix.tokens[number] / sum(mix.tokens),
        "epochs": mix.tokens[number] / mix.held[number],
        "tokens_never_read": max(0, mix.held[number] - mix.tokens[number]),
    }


def notes_on(manifest: Mapping[str, Any]) -> list[str]:
    """Return the sentences that a user should see even without opening the manifest."""
    tokens, sources = manifest["tokens"], manifest["sources"]
    epochs = {
        role: sum(s["tokens_read"] for s in of_role) / sum(s["tokens_held"] for s in of_role)
        for role in ("domain", "replay")
        if (of_role := [s for s in sources if s["role"] == role])
    }
    notes = [
        f"{manifest['packing']['rows']:,} rows, {tokens['read']:,} tokens: {tokens['domain']:,} domain "
        f"({epochs['domain']:.2f} epochs), {tokens['replay']:,} replay ({epochs.get('replay', 0):.2f} epochs)"
    ]
    clean = manifest["steps"]["clean"]
    for source in sources:
        if clean and clean["language"] and source["language"] is None:
            notes.append(f"no language is told for {source['name']}, so the language filter did not look at it")
        if source["tokens_never_read"]:
            notes.append(f"the budget leaves {source['tokens_never_read']:,} tokens of {source['name']} unread")
        if source["epochs"] > 4:
            notes.append(f"{source['name']} is read {source['epochs']:.1f} times; expect little from more than four")
        left = {reason: count for reason, count in source["left_out"].items() if count}
        if left:
            listed = ", ".join(f"{count:,} {reason}" for reason, count in left.items())
            notes.append(f"{source['name']}: {_documents(sum(left.values()))} left out ({listed})")
    return notes


def manifest_in_markdown(manifest: Mapping[str, Any]) -> str:
    """Return the manifest as a page of Markdown."""
    parts = [
        _opening(manifest),
        _contents(manifest["sources"]),
        _reading(manifest),
        _left_out(manifest["sources"]),
        _repairs(manifest["sources"]),
        _repetitions(manifest["duplication"]),
        _contacts(manifest["contamination"], manifest["steps"]["decontaminate"]),
    ]
    return "\n".join(part.rstrip() + "\n" for part in parts if part)


def _opening(manifest: Mapping[str, Any]) -> str:
    steps = {name: settings for name, settings in manifest["steps"].items() if settings is not None}
    tokens = manifest["tokens"]
    ran = ", ".join(steps) if steps else "none: the documents are as they were"
    return (
        f"# Corpus {manifest['fingerprint']}\n\n"
        f"{tokens['read']:,} tokens in {manifest['packing']['rows']:,} rows of "
        f"{manifest['packing']['sequence_length']:,}. Steps that ran: {ran}.\n\n"
        f"Tokenizer: `{Path(tokens['tokenizer']).name or tokens['tokenizer']}` "
        f"({tokens['tokenizer_fingerprint']}). All figures are in `manifest.json`; every document that was left out is "
        f"in `{REMOVED}`.\n"
    )


def _contents(sources: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            source["name"],
            source["role"],
            source["language"] or "not told",
            source["licence"] or "not told",
            f"{source['documents_read']:,}",
            f"{source['documents_kept']:,}",
            f"{source['tokens_held']:,}",
            f"{source['tokens_of_a_document']['median']:,} / {source['tokens_of_a_document']['longest']:,}",
            f"`{source['content']}`",
        ]
        for source in sources
    ]
    head = [
        "Source",
        "Role",
        "Language",
        "Licence",
        "Documents read",
        "kept",
        "Tokens",
        "a document: median / longest",
        "Content",
    ]
    return "## What is in it\n\n" + _table(head, rows, "llllrrrrl")


def _reading(manifest: Mapping[str, Any]) -> str:
    tokens, packing = manifest["tokens"], manifest["packing"]
    rows = [
        [
            source["name"],
            source["role"],
            f"{source['tokens_read']:,}",
            f"{100 * source['share_of_tokens']:.2f}%",
            f"{source['epochs']:.2f}",
            f"{source['tokens_never_read']:,}",
        ]
        for source in manifest["sources"]
    ]
    apart = (
        "kept within a document: position ids start again in every piece"
        if packing["attention"] == "document"
        else "not kept within a document: it looks at the whole row"
    )
    return (
        "## What a model reads\n\n"
        + _table(["Source", "Role", "Tokens", "Share", "Epochs", "Tokens never read"], rows, "llrrrr")
        + f"\nReplay: {100 * tokens['replay_share']:.3f}% of the tokens, "
        f"{100 * tokens['replay_share_asked']:g}% asked for. "
        f"{packing['documents_read']:,} documents are read, {packing['documents_in_pieces']:,} of them in several "
        f"pieces, because they cross the end of a row; none is cut short but the last of each source. Attention is "
        f"{apart}. {packing['targets']:,} tokens are predicted "
        f"({100 * packing['targets'] / max(tokens['read'], 1):.1f}%).\n"
    )


def _left_out(sources: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [source["name"], reason, f"{count:,}", f"{100 * count / source['documents_read']:.1f}%"]
        for source in sources
        for reason, count in source["left_out"].items()
    ]
    if not rows:
        return "## What was left out\n\nNothing.\n"
    return "## What was left out\n\n" + _table(["Source", "Why", "Documents", "Share"], rows, "llrr")


def _repairs(sources: Sequence[Mapping[str, Any]]) -> str:
    lines: list[str] = []
    for source in sources:
        cleaning = source["cleaning"]
        for step in ("unicode", "whitespace") if cleaning else ():
            found = cleaning[step]
            if found["documents_changed"]:
                lines.append(f"\n### {source['name']}: {step}, {_documents(found['documents_changed'])} changed\n")
                lines.append(_lost_characters(found["characters_lost"]))
                gained = ", ".join(f"{_code(c)} × {n:,}" for c, n in found["characters_gained"].items())
                if gained:
                    lines.append(f"In their place came {gained}.\n")
        if cleaning and cleaning["boilerplate"]["documents_changed"]:
            lines.append(_lost_lines(source["name"], cleaning["boilerplate"]))
    if not any(source["cleaning"] for source in sources):
        return ""
    body = "\n".join(lines) if lines else "\nNothing: no text was changed.\n"
    return "## What repairs took away\n\nEvery class of characters that a step left fewer of.\n" + body


def _lost_characters(classes: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for row in classes:
        shown = ", ".join(f"{_code(name)} × {count:,}" for name, count in row["characters"].items())
        more = f" and {row['other_characters']} others" if row["other_characters"] else ""
        samples = "<br>".join(f"{_code(s['before'])} → {_code(s['after'])}" for s in row["samples"])
        rows.append([row["class"], f"{row['lost']:,}", shown + more, samples])
    return (
        _table(["Class", "Lost", "Characters", "Before → after"], rows, "lrll") if rows else "No character was lost.\n"
    )


def _lost_lines(name: str, boilerplate: Mapping[str, Any]) -> str:
    rows = [[_code(line), f"{count:,}"] for line, count in boilerplate["lines"].items()]
    return (
        f"\n### {name}: boilerplate, {boilerplate['lines_lost']:,} lines out of "
        f"{_documents(boilerplate['documents_changed'])}\n\n" + _table(["Line", "Times"], rows, "lr")
    )


def _repetitions(duplication: Mapping[str, Any] | None) -> str:
    if duplication is None:
        return ""
    parts = ["## What repeated what\n"]
    for kind, title in (("exact", "Exact copies"), ("near", "Near copies")):
        found = duplication.get(kind)
        if found is None:
            continue
        parts.append(f"\n### {title}: {_documents(found['documents'])} left out\n")
        if found["documents"]:
            rows = [[b["left_out_of"], b["kept_in"], f"{b['documents']:,}"] for b in found["between"]]
            parts.append(_table(["Left out of", "First copy kept in", "Documents"], rows, "llr"))
            samples = [
                [
                    f"{sample['similarity']:.2f}",
                    *(
                        f"{_code(_short(sample[side]['document']))}<br>{_cell(sample[side]['text'])}"
                        for side in ("left_out", "kept")
                    ),
                ]
                for sample in found["samples"]
            ]
            parts.append(_table(["Similarity", "Left out", "Kept"], samples, "rll"))
    return "\n".join(parts)


def _contacts(contamination: Mapping[str, Any] | None, settings: Mapping[str, Any] | None) -> str:
    if contamination is None or settings is None:
        return ""
    tasks = [
        [
            task["task"],
            f"{task['items']:,}",
            f"{task['items_too_short_to_look_for']:,}",
            f"{task['items_found']:,}",
            f"{task['documents']:,}",
            f"{100 * task['largest_share_of_an_item']:.0f}%",
        ]
        for task in contamination["tasks"]
    ]
    verb = "left out" if contamination["removed"] else "reported and kept"
    shown = _worst_by_item(contamination["documents"])
    documents = [
        [
            _code(_short(row["document"])),
            ", ".join(sorted({task for task, _, _ in row["items"]})),
            _shown_items(row["items"]),
            _cell(row["words"]),
        ]
        for row in shown
    ]
    head = ["Task", "Items", "too short to look for", "found in documents", "Documents", "most of an item in one"]
    found = f"{_documents(contamination['found'])}, {verb}" if contamination["found"] else "none"
    page = (
        f"## Items found in the corpus: {found}\n\nLooked for: runs of {settings['ngram']} words, at least "
        f"{100 * settings['minimum_share']:g}% of those of an item (at 0%: one run).\n\n"
    )
    page += _table(head, tasks, "lrrrrr")
    if documents:
        page += (
            "\nThe documents that hold most of an item, one for each item; all of them are in `contamination.jsonl`.\n"
        )
        page += "\n" + _table(["Document", "Tasks", "Items (share of each)", "Words shared"], documents, "llll")
    return page


def _worst_by_item(documents: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the documents with most of an item, one for each item."""
    shown: dict[str, Mapping[str, Any]] = {}
    for row in sorted(documents, key=lambda row: -max(share for _, _, share in row["items"])):
        worst = max(row["items"], key=lambda item: item[2])
        shown.setdefault(worst[1], row)
    return list(shown.values())[:_SHOWN_CONTACTS]


def _shown_items(items: Sequence[Sequence[Any]]) -> str:
    """Name the items that a document has most of, by the first digits of their ids."""
    most = sorted(items, key=lambda item: -item[2])[:3]
    more = f" and {len(items) - len(most)} more" if len(items) > len(most) else ""
    return ", ".join(f"{item[:8]} ({100 * share:.0f}%)" for _, item, share in most) + more


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], alignment: str) -> str:
    rule = ["---:" if side == "r" else "---" for side in alignment]
    cells = [[_cell(part) for part in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *cells]) + "\n"


def _cell(text: str) -> str:
    return text.replace("\\|", "|").replace("|", "\\|").replace("\n", "⏎")


def _code(text: str) -> str:
    return f"`{''.join(map(_visible, text))}`"


def _visible(character: str) -> str:
    """Return a character, or what stands for one that cannot be seen."""
    if character in "\n`":
        return {"\n": "⏎", "`": "ˋ"}[character]
    kind = unicodedata.category(character)
    if kind == "Cc":
        return chr(0x2400 + ord(character)) if ord(character) < 32 else f"[U+{ord(character):04X}]"
    if kind.startswith("M"):
        return f"◌{character}"
    return f"[U+{ord(character):04X}]" if kind in ("Cf", "Zl", "Zp", "Co", "Cn") or character == "\u00a0" else character


def _documents(count: int) -> str:
    return f"{count:,} document" if count == 1 else f"{count:,} documents"


def _short(place: str) -> str:
    """Return the file's name and the line of a place."""
    return place.rsplit("/", 1)[-1]
