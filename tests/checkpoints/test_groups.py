"""Tensor names say where a tensor sits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapt_merge.checkpoints.groups import (
    TensorGroup,
    embedding_and_head,
    natural_order,
    tensor_group,
    vocabulary_axis,
)


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.embed_tokens.weight", None, "embedding"),
        ("model.layers.0.self_attn.q_proj.weight", 0, "attention"),
        ("model.layers.12.mlp.down_proj.weight", 12, "mlp"),
        ("model.layers.12.post_attention_layernorm.weight", 12, "norm"),
        ("model.layers.3.self_attn.q_norm.weight", 3, "norm"),
        ("model.norm.weight", None, "norm"),
        ("lm_head.weight", None, "head"),
        ("transformer.h.5.attn.c_attn.weight", 5, "attention"),
        ("transformer.h.5.ln_1.bias", 5, "norm"),
        ("transformer.wpe.weight", None, "embedding"),
        ("gpt_neox.layers.7.mlp.dense_4h_to_h.weight", 7, "mlp"),
        ("gpt_neox.layers.7.attention.query_key_value.weight", 7, "attention"),
        ("gpt_neox.embed_in.weight", None, "embedding"),
        ("embed_out.weight", None, "head"),
        ("model.layers.2.block_sparse_moe.experts.4.w1.weight", 2, "mlp"),
        ("something.else", None, "other"),
    ],
)
def test_a_name_states_layer_and_kind(name, layer, kind):
    assert tensor_group(name) == TensorGroup(layer, kind)


@given(st.lists(st.text(alphabet="ab.019", max_size=8), unique=True))
def test_the_natural_order_does_not_depend_on_the_given_order(names):
    assert natural_order(names) == natural_order(reversed(names))


def test_layer_two_comes_before_layer_ten():
    assert natural_order([f"model.layers.{i}.w" for i in (10, 2, 1)]) == [f"model.layers.{i}.w" for i in (1, 2, 10)]


def test_the_embedding_and_its_head_are_found_in_any_family():
    assert embedding_and_head(["transformer.wte.weight", "lm_head.weight"]) == (
        "transformer.wte.weight",
        "lm_head.weight",
    )
    assert embedding_and_head(["gpt_neox.embed_in.weight", "embed_out.weight"]) == (
        "gpt_neox.embed_in.weight",
        "embed_out.weight",
    )


def built_on_meta(configuration_class, model_class):
    """Return the names of a two-layer model's parameters; None where the class needs more than its defaults."""
    import torch

    try:
        configuration = configuration_class()
        for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            if isinstance(getattr(configuration, key, None), int):
                setattr(configuration, key, 2)
        if isinstance(getattr(configuration, "layer_types", None), list):
            configuration.layer_types = configuration.layer_types[:2]
        with torch.device("meta"):
            return [name for name, _ in model_class(configuration).named_parameters()]
    except Exception:  # many kinds: what such a class needs is not this test's subject
        return None


@pytest.mark.slow
def test_the_decoders_that_transformers_has_are_placed_whoever_made_them():
    """Names decide, so that a family nobody listed is placed too; state-space layers and vision parts are "other"."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    placed, partly = [], {}
    for configuration_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        names = built_on_meta(configuration_class, MODEL_FOR_CAUSAL_LM_MAPPING[configuration_class])
        if names is None:
            continue
        others = [name for name in names if tensor_group(name).kind == "other"]
        if others or embedding_and_head(names)[0] is None:
            partly[configuration_class.__name__] = others[:1]
        else:
            placed.append(configuration_class.__name__)
    assert len(placed) > 4 * len(partly), partly
    assert {"LlamaConfig", "Qwen3MoeConfig", "DeepseekV3Config", "FalconConfig", "OPTConfig"} <= set(placed)


def test_a_table_of_positions_is_no_embedding_of_tokens():
    names = ["m.embeddings.position_embeddings.weight", "m.embeddings.word_embeddings.weight", "m.backbone.weight"]
    assert embedding_and_head(names) == ("m.embeddings.word_embeddings.weight", None)
    assert embedding_and_head(["a.position_embeddings.weight"]) == (None, None)
    assert embedding_and_head(["backbone.embeddings.weight", "lm_head.weight"]) == (
        "backbone.embeddings.weight", "lm_head.weight"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("model.embed_tokens.weight", 0),
        ("cls.predictions.bias", 0),
        ("lm_head.bias", 0),
        ("decoder.bias", 0),
        ("model.final_logits_bias", 1),
        ("model.embed_positions.weight", None),
        ("bert.embeddings.token_type_embeddings.weight", None),
        ("lm_head.dense.bias", None),
        ("model.layers.0.self_attn.q_proj.bias", None),
    ],
)
def test_the_tensors_with_a_place_for_each_token_are_known(name, axis):
    assert vocabulary_axis(name) == axis
