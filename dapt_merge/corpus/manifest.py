"""What a corpus is made of and what became of every document, as data, and the sentences that nobody should miss.

The page to read is made of this data alone: `manifest_page`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from dapt_merge.corpus.config import CorpusConfig
from dapt_merge.corpus.documents import DocumentStore
from dapt_merge.corpus.markdown import counted_documents
from dapt_merge.corpus.mixing import Mix
from dapt_merge.corpus.packing import PackedCounts
from dapt_merge.corpus.tokens import TokenStore, tokenizer_fingerprint


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

    sources = [
        _source_row(config, number, documents.report["sources"][number], tokens, mix)
        for number in range(len(config.sources))
    ]
    return {
        "fingerprint": fingerprint,
        "steps": config.model_dump(mode="json", include={"clean", "deduplicate", "decontaminate"}),
        "sources": sources,
        "tokens": _tokens_row(config, tokens, mix, tokenizer),
        "packing": _packing_row(config, tokens, mix, counts),
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


def _tokens_row(config: CorpusConfig, tokens: TokenStore, mix: Mix, tokenizer: Any) -> dict[str, Any]:
    total = sum(mix.tokens)
    replay = sum(count for source, count in zip(config.sources, mix.tokens, strict=True) if source.role == "replay")
    return {
        "held": sum(mix.held),
        "read": total,
        "domain": total - replay,
        "replay": replay,
        "replay_share_asked": config.replay_share,
        "replay_share": replay / total,
        "highest_id": tokens.highest_id,
        "tokenizer": getattr(tokenizer, "name_or_path", ""),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }


def _packing_row(config: CorpusConfig, tokens: TokenStore, mix: Mix, counts: PackedCounts) -> dict[str, Any]:
    return {
        "rows": mix.rows,
        "sequence_length": config.sequence_length,
        "attention": config.attention,
        "seed": config.seed,
        **asdict(counts),
        "documents_longer_than_a_row": int((tokens.lengths > config.sequence_length).sum()),
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
            notes.append(f"{source['name']}: {counted_documents(sum(left.values()))} left out ({listed})")
    return notes
