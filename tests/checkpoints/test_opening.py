"""A checkpoint opens from its headers; what is not a full safetensors model is refused, with the reason."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from dapt_merge.checkpoints import TensorInfo, open_checkpoint
from dapt_merge.errors import InputError
from dapt_merge.tensors.dtypes import Dtype

WEIGHTS = {
    "model.embed_tokens.weight": torch.arange(12.0).reshape(4, 3),
    "model.layers.0.mlp.up_proj.weight": torch.ones(2, 3, dtype=torch.bfloat16),
    "model.layers.10.mlp.up_proj.weight": torch.ones(2, 3, dtype=torch.float16),
    "model.layers.2.mlp.up_proj.weight": torch.zeros(2, 3),
    "model.norm.weight": torch.tensor(3.0),
}


def save_folder(folder, weights, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_sharded(folder, *shards):
    folder.mkdir(parents=True)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_every_stored_tensor_reads_back_bit_for_bit(tmp_path):
    checkpoint = open_checkpoint(save_folder(tmp_path / "m", WEIGHTS))
    assert set(checkpoint.tensors) == set(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype == checkpoint.tensors[name].dtype.torch_dtype
        assert torch.equal(read, tensor)
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert checkpoint.tensors[name].nbytes == tensor.numel() * tensor.itemsize
    assert checkpoint.num_layers == 11


def test_tensors_come_in_natural_order(tmp_path):
    layers = [name for name in open_checkpoint(save_folder(tmp_path / "m", WEIGHTS)).tensors if ".mlp." in name]
    assert [name.split(".")[2] for name in layers] == ["0", "2", "10"]


def test_opening_reads_no_weights_and_reading_copies_none(tmp_path):
    big = torch.ones(40_000_000, dtype=torch.bfloat16)
    folder = save_folder(tmp_path / "m", {"w": big})
    del big
    before = anonymous_bytes()
    tensor = open_checkpoint(folder).read("w")
    assert tensor.sum() > 0
    assert anonymous_bytes() - before < 20_000_000  # the tensor has 80 MB


def anonymous_bytes():
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


def test_shards_read_like_one_file_and_have_the_same_fingerprint(tmp_path):
    names = list(WEIGHTS)
    whole = open_checkpoint(save_folder(tmp_path / "whole", WEIGHTS))
    parts = open_checkpoint(
        save_sharded(tmp_path / "parts", {n: WEIGHTS[n] for n in names[3:]}, {n: WEIGHTS[n] for n in names[:3]})
    )
    assert list(whole.tensors) == list(parts.tensors)
    assert all(torch.equal(whole.read(name), parts.read(name)) for name in names)
    assert whole.fingerprint() == parts.fingerprint()


def test_a_state_dict_and_the_file_it_was_saved_to_have_the_same_fingerprint(tmp_path):
    saved = open_checkpoint(save_folder(tmp_path / "m", WEIGHTS))
    assert open_checkpoint(WEIGHTS).fingerprint() == saved.fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights | {"model.norm.weight": torch.tensor(-3.0)},
        lambda weights: weights | {"model.norm.weight": torch.tensor([3.0])},
        lambda weights: weights | {"model.norm.weight": torch.tensor(3.0).view(torch.int32)},
        lambda weights: {name.replace("norm", "norms"): tensor for name, tensor in weights.items()},
    ],
    ids=["value", "shape", "dtype", "name"],
)
def test_the_fingerprint_changes_with_the_content(change):
    assert open_checkpoint(change(WEIGHTS)).fingerprint() != open_checkpoint(WEIGHTS).fingerprint()


def test_the_fingerprint_of_live_tensors_follows_them():
    live = {"w": torch.zeros(3)}
    checkpoint = open_checkpoint(live)
    before = checkpoint.fingerprint()
    live["w"].add_(1)
    assert checkpoint.fingerprint() != before


def test_a_single_file_opens_too(tmp_path):
    folder = save_folder(tmp_path / "m", WEIGHTS)
    assert len(open_checkpoint(folder / "model.safetensors").tensors) == len(WEIGHTS)


def test_tied_memory_is_seen_as_one_tensor_under_the_embeddings_name():
    table = torch.randn(4, 3)
    checkpoint = open_checkpoint({"lm_head.weight": table, "model.embed_tokens.weight": table, "a": torch.ones(1)})
    assert list(checkpoint.tensors) == ["a", "model.embed_tokens.weight"]
    assert torch.equal(checkpoint.read("lm_head.weight"), table)


def test_a_stored_copy_of_a_tied_head_is_no_second_tensor(tmp_path):
    table = torch.randn(4, 3)
    config = {"tie_word_embeddings": True}
    without = save_folder(tmp_path / "without", {"model.embed_tokens.weight": table}, config)
    with_copy = save_folder(
        tmp_path / "with", {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}, config
    )
    assert list(open_checkpoint(with_copy).tensors) == ["model.embed_tokens.weight"]
    assert open_checkpoint(with_copy).fingerprint() == open_checkpoint(without).fingerprint()


def test_a_live_model_opens_with_its_configuration():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    model = LlamaForCausalLM(config)
    checkpoint = open_checkpoint(model)
    assert checkpoint.num_layers == 1
    assert checkpoint.config["model_type"] == "llama"
    assert torch.equal(checkpoint.read("model.norm.weight"), model.model.norm.weight)


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(source, *, saying, remedy=""):
    with pytest.raises(InputError) as error:
        open_checkpoint(source)
    assert saying in str(error.value)
    assert error.value.where, "an error names its place"
    assert error.value.remedy, "an error says what to do"
    assert remedy in error.value.remedy


def test_a_missing_folder_is_refused_with_the_nearest_name(tmp_path):
    (tmp_path / "checkpoint-100").mkdir()
    refused(tmp_path / "checkpont-100", saying="no such file", remedy="checkpoint-100")


def test_an_empty_folder_is_refused_with_the_model_below_it(tmp_path):
    save_folder(tmp_path / "run" / "checkpoint-7", WEIGHTS)
    refused(tmp_path / "run", saying="no safetensors", remedy="checkpoint-7")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_unopened_with_the_command_that_converts_them(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "m").mkdir()
    (tmp_path / "m" / name).write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path / "m", saying="pickle", remedy="save_pretrained")
    refused(tmp_path / "m" / name, saying="pickle", remedy="save_pretrained")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    folder = save_folder(tmp_path / "m", WEIGHTS)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:keep])
    refused(folder, saying="truncated", remedy="again")


def test_a_garbled_file_is_refused(tmp_path):
    folder = save_folder(tmp_path / "m", WEIGHTS)
    (folder / "model.safetensors").write_bytes(os.urandom(5000))
    refused(folder, saying="not safetensors")


def test_a_git_lfs_pointer_is_refused(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(tmp_path / "m", saying="truncated or not safetensors")


def test_an_index_naming_a_missing_shard_is_refused(tmp_path):
    folder = save_sharded(tmp_path / "m", {"a": torch.ones(1)}, {"b": torch.ones(1)})
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, saying="model-00002-of-00002.safetensors", remedy="missing shard")


@pytest.mark.parametrize(
    "target", ["../secret.safetensors", "/etc/x.safetensors", "a/../../secret.safetensors", "..\\secret.safetensors"]
)
def test_an_index_pointing_outside_its_folder_is_refused(tmp_path, target):
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": target}}))
    refused(folder, saying="outside its folder")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "\xff"])
def test_a_useless_index_is_refused(tmp_path, text):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("change", [{"b": 1}, {"c": 1}])
def test_an_index_that_contradicts_its_shards_is_refused(tmp_path, change):
    folder = save_sharded(tmp_path / "m", {"a": torch.ones(1)}, {"b": torch.ones(1)})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(change, "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, saying="the index puts tensor")


def test_shards_without_their_index_are_refused(tmp_path):
    folder = save_sharded(tmp_path / "m", {"a": torch.ones(1)}, {"b": torch.ones(1)})
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, saying="model-00001-of-00002", remedy="index")


def test_quantised_checkpoints_are_refused(tmp_path):
    refused(save_folder(tmp_path / "m", WEIGHTS, {"quantization_config": {"bits": 4}}), saying="quantised")
    eight_bit = {"w": torch.zeros(4, dtype=torch.float8_e4m3fn)}
    refused(save_folder(tmp_path / "f8", eight_bit), saying="F8_E4M3", remedy="quantization_config")


def test_gguf_is_refused_with_the_command_that_dequantises_it(tmp_path):
    (tmp_path / "m").mkdir()
    file = tmp_path / "m" / "model-q8_0.gguf"
    file.write_bytes(b"GGUF")
    refused(file, saying="GGUF", remedy=f"write('{file}'")
    refused(tmp_path / "m", saying="GGUF", remedy=f"'{tmp_path / 'm' / 'model-q8_0-safetensors'}'")


def test_a_config_that_is_no_json_object_is_refused(tmp_path):
    folder = save_folder(tmp_path / "m", WEIGHTS)
    (folder / "config.json").write_text("[1, 2]")
    refused(folder, saying="JSON object")


def test_meta_tensors_are_refused():
    refused({"w": torch.empty(3, device="meta")}, saying="a meta tensor")


def test_an_unknown_hub_model_is_refused_offline():
    refused("nobody/no-such-model", saying="no such folder", remedy="hub id")


def test_reading_an_unknown_tensor_suggests_the_nearest():
    with pytest.raises(InputError, match=r"Did you mean 'model\.norm\.weight'"):
        open_checkpoint(WEIGHTS).read("model.norms.weight")


def test_tensor_info_counts_elements():
    assert TensorInfo("w", Dtype.BFLOAT16, (3, 4), 24).elements == 12
