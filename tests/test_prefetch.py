"""Inputs read ahead: a head start that is right or absent, never wrong."""

import shutil
import time

import pytest
import torch
from safetensors.torch import save_file

from dapt_merge import open_checkpoint, prefetch


@pytest.fixture(autouse=True)
def nothing_known():
    prefetch._digests.clear()
    prefetch._maps.clear()
    yield
    prefetch.stop()
    prefetch._digests.clear()
    prefetch._maps.clear()


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(100, 7, generator=generator).to(torch.bfloat16) for name in ("a", "b.weight")}
    save_file(weights | {"empty": torch.empty(0)}, folder / "model.safetensors")
    return folder


def read_ahead(start, count):
    start()
    waited = time.monotonic() + 10
    while len(prefetch._digests) < count and time.monotonic() < waited:
        time.sleep(0.001)


def test_a_hash_taken_ahead_is_the_one_that_would_be_computed(model):
    computed = open_checkpoint(model).fingerprint()
    read_ahead(lambda: prefetch.start([model]), 3)
    file = model / "model.safetensors"
    ahead = open_checkpoint(model)
    assert prefetch.known_digest(file, "a") == ahead.digest("a")
    assert prefetch.known_digest(file, "b.weight") == ahead.digest("b.weight")
    assert ahead.fingerprint() == computed


def test_a_file_that_was_changed_since_is_hashed_anew(model):
    read_ahead(lambda: prefetch.start([model]), 3)
    file = model / "model.safetensors"
    save_file({"a": torch.ones(100, 7), "b.weight": torch.ones(3), "empty": torch.empty(0)}, file)
    assert prefetch.known_digest(file, "a") is None
    assert (
        open_checkpoint(model).fingerprint()
        == open_checkpoint({"a": torch.ones(100, 7), "b.weight": torch.ones(3), "empty": torch.empty(0)}).fingerprint()
    )


def test_models_are_found_in_a_recipe_beside_it_whatever_its_keys(model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("models: [{model: model, parameters: {weight: 0.5}}]\nbase_model: 'nowhere'\n")
    read_ahead(lambda: prefetch.start_for_arguments(["-o", "elsewhere", str(recipe), "weight=0.3"]), 3)
    assert prefetch.known_digest(model / "model.safetensors", "a") is not None


@pytest.mark.parametrize("flags", [["-o", "{}"], ["--out", "{}"], ["--out={}"], ["-o{}"]])
def test_models_are_found_among_the_arguments_and_the_output_is_left_alone(model, tmp_path, flags):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    output = [flag.format(other) for flag in flags]
    read_ahead(lambda: prefetch.start_for_arguments([*output, f"--base={model}"]), 3)
    assert len(prefetch._maps) == 1
    assert prefetch.mapped(other / "model.safetensors") is None


def test_the_map_is_used_as_long_as_the_file_is_the_same(model):
    read_ahead(lambda: prefetch.start([model]), 3)
    file = model / "model.safetensors"
    assert prefetch.mapped(file) is not None
    addresses = {open_checkpoint(model).stored("a").address for _ in range(2)}
    assert len(addresses) == 1
    save_file({"a": torch.ones(100, 7)}, file)
    assert prefetch.mapped(file) is None
    assert open_checkpoint(model).read("a").tolist() == torch.ones(100, 7).tolist()


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"\xff" * 100, (2**40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"],
)
def test_what_is_no_safetensors_file_is_passed_over(model, tmp_path, content):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(content)
    read_ahead(lambda: prefetch.start([broken, tmp_path / "missing", model]), 3)
    assert prefetch.known_digest(model / "model.safetensors", "a") is not None
    assert prefetch.known_digest(broken / "model.safetensors", "a") is None
