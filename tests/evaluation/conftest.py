"""The tiny model, tokenizer and suites of `evaluation_cases`, as fixtures."""

from pathlib import Path

import pytest
from evaluation_cases import make_model, make_tokenizer, write_suites


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory):
    """Keep the tests' data sets out of the user's cache."""
    import datasets.config

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture
def suites(tmp_path: Path):
    from dapt_merge.evaluation import load_suite

    return [load_suite(path) for path in write_suites(tmp_path / "suites")]


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model():
    return make_model()


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
