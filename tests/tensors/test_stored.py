"""Numbers where they lie, with and without torch."""

import mmap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dapt_merge.tensors.dtypes import SAFETENSORS_NAMES, Dtype, at_least_float32, parse_dtype
from dapt_merge.tensors.stored import StoredTensor

FLOATS = (Dtype.FLOAT64, Dtype.FLOAT32, Dtype.FLOAT16, Dtype.BFLOAT16)


@pytest.mark.parametrize("dtype", list(Dtype))
def test_a_dtype_says_of_itself_what_torch_says(dtype):
    assert Dtype.of(dtype.torch_dtype) is dtype
    assert (dtype.itemsize, dtype.is_floating_point) == (
        dtype.torch_dtype.itemsize,
        dtype.torch_dtype.is_floating_point,
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_computed_in_is_what_torch_promotes_to(dtype):
    assert at_least_float32(dtype).torch_dtype == torch.promote_types(dtype.torch_dtype, torch.float32)
    assert parse_dtype(dtype.torch_dtype) is parse_dtype(dtype.value) is dtype


def test_numbers_that_nobody_merges_have_no_dtype_here():
    for dtype in (torch.complex64, torch.uint16):
        with pytest.raises(ValueError):
            Dtype.of(dtype)


@given(st.sampled_from(sorted(SAFETENSORS_NAMES)), st.sampled_from([(), (0,), (7,), (2, 3), (1, 0, 2)]), st.data())
def test_bytes_in_memory_are_the_tensor_that_torch_makes_of_them(dtype, shape, data):
    nbytes = int(np.prod(shape)) * dtype.itemsize
    content = data.draw(st.binary(min_size=nbytes, max_size=nbytes))
    if dtype == Dtype.BOOL:
        content = bytes(byte & 1 for byte in content)
    stored = StoredTensor(dtype, shape, memoryview(bytearray(content)))
    assert (stored.tensor.dtype, tuple(stored.tensor.shape)) == (dtype.torch_dtype, shape)
    assert bytes(StoredTensor.of(stored.tensor).memory) == bytes(stored.memory) == content
    assert stored.is_same_as(StoredTensor.of(stored.tensor.clone()))
    if nbytes:
        assert stored.address == stored.tensor.data_ptr()
        changed = bytearray(content)
        changed[-1] ^= 1
        assert not stored.is_same_as(StoredTensor(dtype, shape, memoryview(changed)))


def test_a_tensor_that_does_not_start_at_a_multiple_of_its_size_is_read_by_torch_and_by_no_loop():
    content = mmap.mmap(-1, 4096)
    content[3:11] = np.array([1.5, -2.0], np.float32).tobytes()
    stored = StoredTensor(Dtype.FLOAT32, (2,), memoryview(content)[3:11])
    assert stored.loop_place is None
    assert stored.tensor.tolist() == [1.5, -2.0]


def test_a_parameter_is_described_without_its_gradient_and_a_view_in_its_own_order():
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    assert not StoredTensor.of(weight).tensor.requires_grad
    turned = StoredTensor.of(weight.detach().T)
    assert turned.address is None
    assert turned.loop_place is None
    assert np.frombuffer(turned.memory, np.float32).tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("dtype", FLOATS)
@given(st.lists(st.floats(width=16), min_size=0, max_size=20))
def test_what_is_not_finite_is_found_in_the_bits(dtype, numbers):
    tensor = torch.tensor(numbers, dtype=torch.float64).to(dtype.torch_dtype)
    assert StoredTensor.of(tensor).is_finite == bool(tensor.isfinite().all())


def test_signed_zeros_and_nan_are_compared_as_bytes():
    zero, minus, nan = (StoredTensor.of(torch.tensor([value])) for value in (0.0, -0.0, float("nan")))
    assert not zero.is_same_as(minus)
    assert nan.is_same_as(StoredTensor.of(torch.tensor([float("nan")])))
