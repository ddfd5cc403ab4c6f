"""Float8 weights with their scales are read as transformers reads them, a matrix at a time; other forms are refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_families import tiny_model
from safetensors.torch import load_file, save_file

from dapt_merge import merge, open_checkpoint
from dapt_merge.checkpoints.float8 import dequantised
from dapt_merge.errors import InputError
from dapt_merge.tensors.dtypes import Dtype

UP = "model.layers.0.mlp.up_proj.weight"
FINE_GRAINED = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def quantised(weight, block):
    """Return (q, s) with one scale a block."""
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scale[i, j] = weight[part].abs().max() / 448
            stored[part] = (weight[part] / scale[i, j]).to(torch.float8_e4m3fn)
    return stored, scale


def save_float8(source, target, block=(128, 128), settings=FINE_GRAINED, ending="_scale_inv", squeeze=False):
    """Copy a model folder with its linear layers in float8."""
    target.mkdir()
    weights = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            shape = tuple(side or whole for side, whole in zip(block, tensor.shape, strict=True))
            stored, scale = quantised(tensor, shape)
            weights |= {name: stored, name + ending: scale.squeeze() if squeeze else scale}
        else:
            weights[name] = tensor.bfloat16()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": settings}
    (target / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return target


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "m"
    tiny_model("llama", hidden_size=256, intermediate_size=384, num_key_value_heads=4, head_dim=64).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def stored(plain):
    return save_float8(plain, plain.parent / "float8")


def test_every_matrix_is_what_transformers_makes_of_it(stored):
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    settings = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(stored, dtype="bfloat16", quantization_config=settings)
    theirs, ours = model.state_dict(), open_checkpoint(stored)
    assert set(ours.tensors) == set(theirs)
    for name, info in ours.tensors.items():
        tensor = ours.read(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype.torch_dtype, info.shape)
        assert torch.equal(tensor.bfloat16(), theirs[name]), name


def test_a_merge_with_a_float8_checkpoint_is_bfloat16_and_says_where_it_came_from(plain, stored, tmp_path):
    report = merge(stored, plain, "linear", weight=0.5).save(tmp_path / "out")
    written = open_checkpoint(tmp_path / "out")
    assert written.tensors[UP].dtype == Dtype.BFLOAT16
    assert "quantization_config" not in written.config
    half = (open_checkpoint(stored).read(UP) + open_checkpoint(plain).read(UP)) / 2
    assert torch.equal(written.read(UP), half.bfloat16())
    assert any("float8" in warning and "coarse" in warning for warning in report.warnings)
    assert merge(stored, plain, "linear", weight=0.5).to_model().config.to_dict().get("quantization_config") is None


@pytest.mark.parametrize("block", [(None, None), (1, None)], ids=["one scale", "one scale a row"])
@pytest.mark.parametrize("squeeze", [True, False])
def test_other_tools_scales_are_read_too(plain, tmp_path, block, squeeze):
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    folder = save_float8(plain, tmp_path / "m", block, settings, "_scale", squeeze)
    found, exact = open_checkpoint(folder).read(UP), open_checkpoint(plain).read(UP)
    assert (found - exact).abs().max() <= exact.abs().max() / 16
    assert not torch.equal(found, exact)


def test_scales_of_activations_are_left_out(stored, tmp_path):
    weights = load_file(stored / "model.safetensors")
    weights |= {
        "model.layers.0.mlp.up_proj.input_scale": torch.ones(1),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
    }
    (tmp_path / "config.json").write_text((stored / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors")
    assert set(open_checkpoint(tmp_path).tensors) == set(open_checkpoint(stored).tensors)


def test_a_missing_scale_or_one_of_another_shape_is_refused(stored, tmp_path):
    weights = load_file(stored / "model.safetensors")
    for number, (change, saying) in enumerate(
        (({UP + "_scale_inv": None}, "no scale"), ({UP + "_scale_inv": torch.ones(3, 3)}, "no form known"))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text((stored / "config.json").read_text())
        save_file({n: t for n, t in (weights | change).items() if t is not None}, folder / "model.safetensors")
        with pytest.raises(InputError, match=saying) as error:
            open_checkpoint(folder)
        assert error.value.remedy


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_each_element_is_multiplied_by_the_scale_of_its_block(rows, columns, block, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=generator)
    found = dequantised(weight, scale, block)
    for i in range(rows):
        for j in range(columns):
            assert found[i, j] == weight[i, j].float() * scale[i // block[0], j // block[1]]
