"""Tensor names say where a tensor sits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapt_merge.checkpoints.groups import TensorGroup, embedding_and_head, natural_order, tensor_group


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
