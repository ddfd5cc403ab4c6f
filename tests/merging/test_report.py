"""The report tells what a merge did: inputs by content, fallbacks, what rounding lost, warnings, cost."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_models import load_weights, save_model

from dapt_merge import merge, open_checkpoint
from dapt_merge.errors import InputError


def test_the_report_identifies_inputs_and_output_by_content(models, tmp_path):
    report = merge(models["base"], models["one"], "linear", weight=0.5).save(tmp_path / "out")
    assert report.inputs == {str(models[n]): open_checkpoint(models[n]).fingerprint() for n in ("base", "one")}
    assert report.output == open_checkpoint(tmp_path / "out").fingerprint()
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert set(report.versions) >= {"python", "torch", "safetensors", "dapt-merge"}


def test_the_report_says_what_each_tensor_got_and_what_rounding_took_of_it(models, tmp_path):
    weight = {"attention": 0.3, "mlp": 0.7, "rest": 0.0}
    lazy = merge(models["base"], models["one"], "task_arithmetic", weight=weight, out_dtype="bfloat16")
    report = lazy.save(tmp_path / "out").to_dict()
    got = {name: line for line in report["lines"] for name in line["names"]}
    assert got.keys() == set(lazy)
    assert list(got["model.layers.1.mlp.up_proj.weight"]["parameters"]["weight"]) == [0.7]
    assert got["model.norm.weight"]["copied_from"] == str(models["base"])
    assert {line["out_dtype"] for line in report["lines"]} == {"bfloat16"}
    updated, lost = map(sum, zip(*report["rounding"].values(), strict=True))
    assert (updated, lost) == (report["updated_elements"], report["lost_elements"])
    assert 0 < lost < updated


def test_the_merge_fingerprint_follows_recipe_and_inputs(models, tmp_path):
    def fingerprint(base, dapt, **parameters):
        return merge(base, dapt, "linear", **parameters).report().fingerprint

    moved = save_model(tmp_path / "moved", load_weights(models["one"]))
    first = fingerprint(models["base"], models["one"], weight=0.5)
    assert fingerprint(models["base"], moved, weight=0.5) == first
    assert fingerprint(models["base"], models["one"], weight=0.6) != first
    assert fingerprint(models["base"], models["two"], weight=0.5) != first


def test_slerp_fallbacks_are_counted_and_named(tmp_path):
    generator = torch.Generator().manual_seed(0)
    near, far = torch.randn(50, generator=generator), torch.randn(50, generator=generator)
    base = {"near": near, "far": far}
    dapt = {"near": near * 1.01, "far": torch.randn(50, generator=generator)}
    report = merge(base, dapt, "slerp", t=0.5).report()
    assert report.fallbacks == 1
    assert list(report.notes) == ["near"]
    assert "linear" in str(report.notes["near"]["fallback"])


def test_bytes_are_counted_for_every_tensor_read_and_written(models, tmp_path):
    size = open_checkpoint(models["base"]).nbytes
    lazy = merge(models["base"], [models["one"], models["two"]], "linear", weight=0.2, out_dtype="bfloat16")
    report = lazy.save(tmp_path / "out")
    assert report.bytes_read == 3 * size
    assert report.bytes_written == size // 2
    assert report.tensors == len(lazy)


def test_nothing_is_lost_without_rounding(models):
    report = merge(models["base"], models["one"], "linear", weight=0.3).report()
    assert report.updated_elements is report.lost_elements is report.lost_share is None


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 1e-5, 1e-4, 1e-2]),
    stored=st.sampled_from([torch.float32, torch.bfloat16]),
    out=st.sampled_from(["bfloat16", "float16"]),
    size=st.sampled_from([0, 1, 1000, (1 << 18) + 3]),
)
def test_the_share_lost_to_rounding_is_that_of_its_definition(seed, scale, stored, out, size):
    generator = torch.Generator().manual_seed(seed)
    base = (0.02 * torch.randn(size, generator=generator)).to(stored)
    dapt = (base + scale * torch.randn(size, generator=generator)).to(torch.float32)
    exact = merge({"w": base}, {"w": dapt}, "task_arithmetic", weight=0.3, out_dtype="float32")["w"]
    lazy = merge({"w": base}, {"w": dapt}, "task_arithmetic", weight=0.3, out_dtype=out)
    report = lazy.report()
    dtype = getattr(torch, out)
    updated = exact != base.float()
    lost = updated & (exact.to(dtype) == base.to(dtype))
    assert torch.equal(lazy["w"], exact.to(dtype))
    assert (report.updated_elements or 0) == int(updated.sum())
    assert (report.lost_elements or 0) == int(lost.sum())


def test_a_large_loss_is_warned_about_with_the_remedy():
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(5000, generator=generator)).to(torch.bfloat16)
    dapt = base.float() + 1e-4 * torch.randn(5000, generator=generator)
    report = merge({"w": base}, {"w": dapt}, "task_arithmetic", weight=0.3).report()
    assert report.lost_share is not None
    assert report.lost_share > 0.2
    assert any("float32" in warning for warning in report.warnings)


def test_the_recipes_warnings_reach_the_report(models):
    report = merge(models["base"], models["one"], "ties", weight=0.3, density=1.0, normalize=True).report()
    assert any("weight" in warning for warning in report.warnings)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_input_is_refused_naming_tensor_and_checkpoint(models, tmp_path, value):
    weights = load_weights(models["one"])
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    diverged = save_model(tmp_path / "diverged", weights)
    with pytest.raises(InputError) as error:
        merge(models["base"], diverged, "linear", weight=0.5).save(tmp_path / "out")
    assert "diverged" in str(error.value)
    assert "model.layers.1.mlp.up_proj.weight" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diverged"]


def test_values_that_overflow_float16_are_refused_in_one_path_and_the_other():
    base, dapt = {"w": torch.tensor([1.0])}, {"w": torch.tensor([1e6])}
    for weight in (0.5, 1.0):
        with pytest.raises(InputError, match="overflow"):
            merge(base, dapt, "linear", weight=weight, out_dtype="float16")["w"]


def test_integer_buffers_must_agree(models):
    base = {"w": torch.ones(3), "steps": torch.tensor([1, 2])}
    same = merge(base, {"w": torch.zeros(3), "steps": torch.tensor([1, 2])}, "linear", weight=0.5, out_dtype="bf16")
    assert same["steps"].dtype == torch.int64
    with pytest.raises(InputError, match="steps"):
        merge(base, {"w": torch.zeros(3), "steps": torch.tensor([1, 3])}, "linear", weight=0.5)["steps"]


def test_trimming_over_the_model_keeps_that_share_of_the_whole_task_vector():
    base = {"large": torch.zeros(50), "small": torch.zeros(50), "steps": torch.tensor([3])}
    dapt = {"large": torch.linspace(1, 2, 50), "small": torch.linspace(0, 0.5, 50), "steps": torch.tensor([3])}
    lazy = merge(base, dapt, "ties", weight=1.0, density=0.5, trim_scope="model")
    assert torch.equal(lazy["large"], dapt["large"])
    assert not lazy["small"].any()
    per_tensor = merge(base, dapt, "ties", weight=1.0, density=0.5)
    assert int((per_tensor["small"] != 0).sum()) == 25


def test_progress_counts_the_elements(models, tmp_path):
    seen = []
    lazy = merge(models["base"], models["one"], "linear", weight=0.5)
    lazy.save(tmp_path / "out", on_progress=lambda done, total: seen.append((done, total)))
    elements = sum(info.elements for info in open_checkpoint(models["base"]).tensors.values())
    assert seen[-1] == (elements, elements)
    assert len(seen) == len(lazy)
