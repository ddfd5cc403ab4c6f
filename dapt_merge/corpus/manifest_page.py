"""The manifest of a corpus as a page to read.

It answers in this order: what is in the corpus and under which licences; what a model reads of it; what was left out
and why; what repairs took away from the texts; what repeated what; what the items to come were found in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dapt_merge.corpus.cleaned_file import REMOVED
from dapt_merge.corpus.markdown import cell, code, counted_documents, table

_SHOWN_CONTACTS = 12


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
    return "## What is in it\n\n" + table(head, rows, "llllrrrrl")


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
        + table(["Source", "Role", "Tokens", "Share", "Epochs", "Tokens never read"], rows, "llrrrr")
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
    return "## What was left out\n\n" + table(["Source", "Why", "Documents", "Share"], rows, "llrr")


def _repairs(sources: Sequence[Mapping[str, Any]]) -> str:
    lines: list[str] = []
    for source in sources:
        cleaning = source["cleaning"]
        for step in ("unicode", "whitespace") if cleaning else ():
            found = cleaning[step]
            if found["documents_changed"]:
                lines.append(
                    f"\n### {source['name']}: {step}, {counted_documents(found['documents_changed'])} changed\n"
                )
                lines.append(_lost_characters(found["characters_lost"]))
                gained = ", ".join(f"{code(c)} × {n:,}" for c, n in found["characters_gained"].items())
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
        shown = ", ".join(f"{code(name)} × {count:,}" for name, count in row["characters"].items())
        more = f" and {row['other_characters']} others" if row["other_characters"] else ""
        samples = "<br>".join(f"{code(s['before'])} → {code(s['after'])}" for s in row["samples"])
        rows.append([row["class"], f"{row['lost']:,}", shown + more, samples])
    return (
        table(["Class", "Lost", "Characters", "Before → after"], rows, "lrll") if rows else "No character was lost.\n"
    )


def _lost_lines(name: str, boilerplate: Mapping[str, Any]) -> str:
    rows = [[code(line), f"{count:,}"] for line, count in boilerplate["lines"].items()]
    return (
        f"\n### {name}: boilerplate, {boilerplate['lines_lost']:,} lines out of "
        f"{counted_documents(boilerplate['documents_changed'])}\n\n" + table(["Line", "Times"], rows, "lr")
    )


def _repetitions(duplication: Mapping[str, Any] | None) -> str:
    if duplication is None:
        return ""
    parts = ["## What repeated what\n"]
    for kind, title in (("exact", "Exact copies"), ("near", "Near copies")):
        found = duplication.get(kind)
        if found is None:
            continue
        parts.append(f"\n### {title}: {counted_documents(found['documents'])} left out\n")
        if found["documents"]:
            rows = [[b["left_out_of"], b["kept_in"], f"{b['documents']:,}"] for b in found["between"]]
            parts.append(table(["Left out of", "First copy kept in", "Documents"], rows, "llr"))
            samples = [
                [
                    f"{sample['similarity']:.2f}",
                    *(
                        f"{code(_short(sample[side]['document']))}<br>{cell(sample[side]['text'])}"
                        for side in ("left_out", "kept")
                    ),
                ]
                for sample in found["samples"]
            ]
            parts.append(table(["Similarity", "Left out", "Kept"], samples, "rll"))
    return "\n".join(parts)


def _contacts(contamination: Mapping[str, Any] | None, settings: Mapping[str, Any] | None) -> str:
    if contamination is None or settings is None:
        return ""
    verb = "left out" if contamination["removed"] else "reported and kept"
    found = f"{counted_documents(contamination['found'])}, {verb}" if contamination["found"] else "none"
    page = (
        f"## Items found in the corpus: {found}\n\nLooked for: runs of {settings['ngram']} words, at least "
        f"{100 * settings['minimum_share']:g}% of those of an item (at 0%: one run).\n\n"
    )
    page += _searched_tasks(contamination["tasks"])
    shown = _worst_by_item(contamination["documents"])
    if shown:
        page += (
            "\nThe documents that hold most of an item, one for each item; all of them are in `contamination.jsonl`.\n"
        )
        page += "\n" + _contaminated_documents(shown)
    return page


def _searched_tasks(tasks: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            task["task"],
            f"{task['items']:,}",
            f"{task['items_too_short_to_look_for']:,}",
            f"{task['items_found']:,}",
            f"{task['documents']:,}",
            f"{100 * task['largest_share_of_an_item']:.0f}%",
        ]
        for task in tasks
    ]
    head = ["Task", "Items", "too short to look for", "found in documents", "Documents", "most of an item in one"]
    return table(head, rows, "lrrrrr")


def _contaminated_documents(documents: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            code(_short(row["document"])),
            ", ".join(sorted({task for task, _, _ in row["items"]})),
            _shown_items(row["items"]),
            cell(row["words"]),
        ]
        for row in documents
    ]
    return table(["Document", "Tasks", "Items (share of each)", "Words shared"], rows, "llll")


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


def _short(place: str) -> str:
    """Return the file's name and the line of a place."""
    return place.rsplit("/", 1)[-1]
