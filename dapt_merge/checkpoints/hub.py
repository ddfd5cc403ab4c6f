"""A model named by its hub id: found in the local cache, or downloaded there first.

`organisation/name` is its newest state, `organisation/name@revision` a branch, a tag or a commit; the hub's oldest
models have a `name` alone (`gpt2`, `camembert-base`). Only safetensors, JSON and tokenizer files are asked for, so a
pickle never reaches the disk. With `HF_HUB_OFFLINE=1` nothing leaves the machine.
"""

from __future__ import annotations

import re
from pathlib import Path

from dapt_merge.errors import InputError

WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.spm", "LICENSE*", "NOTICE*")
_UNWANTED = ("consolidated*.safetensors",)  # the same weights once more, under other names
# No name ends like a file of weights or a description of a merge: those are paths.
_HUB_ID = re.compile(
    r"(?P<model>(?:[A-Za-z0-9][\w.-]*/|(?=[A-Za-z0-9]))(?![\w.-]*(?:--|\.\.|\.(?:safetensors|gguf|bin|pth?|pkl|json|ya?ml)(?:@|$)))"
    r"[\w.-]*\w)(?:@(?P<revision>\w[\w./-]*))?"
)


def looks_like_hub_id(source: str) -> bool:
    """Say whether a text that names no local file could be a hub id, with or without organisation and revision.

    Example:
        >>> [looks_like_hub_id(name) for name in ("HuggingFaceTB/SmolLM2-135M", "gpt2", "a/b@v1.0")]
        [True, True, True]
        >>> [looks_like_hub_id(name) for name in ("./runs/a", "a/b/c", "model.safetensors")]
        [False, False, False]
    """
    return _HUB_ID.fullmatch(source) is not None


def is_cached(hub_id: str) -> bool:
    """Say whether the local cache has a hub model's configuration, in the revision that the id names."""
    from huggingface_hub import try_to_load_from_cache

    found = _HUB_ID.fullmatch(hub_id)
    if found is None:
        return False
    return isinstance(try_to_load_from_cache(found["model"], "config.json", revision=found["revision"]), str)


def snapshot_folder(hub_id: str, neighbour: str = "") -> Path:
    """Return the folder of a hub model's files in the local cache, downloading what is missing.

    Args:
        hub_id: `organisation/name` or `name`, alone or with `@revision`.
        neighbour: what to say first when the hub has no such model: which local path was perhaps meant.

    Raises:
        InputError: neither a local path nor a model, in that revision, that the hub (or, offline, its cache) has with
            weights in safetensors.
    """
    from huggingface_hub import snapshot_download

    found = _HUB_ID.fullmatch(hub_id)
    model, revision = (found["model"], found["revision"]) if found else (hub_id, None)
    try:
        folder = Path(
            snapshot_download(model, revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(_UNWANTED))
        )
    except Exception as error:  # the hub client raises many kinds; each means the same to the user
        raise _not_there(hub_id, model, revision, error, neighbour) from error
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            "the hub model has no safetensors weights here",
            where=folder,
            remedy=f"If only part of it was downloaded, fetch the rest: hf download {_words(model, revision)}. If the"
            " hub has it as a pickle alone, convert it once: from_pretrained, then save_pretrained.",
        )
    return folder


def _not_there(hub_id: str, model: str, revision: str | None, error: Exception, neighbour: str) -> InputError:
    from huggingface_hub.constants import is_offline_mode

    kind = type(error).__name__
    cached = _cached_revisions(model)
    if kind == "GatedRepoError":
        remedy = "Accept the model's terms on its page, and log in: hf auth login."
    elif cached:
        others = ", ".join(f"{model}@{name}" for name in cached)
        remedy = (
            f"The cache has {others}. Name one of them, or download this one: hf download {_words(model, revision)}."
        )
    elif is_offline_mode():
        remedy = (
            "Check the path or the hub id. HF_HUB_OFFLINE is set: to use a model of the hub, first download it, on a"
            f" machine with a network: hf download {_words(model, revision)}."
        )
    else:
        remedy = "Check the path or the hub id, the revision and the network; offline, download the model first."
    source = "the offline cache of the model hub" if is_offline_mode() else "the model hub"
    return InputError(
        f"there is no such file, no such folder, and {source} gave none ({kind}).{neighbour}",
        where=hub_id,
        remedy=remedy,
    )


def _cached_revisions(model: str) -> list[str]:
    """Return what the local cache has of a model: branches and tags, and commits that none of them names."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError, ValueError):
        return []
    found = [r for repo in repositories if repo.repo_type == "model" and repo.repo_id == model for r in repo.revisions]
    return sorted(name for revision in found for name in (revision.refs or {revision.commit_hash}))


def _words(model: str, revision: str | None) -> str:
    return model if revision is None else f"{model} --revision {revision}"
