"""Merging on another device, as far as a processor can show it: the same path with the device "cpu"."""

import pytest
import torch
from safetensors.torch import load_file

from dapt_merge import merge
from dapt_merge.errors import InputError
from dapt_merge.merging import stream
from dapt_merge.merging.device import Ferry, available_device
from dapt_merge.merging.tensor import RUN_ELEMENTS
from dapt_merge.tensors.stored import StoredTensor


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 1000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_a_tensor_arrives_whole_in_buffers_smaller_than_itself(shape, dtype):
    tensor = torch.randint(0, 2, shape).to(dtype)
    there = Ferry(torch.device("cpu"), buffer_bytes=256).bring(tensor)
    assert there.dtype == dtype
    assert torch.equal(there, tensor)
    assert not there.numel() or there.data_ptr() != tensor.data_ptr()


def test_results_come_home_in_order_and_complete():
    home = torch.zeros(10, dtype=torch.bfloat16)
    with Ferry(torch.device("cpu")).returning(lambda begin, end: StoredTensor.of(home[begin:end])) as place:
        for begin in range(0, 10, 3):
            end = min(begin + 3, 10)
            place(begin, end).tensor.copy_(torch.arange(begin, end))
    assert home.tolist() == list(range(10))


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "slerp", "model_stock"])
def test_a_merge_through_a_device_has_the_bits_of_one_without(tmp_path, monkeypatch, method):
    generator = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(RUN_ELEMENTS + 77, generator=generator), "b": torch.randn(7, 5, generator=generator)}
    models = [
        {name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        for _ in range(2)
    ]
    if method == "slerp":
        models, parameters = models[:1], {"t": 0.4}
    else:
        parameters = {"linear": {"weight": 0.5}, "model_stock": {}}.get(method, {"weight": 0.5, "density": 0.5})
    lazy = merge(base, models, method, out_dtype="bfloat16", **parameters)
    ordinary = lazy.save(tmp_path / "ordinary")
    monkeypatch.setattr(stream, "available_device", lambda name: (torch.device("cpu"), None))
    through = stream.merge_to_disk(lazy.plan, tmp_path / "through", device="cuda")
    assert through.output == ordinary.output
    assert (through.lost_elements, through.notes) == (ordinary.lost_elements, ordinary.notes)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("ordinary", "through")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in base)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_processor_merges_and_the_report_says_so(tmp_path):
    base, model = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
    report = stream.merge_to_disk(merge(base, model, "linear", weight=0.5).plan, tmp_path / "out", device="cuda")
    assert any("no CUDA device" in warning for warning in report.warnings)
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [0.5] * 4


@pytest.mark.parametrize("name", ["gpu", "meta", "mps"])
def test_a_device_that_cannot_merge_is_refused(name):
    with pytest.raises(InputError, match=name):
        available_device(name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_a_cuda_device_gives_the_bits_of_the_processor(tmp_path, method):
    generator = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(999, 1001, generator=generator).to(torch.bfloat16)}
    models = [{"a": (base["a"] + 0.01 * torch.randn(999, 1001, generator=generator)).to(torch.bfloat16)}] * 2
    parameters = {"weight": 0.5} if method == "linear" else {"weight": 0.5, "density": 0.5}
    plan = merge(base, models, method, **parameters).plan
    outputs = [stream.merge_to_disk(plan, tmp_path / name, device=name).output for name in ("cpu", "cuda")]
    assert outputs[0] == outputs[1]
