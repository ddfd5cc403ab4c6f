"""A merged model comes back from its base and the adapter that was extracted, as far as the report says."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_models import load_weights, random_weights, save_model

from dapt_merge import open_checkpoint
from dapt_merge.errors import InputError
from dapt_merge.merging.extraction import extract_lora, low_rank

Q = "model.layers.0.self_attn.q_proj.weight"


def moved_in_linear_layers(weights, rank):
    """Return the weights with a difference of exactly this rank in every linear layer."""
    generator = torch.Generator().manual_seed(5)
    changed = dict(weights)
    for name, tensor in weights.items():
        if name.endswith("_proj.weight"):
            up, down = (
                torch.randn(shape, generator=generator) for shape in ((len(tensor), rank), (rank, tensor.shape[1]))
            )
            changed[name] = tensor + 0.01 * up @ down
    return changed


@pytest.fixture(scope="module")
def merged(models, tmp_path_factory):
    weights = moved_in_linear_layers(load_weights(models["base"]), rank=3)
    return save_model(tmp_path_factory.mktemp("merged") / "merged", weights)


def test_a_difference_of_low_rank_comes_back_whole(models, merged, tmp_path):
    report = extract_lora(open_checkpoint(models["base"]), open_checkpoint(merged), tmp_path / "lora", rank=4)
    again, wanted = open_checkpoint(f"{models['base']}+{tmp_path / 'lora'}"), open_checkpoint(merged)
    for name in wanted.tensors:
        torch.testing.assert_close(again.read(name), wanted.read(name), rtol=1e-5, atol=1e-6)
    assert report.kept > 1 - 1e-6
    assert not report.left_out
    assert len(report.matrices) == 14
    assert set(report.by_layer()) == {0, 1}


def test_peft_loads_what_was_extracted(models, merged, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    extract_lora(open_checkpoint(models["base"]), open_checkpoint(merged), tmp_path / "lora", rank=4)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models["base"]), tmp_path / "lora")
    found = model.merge_and_unload().state_dict()
    wanted = open_checkpoint(merged)
    for name in wanted.tensors:
        torch.testing.assert_close(found[name], wanted.read(name), rtol=1e-5, atol=1e-6)


def test_the_energy_kept_is_that_of_the_best_approximation(models, tmp_path):
    base, one = open_checkpoint(models["base"]), open_checkpoint(models["one"])
    report = extract_lora(base, one, tmp_path / "lora", rank=5)
    adapted = open_checkpoint(f"{models['base']}+{tmp_path / 'lora'}")
    for matrix in report.matrices:
        delta = (one.read(matrix.name) - base.read(matrix.name)).double()
        squares = torch.linalg.svdvals(delta).square()
        best = float(squares[:5].sum() / squares.sum())
        assert matrix.kept == pytest.approx(best, abs=0.01)
        lost = (adapted.read(matrix.name).double() - one.read(matrix.name).double()).square().sum()
        assert matrix.kept == pytest.approx(1 - float(lost / squares.sum()), abs=1e-4)


def test_what_no_product_can_hold_is_named_or_kept_whole(models, tmp_path):
    base, one = open_checkpoint(models["base"]), open_checkpoint(models["one"])
    partial = extract_lora(base, one, tmp_path / "partial", rank=32)
    assert set(partial.left_out) == {n for n in base.tensors if "norm" in n or "embed" in n}
    assert partial.kept < 1
    whole = extract_lora(base, one, tmp_path / "whole", rank=32, keep_whole=True)
    assert set(whole.whole) == set(partial.left_out)
    assert not whole.left_out
    again = open_checkpoint(f"{models['base']}+{tmp_path / 'whole'}")
    for name in one.tensors:
        torch.testing.assert_close(again.read(name), one.read(name), rtol=1e-5, atol=1e-6)


def test_a_rank_above_a_matrix_side_is_that_side(models, merged, tmp_path):
    report = extract_lora(open_checkpoint(models["base"]), open_checkpoint(merged), tmp_path / "lora", rank=20)
    assert {matrix.rank for matrix in report.matrices if "k_proj" in matrix.name} == {16}
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    open_checkpoint(f"{models['base']}+{tmp_path / 'lora'}").fingerprint()


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_callers_random_numbers_alone(models, tmp_path):
    base, one = open_checkpoint(models["base"]), open_checkpoint(models["one"])
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    for name in ("a", "b"):
        extract_lora(base, one, tmp_path / name, rank=2, seed=7)
    assert torch.equal(torch.rand(1), expected)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_equal_models_a_bad_rank_and_an_existing_output_are_refused(models, tmp_path):
    base, one = open_checkpoint(models["base"]), open_checkpoint(models["one"])
    with pytest.raises(InputError, match="nothing to extract"):
        extract_lora(base, base, tmp_path / "lora")
    with pytest.raises(InputError, match="rank is 0"):
        extract_lora(base, one, tmp_path / "lora", rank=0)
    (tmp_path / "lora").mkdir()
    with pytest.raises(InputError, match="exists already"):
        extract_lora(base, one, tmp_path / "lora")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora"]


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 30), columns=st.integers(1, 30), rank=st.integers(1, 40), seed=st.integers(0, 1000))
def test_a_full_rank_gives_the_matrix_back(rows, columns, rank, seed):
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    down, up = low_rank(delta, rank, seed=seed)
    assert down.shape[0] == up.shape[1] == min(rank, rows, columns)
    if rank >= min(rows, columns):
        torch.testing.assert_close(up @ down, delta, rtol=1e-3, atol=1e-4)


def test_random_weights_are_not_of_low_rank():
    """Guards the fixtures: else every energy above would be 1 by construction."""
    delta = random_weights(1)[Q] - random_weights(2)[Q]
    assert torch.linalg.matrix_rank(delta) == 32


def test_a_merged_model_with_a_head_of_its_own_comes_back_from_a_tied_base(models, tmp_path):
    from merging_models import CONFIG

    from dapt_merge import merge

    weights = load_weights(models["one"])
    own = weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 0.5}
    untied = save_model(tmp_path / "untied", own, CONFIG | {"tie_word_embeddings": False})
    extract_lora(open_checkpoint(models["base"]), open_checkpoint(untied), tmp_path / "lora", rank=32, keep_whole=True)
    again = open_checkpoint(f"{models['base']}+{tmp_path / 'lora'}")
    assert again.config["tie_word_embeddings"] is False
    assert set(again.tensors) == set(own)
    for name, tensor in own.items():
        torch.testing.assert_close(again.read(name), tensor, rtol=1e-5, atol=1e-6)
    model = merge(untied, f"{models['base']}+{tmp_path / 'lora'}", "linear", weight=1.0).to_model()
    torch.testing.assert_close(model.lm_head.weight, own["lm_head.weight"], rtol=1e-5, atol=1e-6)
