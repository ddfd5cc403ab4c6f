"""One tokenizer for all tests of this folder, and a cache of their own."""

from __future__ import annotations

from typing import Any

import pytest
from small_corpora import small_tokenizer


@pytest.fixture(autouse=True)
def corpus_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return small_tokenizer()
