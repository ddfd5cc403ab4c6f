"""A base and two DAPT checkpoints on disk, shared by the tests of merging."""

import pytest
from merging_models import random_weights, save_model


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Return {"base", "one", "two"} → folder."""
    root = tmp_path_factory.mktemp("models")
    base = random_weights(0)
    folders = {"base": save_model(root / "base", base)}
    for seed, name in enumerate(["one", "two"], start=1):
        folders[name] = save_model(root / name, random_weights(seed, near=base))
    return folders
