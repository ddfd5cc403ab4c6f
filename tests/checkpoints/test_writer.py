"""A checkpoint is written in place by several threads, and its bytes depend on its content alone."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from dapt_merge.checkpoints import CheckpointWriter, TensorInfo, copy_companions, open_checkpoint
from dapt_merge.errors import DaptMergeError, InputError
from dapt_merge.tensors.dtypes import Dtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def described(tensors):
    return [TensorInfo(n, Dtype.of(t.dtype), tuple(t.shape), t.numel() * t.itemsize) for n, t in tensors.items()]


def drawn(seed, count=9):
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    tensors = {}
    for index in range(count):
        shape = [rng.randint(0, 7) for _ in range(rng.randint(0, 3))]
        tensors[f"t.{index}"] = torch.randint(0, 200, shape, generator=generator).to(rng.choice(DTYPES))
    return tensors


def written(folder, tensors, *, shard_bytes, order=None, threads=1):
    folder.mkdir()
    writer = CheckpointWriter(folder, described(tensors), shard_bytes=shard_bytes)
    with writer, ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda name: writer.write(name, tensors[name]), order or list(tensors)))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), shard_bytes=st.sampled_from([1, 64, 500, 10**9]))
def test_what_is_written_reads_back_with_safetensors_itself(tmp_path_factory, seed, shard_bytes):
    tensors = drawn(seed)
    folder = tmp_path_factory.mktemp("w") / "out"
    files = written(folder, tensors, shard_bytes=shard_bytes, threads=3)
    read = {}
    for name in files:
        if name.endswith(".safetensors"):
            read |= load_file(folder / name)
            with safe_open(folder / name, "pt") as handle:
                assert handle.metadata() == {"format": "pt"}
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    if len(files) > 1:
        index = json.loads(files["model.safetensors.index.json"])
        assert set(index["weight_map"]) == set(tensors)
        assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in tensors.values())
    else:
        assert list(files) == ["model.safetensors"]
    assert open_checkpoint(folder).fingerprint() == open_checkpoint(tensors).fingerprint()


def test_the_bytes_depend_neither_on_the_order_nor_on_the_threads(tmp_path):
    tensors = drawn(3, 40)
    shuffled = random.Random(0).sample(list(tensors), len(tensors))
    first = written(tmp_path / "a", tensors, shard_bytes=300)
    assert len(first) > 3
    assert written(tmp_path / "b", tensors, shard_bytes=300, order=shuffled, threads=8) == first


def test_shards_stay_below_their_bound_and_keep_the_given_order(tmp_path):
    tensors = {f"t.{i}": torch.full((10,), float(i)) for i in range(10)}
    written(tmp_path / "out", tensors, shard_bytes=100)
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert [weight_map[f"t.{i}"] for i in range(10)] == [
        f"model-{i // 2 + 1:05d}-of-00005.safetensors" for i in range(10)
    ]


def test_tensor_data_is_aligned_to_its_elements(tmp_path):
    tensors = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(3),
        "c": torch.ones(1, dtype=torch.bfloat16),
        "d": torch.ones(1, dtype=torch.int64),
    }
    content = written(tmp_path / "out", tensors, shard_bytes=10**9)["model.safetensors"]
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name, tensor in tensors.items():
        assert (8 + size + header[name]["data_offsets"][0]) % tensor.itemsize == 0


def test_a_tensor_that_was_never_written_is_an_error(tmp_path):
    writer = CheckpointWriter(tmp_path, described({"a": torch.ones(1), "b": torch.ones(1)}))
    writer.write("a", torch.ones(1))
    with pytest.raises(DaptMergeError, match="'b'"):
        writer.close()


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(2, dtype=torch.bfloat16)])
def test_a_tensor_other_than_announced_is_an_error(tmp_path, wrong):
    with (
        pytest.raises(DaptMergeError, match="announced"),
        CheckpointWriter(tmp_path, described({"a": torch.ones(2)})) as w,
    ):
        w.write("a", wrong)


def test_a_write_that_failed_is_told_beside_what_stopped_the_merge(tmp_path):
    def fail(file, names):
        raise OSError(5, f"{file} cannot be noted")

    def interrupted():
        with CheckpointWriter(tmp_path, described({"a": torch.ones(2)}), on_finished=fail) as writer:
            writer.write("a", torch.ones(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        interrupted()
    [note] = stopped.value.__notes__
    assert "model.safetensors cannot be noted" in note


def test_a_non_contiguous_tensor_is_written_in_row_major_order(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4).T
    written(tmp_path / "out", {"a": tensor}, shard_bytes=10**9)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["a"], tensor)


def test_a_dtype_that_cannot_be_written_is_refused_before_any_file(tmp_path):
    with pytest.raises(InputError, match="float8_e5m2"):
        CheckpointWriter(tmp_path, [TensorInfo("a", Dtype.FLOAT8_E5M2, (8,), 8)])
    assert not list(tmp_path.iterdir())


def test_companions_are_data_only_and_state_the_new_dtype(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    written(source, {"w": torch.ones(1)}, shard_bytes=10**9)
    out.mkdir()
    config = {"model_type": "llama", "torch_dtype": "float32", "rope_theta": 1e4}
    (source / "config.json").write_text(json.dumps(config))
    carried = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE"]
    left = ["modeling_evil.py", "pytorch_model.bin", "training_args.bin", "optimizer.pt", "README.md"]
    for name in [*carried, *left]:
        (source / name).write_text(name)
    copy_companions(open_checkpoint(source), out, Dtype.BFLOAT16)
    assert sorted(path.name for path in out.iterdir()) == sorted(["config.json", *carried])
    assert json.loads((out / "config.json").read_text()) == {**config, "torch_dtype": "bfloat16"}
    assert all((out / name).read_text() == name for name in carried)
