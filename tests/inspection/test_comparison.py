"""Whole checkpoints: every shared tensor measured once, summed up by layer and group, whatever else differs."""

import json

import pytest
import torch

from dapt_merge import merge, open_checkpoint
from dapt_merge.errors import InputError
from dapt_merge.inspection import Place, inspect_checkpoints
from dapt_merge.inspection.measures import measure_difference
from dapt_merge.methods.contract import TensorContext

CONFIG = {"model_type": "llama", "vocab_size": 24, "hidden_size": 8, "num_hidden_layers": 2, "rms_norm_eps": 1e-5}
SHAPES = {
    "model.embed_tokens.weight": (24, 8),
    "model.norm.weight": (8,),
    **{f"model.layers.{n}.self_attn.q_proj.weight": (8, 8) for n in (0, 1)},
    **{f"model.layers.{n}.mlp.up_proj.weight": (12, 8) for n in (0, 1)},
}

OUTSIDE = Place(None, None)


def weights(seed, near=None, scale=0.01):
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return drawn if near is None else {name: near[name] + scale * step for name, step in drawn.items()}


@pytest.fixture
def base():
    return weights(0)


def opened(tensors, label, **changes):
    return open_checkpoint(tensors, label).with_config({**CONFIG, **changes})


def inspected(base, *dapt, **options):
    models = [opened(tensors, f"dapt-{position}") for position, tensors in enumerate(dapt, start=1)]
    return inspect_checkpoints(opened(base, "base"), models, **options)


def test_a_cell_sums_up_the_tensors_of_one_group_of_one_layer(base):
    dapt = weights(1, base)
    found = inspected(base, dapt)
    (comparison,) = found.comparisons
    name = "model.layers.1.mlp.up_proj.weight"
    expected = measure_difference(base[name], dapt[name], TensorContext(name))
    assert found.cell(comparison, Place(None, 1), "mlp").difference == expected
    assert found.cell(comparison, OUTSIDE, "attention") is None
    assert [found.place_name(place) for place in found.places] == ["outside", "0", "1"]
    assert found.kinds == ["attention", "mlp", "norm", "embedding"]


def test_the_layers_of_an_encoder_and_of_a_decoder_are_told_apart():
    names = [
        f"{stack}.block.{layer}.layer.0.SelfAttention.q.weight" for stack in ("decoder", "encoder") for layer in (0, 1)
    ]
    base = {name: torch.ones(4, 4) for name in names}
    found = inspected(base, {name: tensor + 0.1 * k for k, (name, tensor) in enumerate(base.items())})
    assert [found.place_name(place) for place in found.places] == ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]
    (comparison,) = found.comparisons
    assert found.cell(comparison, Place("decoder", 0), "attention").difference.changed == 0
    assert found.cell(comparison, Place("encoder", 0), "attention").difference.changed == 16


def test_the_whole_is_one_long_vector(base):
    dapt = weights(1, base)
    found = inspected(base, dapt, rank=False)
    flat_base = torch.cat([base[name].reshape(-1) for name in SHAPES]).double()
    flat_dapt = torch.cat([dapt[name].reshape(-1) for name in SHAPES]).double()
    total = found.summary(found.comparisons[0]).difference
    assert total.relative_norm == pytest.approx(float((flat_dapt - flat_base).norm() / flat_base.norm()), rel=1e-5)
    assert total.cosine == pytest.approx(float(torch.cosine_similarity(flat_base, flat_dapt, dim=0)))


@pytest.mark.parametrize("scale", [0.001, 0.03, 0.05, 1.0])
def test_the_slerp_fallbacks_are_those_that_a_merge_reports(base, scale):
    dapt = weights(1, base, scale)
    dapt["model.norm.weight"] = torch.zeros(8)
    found = inspected(base, dapt, rank=False)
    assert found.summary(found.comparisons[0]).slerp_fallbacks == merge(base, dapt, "slerp", t=0.5).report().fallbacks


@pytest.mark.parametrize("weight", [0.1, 0.5])
def test_the_share_lost_is_the_one_that_a_bfloat16_merge_reports(base, weight):
    base = {name: tensor.bfloat16() for name, tensor in base.items()}
    dapt = {name: tensor.bfloat16() for name, tensor in weights(1, {n: t.float() for n, t in base.items()}).items()}
    found = inspected(base, dapt, rank=False, weights=[weight])
    (rounding,) = found.summary(found.comparisons[0]).difference.rounding
    report = merge(base, dapt, "task_arithmetic", weight=weight).report()
    assert rounding.updated == pytest.approx(report.updated_elements, abs=2)
    assert rounding.lost_share == pytest.approx(report.lost_share, abs=0.01)


def test_matrices_have_an_effective_rank_unless_it_is_not_asked_for(base):
    with_rank, without = inspected(base, weights(1, base)), inspected(base, weights(1, base), rank=False)
    cell = with_rank.cell(with_rank.comparisons[0], Place(None, 0), "attention")
    assert 1 < cell.effective_rank <= 8
    assert cell.rank_share == pytest.approx(cell.effective_rank / 8)
    assert with_rank.cell(with_rank.comparisons[0], OUTSIDE, "norm").effective_rank is None
    assert without.summary(without.comparisons[0]).effective_rank is None


def test_signs_are_compared_between_several_checkpoints_only(base):
    alone, together = inspected(base, weights(1, base)), inspected(base, weights(1, base), weights(1, base, 0.02))
    assert alone.summary(alone.comparisons[0]).signs is None
    assert together.summary(together.comparisons[1]).signs.share == 1.0


def test_neither_threads_nor_order_change_a_number(base):
    dapt = weights(1, base)
    one, three = inspected(base, dapt, threads=1), inspected(base, dapt, threads=3)
    assert one.to_dict() == three.to_dict()


def test_a_checkpoint_that_a_merge_would_refuse_is_still_measured(base):
    dapt = weights(1, base)
    dapt["model.embed_tokens.weight"] = torch.randn(30, 8)
    dapt["extra.weight"] = torch.ones(2)
    del dapt["model.norm.weight"]
    found = inspect_checkpoints(opened(base, "base"), [opened(dapt, "dapt", vocab_size=30, rms_norm_eps=1e-6)])
    (comparison,) = found.comparisons
    told = comparison.compatibility
    assert told.merge_refused
    assert told.only_in_model == ("extra.weight",)
    assert told.only_in_base == ("model.norm.weight",)
    assert told.other_shape == ("model.embed_tokens.weight",)
    assert [(d.key, d.base, d.model) for d in told.config] == [("vocab_size", 24, 30), ("rms_norm_eps", 1e-5, 1e-6)]
    assert len(comparison.tensors) == 4


def test_a_different_vocabulary_is_told_with_the_token(base, tmp_path):
    for name, tokens in (("base", {"a": 0, "b": 1}), ("dapt", {"a": 1, "b": 0})):
        folder = tmp_path / name
        merge(base, weights(1, base), "linear", weight=0.5).save(folder)
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}))
    found = inspect_checkpoints(open_checkpoint(tmp_path / "base"), [open_checkpoint(tmp_path / "dapt")])
    assert "'a'" in found.comparisons[0].compatibility.vocabulary
    assert "'a'" in found.comparisons[0].compatibility.merge_refused


def test_who_wrote_a_config_is_no_difference(base):
    first = opened(base, "base", transformers_version="4.50", torch_dtype="float32")
    second = opened(weights(1, base), "dapt", transformers_version="5.1", dtype="float32", use_cache=True)
    told = inspect_checkpoints(first, [second]).comparisons[0].compatibility
    assert told.config == ()
    assert told.stated_once == ("use_cache",)
    assert told.merge_refused is None


def test_nothing_in_common_is_refused(base):
    with pytest.raises(InputError, match="shares no tensor"):
        inspected(base, {"other": torch.ones(2)})


def test_integer_buffers_are_left_out(base):
    found = inspected({**base, "steps": torch.tensor([1])}, {**weights(1, base), "steps": torch.tensor([2])})
    assert "steps" not in [tensor.name for tensor in found.comparisons[0].tensors]


def test_everything_is_json(base):
    found = inspected(base, weights(1, base), weights(2, base))
    data = json.loads(json.dumps(found.to_dict()))
    assert [entry["label"] for entry in data["dapt"]] == ["dapt-1", "dapt-2"]
    assert len(data["dapt"][0]["tensors"]) == len(SHAPES)
    assert len(data["dapt"][0]["all"]["bfloat16"]) == 9


def test_progress_counts_the_elements_of_all_checkpoints(base):
    seen = []
    inspected(base, weights(1, base), weights(2, base), on_progress=lambda done, total: seen.append((done, total)))
    elements = 2 * sum(tensor.numel() for tensor in base.values())
    assert seen[-1] == (elements, elements)
