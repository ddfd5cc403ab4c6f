"""Two tiny models and a corpus, shared by the tests of statistics."""

import pytest
from statistics_models import make_model, write_corpus


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [make_model(root / name, seed) for seed, name in enumerate(["one", "two"])]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "heldout.jsonl")
