"""One tiny base model for all tests of this folder, and a run of six steps on it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_corpora import make_base, notes, write_jsonl


@pytest.fixture(autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="session", autouse=True)
def imports_are_not_collected(base: Path) -> Iterator[None]:
    """Every run ends with two full garbage collections, most of whose time would go to what was imported."""
    import peft  # noqa: F401

    import dapt_merge.pretraining.recorder  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of six steps with two checkpoints, in float32."""
    domain = write_jsonl(tmp_path / "domain.jsonl", notes(40, 1))
    return {
        "base": str(base),
        "corpus": [str(domain)],
        "output": str(tmp_path / "run"),
        "sequence_length": 32,
        "batch_tokens": 64,
        "tokens": 384,
        "learning_rate": 1e-3,
        "checkpoints": 2,
        "precision": "fp32",
    }
