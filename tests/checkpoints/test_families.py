"""Models as they really come: every family's tensors are placed, and named and merged alike on disk and in memory."""

import json

import pytest
import torch
from model_families import FAMILIES, moved, tiny_model
from safetensors.torch import load_file, save_file

from dapt_merge import ResidentMerger, make_recipe, merge, open_checkpoint
from dapt_merge.checkpoints import TensorGroup, tensor_group
from dapt_merge.errors import InputError
from dapt_merge.merging.live import model_from_config

ENCODER_DECODERS = ("t5", "t5_gated", "bart")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return a function: family → the folders of a base and of a model trained from it."""
    made = {}

    def folders(family):
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            model = tiny_model(family)
            model.save_pretrained(root / "base")
            moved(model, seed=1).save_pretrained(root / "dapt")
            made[family] = (root / "base", root / "dapt")
        return made[family]

    return folders


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_tensor_has_a_group_and_layers_count_from_zero(family):
    model = tiny_model(family)
    checkpoint = open_checkpoint(model)
    groups = {name: tensor_group(name) for name in checkpoint.tensors}
    assert {name for name, group in groups.items() if group.kind == "other"} == set()
    for stack in {group.stack for group in groups.values() if group.layer is not None}:
        inside = [group for group in groups.values() if group.stack == stack and group.layer is not None]
        assert {group.layer for group in inside} == set(range(checkpoint.layers_of(stack)))
        for layer in range(checkpoint.layers_of(stack)):
            assert {group.kind for group in inside if group.layer == layer} >= {"attention", "mlp", "norm"}
    outside = {group.kind for group in groups.values() if group.layer is None}
    assert "embedding" in outside
    assert not outside & {"attention", "mlp"}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_linear_weights_of_attention_and_mlp_are_not_mixed_up(family):
    for name, _ in tiny_model(family).named_parameters():
        kind = tensor_group(name).kind
        if "mlp" in name.lower().split(".") or "DenseReluDense" in name:
            assert kind == "mlp"
        if "norm" not in name.lower() and ("self_attn" in name or "SelfAttention" in name or ".attention." in name):
            assert kind == "attention"


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_and_decoder_layers_are_kept_apart(family):
    checkpoint = open_checkpoint(tiny_model(family))
    assert (checkpoint.layers_of("encoder"), checkpoint.layers_of("decoder")) == (2, 3)
    layer = {"t5": "block.2.layer.0.SelfAttention.q", "bart": "layers.2.self_attn.q_proj"}[family.partition("_")[0]]
    name = next(name for name in checkpoint.tensors if name.endswith(f"decoder.{layer}.weight"))
    assert tensor_group(name) == TensorGroup(2, "attention", "decoder")


def test_a_gradient_runs_over_each_stack_on_its_own(pair):
    base, dapt = pair("t5")
    recipe = {
        "merge_method": "slerp",
        "base_model": str(base),
        "models": [{"model": str(dapt)}],
        "parameters": {"t": [0.0, 1.0]},
    }
    plan = merge(recipe=recipe).plan
    t = {job.name: job.parameters.values["t"] for job in plan.jobs}
    assert t["encoder.block.1.layer.0.SelfAttention.q.weight"] == 1.0
    assert t["decoder.block.1.layer.0.SelfAttention.q.weight"] == 0.5
    assert t["decoder.block.2.layer.1.EncDecAttention.q.weight"] == 1.0
    assert t["shared.weight"] == 0.0


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_saved_model_has_the_tensors_of_the_live_one(family, pair):
    live = open_checkpoint(tiny_model(family))
    saved = open_checkpoint(pair(family)[0])
    assert list(saved.tensors) == list(live.tensors)
    assert saved.fingerprint() == live.fingerprint()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_disk_live_model_and_api_give_the_same_bits(family, pair, tmp_path):
    base, dapt = pair(family)
    lazy = merge(base, dapt, "ties", weight=0.7, density=0.5)
    lazy.save(tmp_path / "out")
    model = lazy.to_model()
    assert type(model).__name__ == FAMILIES[family][0]
    written, live = open_checkpoint(tmp_path / "out"), open_checkpoint(model)
    assert list(written.tensors) == list(live.tensors) == list(lazy)
    for name in lazy:
        assert torch.equal(written.read(name), lazy[name]), name
        assert torch.equal(live.read(name), lazy[name]), name
    in_memory = merge(tiny_model(family), type(model).from_pretrained(dapt), "ties", weight=0.7, density=0.5)
    assert all(torch.equal(in_memory[name], lazy[name]) for name in lazy)


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2", "gpt_neox"])
def test_transformers_loads_what_was_written_as_the_same_model(family, pair, tmp_path):
    lazy = merge(*pair(family), "linear", weight=0.5)
    lazy.save(tmp_path / "out")
    model = lazy.to_model()
    again = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_the_class_follows_the_architecture_and_not_the_model_type_alone(pair):
    base = open_checkpoint(pair("bert")[0])
    unnamed = {key: value for key, value in base.config.items() if key != "architectures"}
    foreign = {**base.config, "architectures": ["NobodysBertForEverything"]}
    assert type(model_from_config(base, torch.float32)).__name__ == "BertForMaskedLM"
    assert type(model_from_config(base.with_config(foreign), torch.float32)).__name__.startswith("Bert")
    assert type(model_from_config(base.with_config(unnamed), torch.float32)).__name__.startswith("Bert")
    with pytest.raises(InputError, match="no class for bert"):
        model_from_config(base.with_config({**base.config, "architectures": ["T5Model"]}), torch.float32)
    for harmful in ("Trainer", "pipeline", "__builtins__"):
        model_from_config(base.with_config({**base.config, "architectures": [harmful]}), torch.float32)


# --- old files --------------------------------------------------------------------------------------------------------


def rewritten(folder, target, change):
    """Copy a model folder with other stored tensors."""
    target.mkdir()
    save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors")
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def test_the_old_names_of_bert_norms_are_the_new_ones(pair, tmp_path):
    def with_old_names(weights):
        norms = {n: n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta") for n in weights}
        return {norms[name]: tensor for name, tensor in weights.items()}

    base, dapt = pair("bert")
    old = rewritten(base, tmp_path / "old", with_old_names)
    assert any("gamma" in name for name in load_file(old / "model.safetensors"))
    assert open_checkpoint(old).fingerprint() == open_checkpoint(base).fingerprint()
    expected = merge(base, dapt, "linear", weight=0.5)
    found = merge(old, dapt, "linear", weight=0.5)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_gpt2_files_without_the_models_prefix_merge_with_those_that_have_it(pair, tmp_path):
    base, dapt = pair("gpt2")
    bare = rewritten(base, tmp_path / "bare", lambda w: {n.removeprefix("transformer."): t for n, t in w.items()})
    lazy = merge(bare, dapt, "linear", weight=0.5)
    expected = merge(base, dapt, "linear", weight=0.5)
    assert list(lazy) == list(expected)
    assert all(torch.equal(lazy[name], expected[name]) for name in expected)
    lazy.to_model()


def test_masks_and_position_tables_are_left_out_and_reported(pair, tmp_path):
    base, dapt = pair("gpt2")
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(3)}
    old = rewritten(base, tmp_path / "old", lambda w: w | masks)
    older = rewritten(dapt, tmp_path / "older", lambda w: w | masks)
    for first, second in ((old, dapt), (base, older), (old, older)):
        lazy = merge(first, second, "linear", weight=0.5)
        assert not set(masks) & set(lazy)
        assert any("3 position tables or masks" in warning for warning in lazy.plan.warnings)
        lazy.to_model()
    positions = {"bert.embeddings.position_ids": torch.arange(64)[None]}
    base, dapt = pair("bert")
    lazy = merge(rewritten(base, tmp_path / "bert", lambda w: w | positions), dapt, "linear", weight=0.5)
    assert "bert.embeddings.position_ids" not in lazy
    lazy.to_model()


def test_a_bias_of_attention_is_no_mask(pair):
    assert "transformer.h.0.attn.c_attn.bias" in merge(*pair("gpt2"), "linear", weight=0.5)


def test_a_pooler_in_one_checkpoint_only_is_left_out_and_named(pair, tmp_path):
    base, dapt = pair("bert")
    pooler = {"bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32)}
    pooled = rewritten(base, tmp_path / "pooled", lambda w: w | pooler)
    for first, second in ((pooled, dapt), (dapt, pooled)):
        lazy = merge(first, second, "linear", weight=0.5)
        (warning,) = lazy.plan.warnings
        assert "bert.pooler.dense.weight" in warning
        assert "pooled" in warning
        assert not set(pooler) & set(lazy)
        lazy.to_model()


def test_a_pooler_that_the_class_does_not_use_is_merged_on_disk_and_reported_in_a_live_model(pair, tmp_path):
    base, dapt = pair("bert")
    pooler = {"bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32)}
    folders = [rewritten(f, tmp_path / f.name, lambda w: w | pooler) for f in (base, dapt)]
    lazy = merge(*folders, "linear", weight=0.5)
    assert set(pooler) <= set(lazy)
    lazy.to_model()
    assert any("pooler" in warning and "does not use" in warning for warning in lazy.report().warnings)


def test_any_other_missing_tensor_is_an_error_that_names_it(pair, tmp_path):
    base, dapt = pair("bert")
    gone = "bert.encoder.layer.1.output.dense.bias"
    lacking = rewritten(dapt, tmp_path / "lacking", lambda w: {n: t for n, t in w.items() if n != gone})
    with pytest.raises(InputError, match=r"encoder\.layer\.1\.output\.dense\.bias"):
        merge(base, lacking, "linear", weight=0.5)


# --- tied tables ------------------------------------------------------------------------------------------------------


def test_stored_copies_of_t5s_shared_table_are_one_tensor(pair, tmp_path):
    base, dapt = pair("t5")
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    copied = rewritten(base, tmp_path / "copied", lambda w: w | {name: w["shared.weight"].clone() for name in copies})
    assert open_checkpoint(copied).fingerprint() == open_checkpoint(base).fingerprint()
    merge(copied, dapt, "linear", weight=0.5).to_model()
    torn = rewritten(base, tmp_path / "torn", lambda w: w | {copies[0]: w["shared.weight"] + 1})
    with pytest.raises(InputError, match="stored tensors differ"):
        merge(torn, dapt, "linear", weight=0.5)


def test_t5_with_a_head_of_its_own_keeps_it_in_a_live_model(pair, tmp_path):
    folders = []
    for number, folder in enumerate(pair("t5")):
        own = rewritten(
            folder, tmp_path / folder.name, lambda w, k=number: w | {"lm_head.weight": w["shared.weight"] + k + 1}
        )
        config = json.loads((own / "config.json").read_text()) | {"tie_word_embeddings": False}
        (own / "config.json").write_text(json.dumps(config))
        folders.append(own)
    lazy = merge(*folders, "linear", weight=0.5)
    model = lazy.to_model()
    assert torch.equal(model.lm_head.weight, lazy["lm_head.weight"])
    assert torch.equal(model.shared.weight, lazy["shared.weight"])
    assert not torch.equal(model.lm_head.weight, model.shared.weight)


def test_a_live_model_that_ties_what_the_checkpoints_keep_apart_is_refused(pair, tmp_path):
    base = pair("gpt2")[0]
    apart = rewritten(base, tmp_path / "apart", lambda w: w | {"lm_head.weight": w["transformer.wte.weight"] + 1})
    config = json.loads((apart / "config.json").read_text()) | {"tie_word_embeddings": False}
    (apart / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="ties"):
        ResidentMerger(tiny_model("gpt2"), {"apart": open_checkpoint(apart)})


def test_a_live_merge_of_an_encoder_can_be_repeated(pair):
    base, dapt = pair("camembert")
    checkpoints = {"base": open_checkpoint(base), "dapt": open_checkpoint(dapt)}
    merger = ResidentMerger(model := tiny_model("camembert"), checkpoints)
    merger.apply(make_recipe("base", ["dapt"], "linear", weight=1.0))
    assert open_checkpoint(model).fingerprint() == checkpoints["dapt"].fingerprint()
    merger.apply(make_recipe("base", ["dapt"], "linear", weight=0.0))
    assert open_checkpoint(model).fingerprint() == checkpoints["base"].fingerprint()


# --- mixtures of experts ----------------------------------------------------------------------------------------------


def test_a_live_mixture_of_experts_is_read_and_rewritten_expert_by_expert_in_its_own_memory(pair):
    base, dapt = pair("mixtral")
    model = tiny_model("mixtral")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    merger = ResidentMerger(model, {"base": open_checkpoint(base), "dapt": open_checkpoint(dapt)})
    fused = model.model.layers[1].mlp.experts.gate_up_proj
    before = fused.data_ptr()
    merger.apply(make_recipe("base", ["dapt"], "linear", weight=1.0))
    assert fused.data_ptr() == before
    expected = load_file(dapt / "model.safetensors")[name]
    assert torch.equal(fused[2, expected.shape[0] :], expected)
    live = open_checkpoint(model)
    with torch.no_grad():
        fused[2].zero_()
    assert not live.read(name).any()


def test_a_live_model_whose_files_need_a_copy_is_refused_as_a_target(pair, monkeypatch):
    from dapt_merge.merging import resident

    model = tiny_model("mixtral")
    copies = lambda model, keep_vars=False: {n: t.clone() for n, t in model.state_dict().items()}  # noqa: E731
    monkeypatch.setattr(resident, "stored_state", copies)
    with pytest.raises(InputError, match="another form than its files"):
        ResidentMerger(model, {"base": open_checkpoint(pair("mixtral")[0])})
