"""Inputs that do not belong together are refused with both values; a tied head is one tensor however it is stored."""

import json

import pytest
import torch
from merging_models import CONFIG, TOKENS, load_weights, random_weights, save_model

from dapt_merge import ResidentMerger, merge, open_checkpoint
from dapt_merge.errors import InputError
from dapt_merge.merging.live import model_from_config

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "mistral"),
        ("vocab_size", 97),
        ("hidden_size", 64),
        ("num_hidden_layers", 3),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("rope_theta", 500000.0),
        ("rms_norm_eps", 1e-6),
        ("hidden_act", "gelu"),
    ],
)
def test_a_config_mismatch_is_refused_naming_both_values(models, tmp_path, key, value):
    other = save_model(tmp_path / "other", load_weights(models["one"]), CONFIG | {key: value})
    with pytest.raises(InputError) as error:
        merge(models["base"], other, "linear", weight=0.5)
    assert key in str(error.value)
    assert str(CONFIG[key]) in str(error.value)
    assert str(value) in str(error.value)


def test_the_two_layouts_of_rotary_settings_mean_the_same(models, tmp_path):
    newer = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    weights = load_weights(models["one"])
    same = newer | {"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}}
    merge(models["base"], save_model(tmp_path / "same", weights, same), "linear", weight=0.5)
    scaled = newer | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "llama3", "factor": 8.0}}
    with pytest.raises(InputError, match=r"factor|rope_type"):
        merge(models["base"], save_model(tmp_path / "scaled", weights, scaled), "linear", weight=0.5)


def test_settings_that_do_not_change_the_weights_meaning_may_differ(models, tmp_path):
    config = CONFIG | {"torch_dtype": "bfloat16", "use_cache": False, "max_position_embeddings": 128, "eos_token_id": 5}
    other = save_model(tmp_path / "other", load_weights(models["one"]), config)
    assert not merge(models["base"], other, "linear", weight=0.5).plan.warnings


def test_two_vocabularies_are_refused_naming_a_token(models, tmp_path):
    swapped = TOKENS | {"token7": 8, "token8": 7}
    other = save_model(tmp_path / "other", load_weights(models["one"]), tokens=swapped)
    with pytest.raises(InputError, match=r"2 tokens differ, the first is 'token7'"):
        merge(models["base"], other, "linear", weight=0.5)


def test_the_same_vocabulary_in_another_order_or_with_other_settings_is_no_difference(models, tmp_path):
    other = save_model(tmp_path / "other", load_weights(models["one"]), tokens=None)
    content = {"truncation": None, "model": {"vocab": dict(reversed(TOKENS.items()))}}
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert not merge(models["base"], other, "linear", weight=0.5).plan.warnings


def test_an_added_token_counts_as_vocabulary(models, tmp_path):
    other = save_model(tmp_path / "other", load_weights(models["one"]), tokens=None)
    content = {"model": {"vocab": TOKENS}, "added_tokens": [{"id": 96, "content": "<extra>"}]}
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="'<extra>'"):
        merge(models["base"], other, "linear", weight=0.5)


def test_a_vocabulary_that_cannot_be_compared_is_in_the_report(models, tmp_path):
    other = save_model(tmp_path / "other", load_weights(models["one"]), tokens=None)
    (warning,) = merge(models["base"], other, "linear", weight=0.5).plan.warnings
    assert "not compared" in warning


def test_a_garbled_tokenizer_is_refused(models, tmp_path):
    other = save_model(tmp_path / "other", load_weights(models["one"]), tokens=None)
    (other / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer"):
        merge(models["base"], other, "linear", weight=0.5)


@pytest.mark.parametrize("side", ["base", "dapt"])
def test_a_missing_tensor_is_refused_with_the_nearest_name(models, tmp_path, side):
    weights = load_weights(models["one"])
    weights["model.norms.weight"] = weights.pop("model.norm.weight")
    other = save_model(tmp_path / "other", weights)
    pair = (models["base"], other) if side == "dapt" else (other, models["base"])
    with pytest.raises(InputError, match=r"Did you mean 'model\.norm"):
        merge(*pair, "linear", weight=0.5)


def test_another_shape_or_kind_of_tensor_is_refused(models, tmp_path):
    weights = load_weights(models["one"])
    for name, tensor in (("shape", torch.ones(31)), ("kind", torch.ones(32, dtype=torch.int64))):
        other = save_model(tmp_path / name, weights | {"model.norm.weight": tensor})
        with pytest.raises(InputError, match=r"model\.norm\.weight"):
            merge(models["base"], other, "linear", weight=0.5)


def test_position_tables_that_only_old_files_store_are_left_out_and_reported(models, tmp_path):
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    old = save_model(tmp_path / "old", load_weights(models["base"]) | tables)
    for pair in ((old, models["one"]), (models["one"], old)):
        lazy = merge(*pair, "linear", weight=0.5)
        assert set(lazy) == set(load_weights(models["one"]))
        assert any("position tables" in warning for warning in lazy.plan.warnings)


# --- tied embeddings --------------------------------------------------------------------------------------------------


def with_copied_head(weights):
    return weights | {HEAD: weights[EMBEDDING].clone()}


def without(key):
    return {name: value for name, value in CONFIG.items() if name != key}


@pytest.mark.parametrize("config", [CONFIG, CONFIG | {"tie_word_embeddings": False}, without("tie_word_embeddings")])
@pytest.mark.parametrize("copy_in", ["base", "dapt"])
def test_a_stored_copy_of_the_tied_head_merges_with_a_checkpoint_without_one(models, tmp_path, config, copy_in):
    names = {"base": "base", "dapt": "one"}
    folders = {side: models[name] for side, name in names.items()}
    copied = save_model(tmp_path / "copied", with_copied_head(load_weights(folders[copy_in])), config)
    expected = merge(folders["base"], folders["dapt"], "ties", weight=0.5, density=0.5)
    folders[copy_in] = copied
    lazy = merge(folders["base"], folders["dapt"], "ties", weight=0.5, density=0.5)
    assert set(lazy) == set(expected)
    assert all(torch.equal(lazy[name], expected[name]) for name in expected)
    lazy.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    model = lazy.to_model()
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, expected[EMBEDDING])


@pytest.mark.parametrize("tied_side", ["base", "dapt"])
def test_a_head_of_its_own_beside_a_tied_one_is_merged_with_the_tied_ones_embedding(models, tmp_path, tied_side):
    weights = load_weights(models["one"])
    own = weights | {HEAD: weights[EMBEDDING] + 1}
    untied = save_model(tmp_path / "untied", own, CONFIG | {"tie_word_embeddings": False})
    pair = (models["base"], untied) if tied_side == "base" else (untied, models["base"])
    lazy = merge(*pair, "linear", weight=0.25)
    assert set(lazy) == set(own)
    first, second = (load_weights(folder) for folder in pair)
    for name in (EMBEDDING, HEAD):
        one, two = first.get(name, first[EMBEDDING]), second.get(name, second[EMBEDDING])
        torch.testing.assert_close(lazy[name], 0.75 * one + 0.25 * two)
    report = lazy.save(tmp_path / "out")
    assert any("the merge has a head of its own" in warning for warning in report.warnings)
    assert report.inputs[str(models["base"])] == open_checkpoint(models["base"]).fingerprint()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    model = lazy.to_model()
    assert torch.equal(model.lm_head.weight, lazy[HEAD])
    assert torch.equal(model.get_input_embeddings().weight, lazy[EMBEDDING])


def test_end_points_of_a_tied_and_an_untied_model_are_exact(models, tmp_path):
    weights = load_weights(models["one"])
    own = weights | {HEAD: weights[EMBEDDING] + 1}
    untied = save_model(tmp_path / "untied", own, CONFIG | {"tie_word_embeddings": False})
    for weight, expected in ((1.0, own), (0.0, (base := load_weights(models["base"])) | {HEAD: base[EMBEDDING]})):
        lazy = merge(models["base"], untied, "ties", weight=weight, density=1.0)
        assert all(torch.equal(lazy[name], expected[name]) for name in expected)


def test_a_live_model_takes_a_tied_and_an_untied_checkpoint_if_it_has_two_tables(models, tmp_path):
    from dapt_merge import make_recipe

    weights = load_weights(models["one"])
    untied = save_model(
        tmp_path / "untied", weights | {HEAD: weights[EMBEDDING] + 1}, CONFIG | {"tie_word_embeddings": False}
    )
    checkpoints = {"base": open_checkpoint(models["base"]), "one": open_checkpoint(untied)}
    model = model_from_config(checkpoints["one"], torch.float32)
    ResidentMerger(model, checkpoints).apply(make_recipe("base", ["one"], "linear", weight=0.5))
    assert torch.equal(model.lm_head.weight, merge(models["base"], untied, "linear", weight=0.5)[HEAD])
    with pytest.raises(InputError, match="ties"):
        ResidentMerger(model_from_config(checkpoints["base"], torch.float32), checkpoints)


def test_a_config_that_ties_what_differs_in_the_file_is_refused(models, tmp_path):
    weights = load_weights(models["one"])
    liar = save_model(tmp_path / "liar", weights | {HEAD: weights[EMBEDDING] + 1})
    with pytest.raises(InputError, match="stored tensors differ"):
        merge(models["base"], liar, "linear", weight=0.5)


def test_untied_models_merge_their_heads_on_their_own(models, tmp_path):
    config = CONFIG | {"tie_word_embeddings": False}
    folders = []
    for seed, name in enumerate(("base", "one")):
        weights = random_weights(seed)
        folders.append(save_model(tmp_path / name, weights | {HEAD: weights[EMBEDDING] * (seed + 2)}, config))
    lazy = merge(*folders, "linear", weight=0.5)
    model = lazy.to_model()
    assert HEAD in lazy
    assert torch.equal(model.lm_head.weight, lazy[HEAD])
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_tied_live_model_is_rewritten_once_and_stays_tied(models):
    checkpoints = {name: open_checkpoint(path) for name, path in models.items()}
    model = model_from_config(checkpoints["base"], torch.float32)
    from dapt_merge import make_recipe

    report = ResidentMerger(model, checkpoints).apply(make_recipe("base", ["one"], "linear", weight=0.5))
    assert report.tensors == len(checkpoints["base"].tensors)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


# --- files that are laid out otherwise --------------------------------------------------------------------------------


def sharded(folder, weights, shards):
    """Save the weights in so many files, in an order that has nothing to do with the model's."""
    from safetensors.torch import save_file

    folder.mkdir()
    names = sorted(weights, key=lambda name: name[::-1])
    weight_map = {}
    for number in range(shards):
        file = f"part-{number}.safetensors"
        part = {name: weights[name] for name in names[number::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_checkpoints_cut_into_different_shards_merge_like_whole_ones(models, tmp_path):
    base = sharded(tmp_path / "base", load_weights(models["base"]), 3)
    dapt = sharded(tmp_path / "dapt", load_weights(models["one"]), 5)
    expected = merge(models["base"], models["one"], "ties", weight=0.5, density=0.5)
    for pair in ((base, dapt), (models["base"], dapt), (base, models["one"])):
        lazy = merge(*pair, "ties", weight=0.5, density=0.5)
        assert all(torch.equal(lazy[name], expected[name]) for name in expected)


def test_mixed_dtypes_are_merged_in_float32_and_written_as_the_base_has_them(models, tmp_path):
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    weights = load_weights(models["base"])
    mixed = {name: tensor.to(kinds[number % 3]) for number, (name, tensor) in enumerate(weights.items())}
    one = load_weights(models["one"])
    dapt = {name: one[name].to(kinds[number % 2]) for number, name in enumerate(one)}
    folders = save_model(tmp_path / "base", mixed), save_model(tmp_path / "dapt", dapt)
    lazy = merge(*folders, "linear", weight=0.5)
    for name in weights:
        assert lazy[name].dtype == mixed[name].dtype
        exact = (mixed[name].double() + dapt[name].double()) / 2
        # One rounding to the output's dtype: no more than half a step of it away, and a step of float32.
        step = torch.finfo(mixed[name].dtype).eps
        torch.testing.assert_close(lazy[name].double(), exact, rtol=step / 2 + 1e-6, atol=1e-7)
    lazy.save(tmp_path / "out")
    assert {n: t.dtype for n, t in load_weights(tmp_path / "out").items()} == {n: t.dtype for n, t in mixed.items()}
