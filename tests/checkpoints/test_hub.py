"""Models named by hub id and revision come from the local cache; what is not in it is an error with the way out."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from dapt_merge import merge, open_checkpoint
from dapt_merge.checkpoints.hub import WANTED, looks_like_hub_id
from dapt_merge.errors import InputError

COMMITS = {"main": "1" * 40, "v1.0": "2" * 40, "exp/long-run": "3" * 40}


def fill_cache(cache, weights=True, name="lab/domain-model"):
    """Lay out a cache as the hub's client does: blobs, snapshots of links to them, and refs."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True)
    for number, (ref, commit) in enumerate(COMMITS.items()):
        snapshot = root / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
        files = {"config.json": json.dumps({"model_type": "llama", "revision_number": number}).encode()}
        if weights:
            save_file({"w": torch.full((2,), float(number))}, snapshot / "made")
            files["model.safetensors"] = (snapshot / "made").read_bytes()
            (snapshot / "made").unlink()
        for file, content in files.items():
            blob = root / "blobs" / f"{number}{file}"
            blob.write_bytes(content)
            (snapshot / file).symlink_to(os.path.relpath(blob, snapshot))
    return cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return fill_cache(tmp_path / "hub")


@pytest.mark.parametrize(
    ("reference", "number"),
    [
        ("lab/domain-model", 0),
        ("lab/domain-model@main", 0),
        ("lab/domain-model@v1.0", 1),
        ("lab/domain-model@" + "2" * 40, 1),
        ("lab/domain-model@exp/long-run", 2),
    ],
)
def test_a_hub_id_opens_the_revision_that_it_names(cache, reference, number):
    checkpoint = open_checkpoint(reference)
    assert checkpoint.label == reference
    assert checkpoint.config["revision_number"] == number
    assert torch.equal(checkpoint.read("w"), torch.full((2,), float(number)))


def test_two_revisions_of_one_model_are_two_inputs_of_a_merge(cache, tmp_path):
    recipe = {
        "merge_method": "linear",
        "base_model": "lab/domain-model@main",
        "models": [{"model": "lab/domain-model@v1.0", "parameters": {"weight": 0.25}}],
    }
    lazy = merge(recipe=recipe)
    assert lazy["w"].tolist() == [0.25, 0.25]
    report = lazy.save(tmp_path / "out")
    assert set(report.inputs) == {"lab/domain-model@main", "lab/domain-model@v1.0"}


def test_a_revision_that_is_not_cached_names_those_that_are(cache):
    with pytest.raises(InputError) as error:
        open_checkpoint("lab/domain-model@v2.0")
    assert error.value.where == "lab/domain-model@v2.0"
    remedy = str(error.value.remedy)
    assert "lab/domain-model@exp/long-run, lab/domain-model@main, lab/domain-model@v1.0" in remedy
    assert "hf download lab/domain-model --revision v2.0" in remedy


def test_a_model_that_is_not_cached_names_the_command_that_fetches_it(cache):
    with pytest.raises(InputError, match="no such folder") as error:
        open_checkpoint("lab/another-model")
    assert "HF_HUB_OFFLINE" in str(error.value.remedy)
    assert "hf download lab/another-model" in str(error.value.remedy)


def test_a_model_of_which_only_the_tokenizer_was_fetched_is_an_error_that_says_so(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    fill_cache(tmp_path / "hub", weights=False)
    with pytest.raises(InputError, match="no safetensors weights here") as error:
        open_checkpoint("lab/domain-model@v1.0")
    assert "hf download lab/domain-model --revision v1.0" in str(error.value.remedy)


def test_no_pickle_and_no_code_is_ever_asked_for(cache, monkeypatch):
    import huggingface_hub

    asked = []
    original = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append(k) or original(*a, **k))
    open_checkpoint("lab/domain-model")
    assert asked[0]["allow_patterns"] == list(WANTED)
    assert not any(pattern.endswith((".bin", ".py", ".pt", ".pth", ".pkl")) for pattern in WANTED)


def test_an_adapter_on_a_revision(cache, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "lab/domain-model"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"revision": "v1.0", "modules_to_save": ["w"]}))
    save_file({"base_model.model.w": torch.ones(2)}, adapter / "adapter_model.safetensors")
    assert open_checkpoint(adapter).config["revision_number"] == 1
    assert open_checkpoint(f"lab/domain-model@exp/long-run+{adapter}").config["revision_number"] == 2


def test_the_cache_is_where_the_environment_says_it_is(tmp_path):
    fill_cache(tmp_path / "home" / "hub")
    script = "import dapt_merge as dm; print(dm.open_checkpoint('lab/domain-model@v1.0').read('w').tolist())"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "[1.0, 1.0]\n"


@pytest.mark.parametrize("reference", ["camembert-base", "camembert-base@main", "camembert-base@v1.0"])
def test_a_hub_id_may_have_no_organisation(cache, reference):
    fill_cache(cache, name="camembert-base")
    assert open_checkpoint(reference).config["revision_number"] == (1 if reference.endswith("v1.0") else 0)


def test_a_folder_goes_before_a_hub_model_of_its_name(cache, tmp_path, monkeypatch):
    fill_cache(cache, name="gpt2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    save_file({"w": torch.full((2,), 7.0)}, tmp_path / "gpt2" / "model.safetensors")
    assert open_checkpoint("gpt2").read("w").tolist() == [7.0, 7.0]


@pytest.mark.parametrize("reference", ["medcial", "runs/medcial"])
def test_a_mistyped_folder_names_the_nearest_one(cache, tmp_path, monkeypatch, reference):
    monkeypatch.chdir(tmp_path)
    for name in ("medical", "runs/medical"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(InputError, match="there is no such file, no such folder") as error:
        open_checkpoint(reference)
    assert "Did you mean 'medical'?" in error.value.what
    assert "the offline cache of the model hub gave none" in error.value.what
    assert f"hf download {reference}" in str(error.value.remedy)


def test_a_folder_has_no_revisions(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "medical").mkdir()
    with pytest.raises(InputError, match="only a model of the hub has revisions") as error:
        open_checkpoint("medical@v1.0")
    assert "Leave '@v1.0' out" in str(error.value.remedy)


def test_paths_are_no_hub_ids():
    for name in (
        *("./a", "../a/b", "/a/b", "a/b/c", "a/b@", "C:\\a", "a/b@ c", "a@", "a b", ".a", "-a", "a..b", "a--b", "a-"),
        *("model.safetensors", "model.gguf", "pytorch_model.bin", "recipe.yaml", ""),
    ):
        assert not looks_like_hub_id(name), name
