"""A checkpoint, scored on suites: load, score, keep.

What `Scorer` does for a model in memory, for a model on disk or on a hub. The weights' fingerprint is the model's key
in the store, so that the same weights under another path are not scored twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dapt_merge.errors import InputError, nearest
from dapt_merge.evaluation.items import TaskItems
from dapt_merge.evaluation.scorer import Progress, Scorer
from dapt_merge.evaluation.store import ItemStore
from dapt_merge.evaluation.suites import Suite, load_suite

DTYPES = ("auto", "float32", "bfloat16", "float16")


def evaluate(
    model: Any,
    suites: str | Path | Suite | Sequence[str | Path | Suite],
    *,
    tokenizer: Any = None,
    store: str | Path | ItemStore | None = None,
    model_key: str | None = None,
    dtype: str = "auto",
    batch_size: int = 8,
    max_length: int | None = None,
    limit: int | None = None,
    device: str | None = None,
    on_progress: Progress | None = None,
) -> dict[str, TaskItems]:
    """Score a checkpoint, a hub id or a model in memory on suites, item by item.

    Args:
        model: folder, hub id or `PreTrainedModel`.
        suites: suite files or loaded suites, one or several.
        tokenizer: tokenizer, or where it lies; None takes the one beside the model.
        store: an item store or its path; tasks found there are not scored again.
        model_key: the model's key in the store; None takes the fingerprint of its weights.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16"; ignored for a model in memory.
        batch_size, max_length, limit, on_progress: as for `Scorer`.
        device: where a loaded model goes; None takes the first GPU, or the CPU.

    Returns:
        score records by task, as `Scorer.score` returns them.

    Raises:
        InputError: the model, a suite, a task or its data is missing or cannot be used.

    Example:
        >>> items = evaluate("merged/", "suites/general.yaml", store="items.sqlite")  # doctest: +SKIP
        >>> items["wiki_en"].score  # doctest: +SKIP
        0.912
    """
    scorer = make_scorer(
        model,
        suites,
        tokenizer=tokenizer,
        dtype=dtype,
        batch_size=batch_size,
        max_length=max_length,
        limit=limit,
        device=device,
    )
    opened = ItemStore(store) if isinstance(store, str | Path) else store
    if opened is not None and model_key is None:
        model_key = weights_key(model)
    return scorer.score(model_key, opened, on_progress)


def make_scorer(
    model: Any,
    suites: str | Path | Suite | Sequence[str | Path | Suite],
    *,
    tokenizer: Any = None,
    dtype: str = "auto",
    batch_size: int = 8,
    max_length: int | None = None,
    limit: int | None = None,
    device: str | None = None,
) -> Scorer:
    """Load what is given by name and return a `Scorer`; arguments as for `evaluate`."""
    listed = [suites] if isinstance(suites, str | Path | Suite) else list(suites)
    loaded = [suite if isinstance(suite, Suite) else load_suite(suite) for suite in listed]
    if tokenizer is None:
        tokenizer = model if isinstance(model, str | Path) else model.config.name_or_path
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    if isinstance(model, str | Path):
        model = load_causal_lm(model, dtype=dtype, device=device)
    return Scorer(loaded, model, tokenizer, batch_size=batch_size, max_length=max_length, limit=limit)


def load_causal_lm(source: str | Path, *, dtype: str = "auto", device: str | None = None) -> Any:
    """Load a causal language model from a folder or hub id; its own code is never run.

    Raises:
        InputError: there is no such model, it cannot be read, or the dtype is unknown.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise InputError(f"unknown dtype '{dtype}'.{nearest(dtype, DTYPES)}", remedy=f"Known: {', '.join(DTYPES)}.")
    _refuse_missing(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(source), dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:
        raise _unreadable("model", source, error) from error
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def load_tokenizer(source: str | Path) -> Any:
    """Load a tokenizer from a folder or hub id; its own code is never run.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if not str(source):
        raise InputError("the model in memory does not say where its tokenizer lies", remedy="Pass tokenizer=….")
    _refuse_missing(source)
    try:
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:
        raise _unreadable("tokenizer", source, error) from error


def weights_key(model: Any) -> str:
    """Fingerprint of a model's weights, whatever its folder, shards or name: its key in an item store."""
    from dapt_merge.checkpoints import open_checkpoint

    return open_checkpoint(model).fingerprint()


def _refuse_missing(source: str | Path) -> None:
    """Tell a mistyped folder from a hub id: "name" and "owner/name" may be on a hub, other paths may not."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError("the folder holds no model: config.json is missing", where=path)
        return
    text = str(source)
    if path.is_file():
        raise InputError("a model is a folder, this is a file", where=path, remedy="Name the folder that it lies in.")
    if isinstance(source, Path) or text.startswith(("/", ".", "~")) or text.endswith("/") or text.count("/") > 1:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(
            f"the model folder does not exist.{nearest(path.name, siblings)}", where=path, remedy="Check the path."
        )


def _unreadable(what: str, source: str | Path, error: Exception) -> InputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InputError(
        f"the {what} cannot be loaded: {type(error).__name__}: {reason}",
        where=source,
        remedy="Name a folder with config.json, safetensors weights and a tokenizer, or a hub id that can be reached.",
    )
