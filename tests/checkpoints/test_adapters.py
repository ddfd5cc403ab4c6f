"""A LoRA adapter with its base is the model that peft makes of them, tensor by tensor and without loading it."""

import json
import os
import pickle

import pytest
import torch
from model_families import tiny_model
from safetensors.torch import load_file, save_file

from dapt_merge import load_recipe, merge, open_checkpoint
from dapt_merge.errors import InputError

CASES = {
    "lora": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 3, r"layers\.1\.self_attn\.q_proj": 5},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 32},
        },
    ),
    "dora": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d_dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "bias_of_all": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "bias_of_lora": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "lora_bias": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "embedding_dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "saved_modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "token_rows": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "bert": ("bert", {"target_modules": ["query", "value"]}),
    "bert_classifier": ("bert_classifier", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "t5": ("t5", {"target_modules": ["q", "v", "wi"]}),
    "phi_all_linear": ("phi", {"target_modules": "all-linear", "use_dora": True}),
}


def train(model, seed=3):
    """Move the trainable parameters at random, biases and magnitudes too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def make_adapter(root, family, **settings):
    """Return (base folder, adapter folder, the weights that peft merges them to)."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model(family)
    model.save_pretrained(root / "base")
    model.name_or_path = str(root / "base")
    adapted = train(get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 6, **settings})))
    adapted.save_pretrained(root / "adapter")
    return root / "base", root / "adapter", open_checkpoint(adapted.merge_and_unload())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("plain"), "llama", target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("case", sorted(CASES))
def test_base_plus_adapter_is_what_peft_merges(case, tmp_path):
    family, settings = CASES[case]
    base, adapter, expected = make_adapter(tmp_path, family, **settings)
    checkpoint = open_checkpoint(f"{base}+{adapter}")
    assert list(checkpoint.tensors) == list(expected.tensors)
    changed = 0
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype.torch_dtype, info.shape)
        torch.testing.assert_close(tensor, expected.read(name), rtol=1e-6, atol=1e-6)
        changed += not torch.equal(tensor, open_checkpoint(base).read(name))
    assert changed >= 1


def test_an_adapter_folder_alone_finds_the_base_that_it_names(plain):
    base, adapter, _ = plain
    assert open_checkpoint(adapter).fingerprint() == open_checkpoint(f"{base}+{adapter}").fingerprint()


def test_a_tensor_is_the_same_bits_however_often_it_is_read(plain):
    base, adapter, _ = plain
    checkpoint = open_checkpoint(f"{base}+{adapter}")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(checkpoint.read(name), checkpoint.read(name))
    assert open_checkpoint(adapter).digest(name) == checkpoint.digest(name)


def test_large_matrices_in_chunks_are_the_product(monkeypatch):
    from dapt_merge.checkpoints import adapters

    generator = torch.Generator().manual_seed(0)
    weight, down, up = (torch.randn(shape, generator=generator) for shape in ((50, 30), (4, 30), (50, 4)))
    magnitude = torch.rand(50, generator=generator) + 0.5
    whole = adapters.adapted_weight(weight, down, up, 0.7, magnitude)
    monkeypatch.setattr(adapters, "_CHUNK_ELEMENTS", 100)
    torch.testing.assert_close(adapters.adapted_weight(weight, down, up, 0.7, magnitude), whole, rtol=1e-7, atol=1e-7)
    flipped = adapters.adapted_weight(weight.T, down, up, 0.7, magnitude, transposed=True)
    torch.testing.assert_close(flipped, whole.T, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(whole.norm(dim=1), magnitude)


def test_disk_live_model_and_api_agree_on_an_adapter(plain, tmp_path):
    base, adapter, expected = plain
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(adapter)}],
        "parameters": {"weight": 0.5},
    }
    lazy = merge(recipe=recipe)
    lazy.save(tmp_path / "out")
    written, live = open_checkpoint(tmp_path / "out"), open_checkpoint(lazy.to_model())
    start = open_checkpoint(base)
    for name in lazy:
        assert torch.equal(written.read(name), lazy[name])
        assert torch.equal(live.read(name), lazy[name])
        half = (start.read(name) + expected.read(name)) / 2
        torch.testing.assert_close(lazy[name], half, rtol=1e-6, atol=1e-6)
    whole = merge(base, f"{base}+{adapter}", "task_arithmetic", weight=1.0)
    assert whole.save(tmp_path / "whole").output == open_checkpoint(f"{base}+{adapter}").fingerprint()


def test_the_output_keeps_the_dtype_of_a_bfloat16_base(plain, tmp_path):
    base, adapter, _ = plain
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    weights = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, narrow / "model.safetensors")
    (narrow / "config.json").write_text((base / "config.json").read_text())
    reference = f"{narrow}+{adapter}"
    name = "model.layers.0.self_attn.q_proj.weight"
    assert open_checkpoint(reference).read(name).dtype == torch.float32
    assert merge(reference, narrow, "linear", weight=0.5)[name].dtype == torch.bfloat16
    assert merge(narrow, reference, "linear", weight=0.5)[name].dtype == torch.bfloat16


def test_an_adapter_folder_stands_on_the_recipes_base_and_says_so(plain, tmp_path):
    base, adapter, _ = plain
    moved = tmp_path / "moved"
    base.rename(moved)
    try:
        lazy = merge(moved, adapter, "linear", weight=0.5)
        assert any("names" in warning and str(base) in warning for warning in lazy.plan.warnings)
        with pytest.raises(InputError, match="no such file"):
            open_checkpoint(adapter)
    finally:
        moved.rename(base)


def test_a_recipe_beside_the_models_names_them_relative_to_itself(plain):
    base, adapter, _ = plain
    (base.parent / "recipe.yaml").write_text(
        "merge_method: linear\nbase_model: base\nmodels: [{model: base+adapter, parameters: {weight: 0.5}}]\n"
    )
    assert load_recipe(base.parent / "recipe.yaml").task_models() == (f"{base}+{adapter}",)


def test_the_output_may_not_replace_the_adapter(plain):
    base, adapter, _ = plain
    with pytest.raises(InputError, match="own input"):
        merge(base, f"{base}+{adapter}", "linear", weight=0.5).save(adapter, overwrite=True)


# --- refusals ---------------------------------------------------------------------------------------------------------


def copied(adapter, target, weights=None, **settings):
    target.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text()) | settings
    (target / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights or load_file(adapter / "adapter_model.safetensors"), target / "adapter_model.safetensors")
    return target


def test_a_pickled_adapter_is_refused_unopened(plain, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    adapter = copied(plain[1], tmp_path / "pickled")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match="pickle") as error:
        open_checkpoint(f"{plain[0]}+{adapter}")
    assert "save_pretrained" in str(error.value.remedy)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("settings", "saying"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"target_parameters": ["w"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"r": 7}, "rank"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(plain, tmp_path, settings, saying):
    with pytest.raises(InputError, match=saying) as error:
        open_checkpoint(f"{plain[0]}+{copied(plain[1], tmp_path / 'other', **settings)}")
    assert error.value.where
    assert error.value.remedy


def test_an_adapter_of_another_model_is_refused(plain, tmp_path):
    tiny_model("llama", hidden_size=64).save_pretrained(tmp_path / "wider")
    with pytest.raises(InputError, match=r"\(32, 32\).*\(32, 64\)"):
        open_checkpoint(f"{tmp_path / 'wider'}+{plain[1]}")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "shallower")
    with pytest.raises(InputError, match=r"layers\.2"):
        open_checkpoint(f"{tmp_path / 'shallower'}+{plain[1]}")


def test_half_an_adapter_is_refused(plain, tmp_path):
    weights = load_file(plain[1] / "adapter_model.safetensors")
    half = {name: tensor for name, tensor in weights.items() if "layers.1.self_attn.q_proj.lora_B" not in name}
    with pytest.raises(InputError, match="missing"):
        open_checkpoint(f"{plain[0]}+{copied(plain[1], tmp_path / 'half', half)}")


def test_a_tensor_that_no_rule_explains_is_refused_and_not_added(plain, tmp_path):
    weights = load_file(plain[1] / "adapter_model.safetensors")
    odd = weights | {"base_model.model.model.layers.0.self_attn.q_proj.lora_E": torch.ones(2)}
    with pytest.raises(InputError, match="lora_E"):
        open_checkpoint(f"{plain[0]}+{copied(plain[1], tmp_path / 'odd', odd)}")


def test_a_folder_with_a_full_model_and_an_adapter_is_refused(plain, tmp_path):
    adapter = copied(plain[1], tmp_path / "both")
    save_file({"w": torch.ones(1)}, adapter / "model.safetensors")
    with pytest.raises(InputError, match="full model and a LoRA adapter"):
        open_checkpoint(adapter)
    with pytest.raises(InputError, match="folder itself"):
        open_checkpoint(adapter / "adapter_model.safetensors")


def test_an_adapter_without_weights_or_base_is_refused(plain, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        open_checkpoint(empty)
    with pytest.raises(InputError, match="does not say which model"):
        open_checkpoint(copied(plain[1], tmp_path / "orphan", base_model_name_or_path=None))
    with pytest.raises(InputError, match="no LoRA adapter"):
        open_checkpoint(f"{plain[0]}+{plain[0]}")


def test_a_live_peft_model_is_refused_with_the_way_out(plain):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(InputError, match="in memory has a LoRA adapter"):
        open_checkpoint(get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])))


def test_a_changed_head_of_a_tied_model_is_tied_no_longer(tmp_path):
    base, adapter, _ = make_adapter(tmp_path, "qwen2", target_modules=["lm_head"])
    weights = load_file(base / "model.safetensors")
    del weights["lm_head.weight"]
    tied = tmp_path / "tied"
    tied.mkdir()
    save_file(weights, tied / "model.safetensors")
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tied / "config.json").write_text(json.dumps(config))
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, tied / "model.safetensors")
    stored = load_file(adapter / "adapter_model.safetensors")
    thin = {name: tensor for name, tensor in stored.items() if "base_layer" not in name}
    checkpoint = open_checkpoint(f"{tied}+{copied(adapter, tmp_path / 'thin', thin)}")
    assert checkpoint.config["tie_word_embeddings"] is False
    assert torch.equal(checkpoint.read("model.embed_tokens.weight"), weights["model.embed_tokens.weight"])
    assert not torch.equal(checkpoint.read("lm_head.weight"), weights["model.embed_tokens.weight"])
    lazy = merge(tied, f"{tied}+{tmp_path / 'thin'}", "linear", weight=0.5)
    assert lazy.plan.config_from.config["tie_word_embeddings"] is False
    expected = (weights["model.embed_tokens.weight"] + checkpoint.read("lm_head.weight")) / 2
    torch.testing.assert_close(lazy["lm_head.weight"], expected)


# --- how often it is computed -----------------------------------------------------------------------------------------


def counted(monkeypatch):
    """Return a list that grows by the shape of each matrix that an adapter is applied to."""
    from dapt_merge.checkpoints import adapters

    calls, original = [], adapters.adapted_weight

    def adapted_weight(weight, *arguments, **settings):
        calls.append(tuple(weight.shape))
        return original(weight, *arguments, **settings)

    monkeypatch.setattr(adapters, "adapted_weight", adapted_weight)
    return calls


def test_a_merge_to_disk_computes_each_adapted_tensor_once(plain, tmp_path, monkeypatch):
    base, adapter, _ = plain
    calls = counted(monkeypatch)
    report = merge(base, f"{base}+{adapter}", "task_arithmetic", weight=0.5).save(tmp_path / "out")
    assert len(calls) == 6  # two matrices in each of three layers
    assert report.inputs[f"{base}+{adapter}"] == open_checkpoint(f"{base}+{adapter}").fingerprint()


@pytest.mark.parametrize(("budget_bytes", "computed"), [(None, 6), (2 * (4096 + 2048), 4 + 3 * 2), (0, 18)])
def test_a_live_model_keeps_adapted_tensors_within_a_budget(plain, monkeypatch, budget_bytes, computed):
    from dapt_merge import ResidentMerger, make_recipe
    from dapt_merge.checkpoints import keeping
    from dapt_merge.merging.live import model_from_config

    base, adapter, _ = plain
    whole = keeping.keep_computed
    monkeypatch.setattr("dapt_merge.merging.resident.keep_computed", lambda c: whole(c, budget_bytes))
    monkeypatch.setattr(keeping, "free_memory_bytes", lambda: 10**9)
    checkpoints = {"base": open_checkpoint(base), "lora": open_checkpoint(f"{base}+{adapter}")}
    sizes = [checkpoints["lora"].tensors[f"model.layers.0.self_attn.{n}_proj.weight"].nbytes for n in "qv"]
    assert sizes == [4096, 2048]
    model = model_from_config(checkpoints["base"], torch.float32)
    merger = ResidentMerger(model, checkpoints)
    calls = counted(monkeypatch)
    for weight in (0.25, 0.5, 0.75):
        merger.apply(make_recipe("base", ["lora"], "linear", weight=weight))
    assert len(calls) == computed
    expected = merge(base, f"{base}+{adapter}", "linear", weight=0.75)
    held = open_checkpoint(model)
    assert all(torch.equal(held.read(name), expected[name]) for name in expected)
