"""What a merge would do and cost, told from headers: every tensor's settings, its end points, bytes, memory, time."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merging_models import CONFIG, random_weights, save_model
from tokenized_models import byte_pairs, save_tokenized, with_added
from transformers import AutoTokenizer

from dapt_merge import load_recipe, make_recipe, merge_to_disk, open_checkpoint, plan_merge
from dapt_merge.merging.chain import merge_chain
from dapt_merge.merging.cost import estimate_cost, total_cost
from dapt_merge.merging.explanation import (
    describe,
    explain,
    explain_tokenizer,
    layer_by_layer,
    layer_runs,
    plan_chain,
)
from dapt_merge.recipe import load_recipes

LAYERS = 4
STEMS = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.{stem}" for layer in range(LAYERS) for stem in STEMS),
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.fixture(autouse=True)
def no_rates_of_earlier_merges(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def planned(models, method="task_arithmetic", dapt=("one",), **parameters):
    return plan_merge(make_recipe(str(models["base"]), [str(models[name]) for name in dapt], method, **parameters))


def from_yaml(models, **keys):
    recipe = {"base_model": str(models["base"]), "models": [{"model": str(models["one"])}], **keys}
    return plan_merge(load_recipe(recipe))


def test_tensors_that_are_merged_alike_are_one_line(models):
    (line,) = explain(planned(models, weight=0.3))
    assert line.where == "all tensors"
    assert line.settings["weight"] == (0.3,)
    assert len(line.names) == len(open_checkpoint(models["base"]).tensors)
    assert line.out_dtype == "float32"


def test_a_gradient_gives_each_layer_its_line_and_a_filter_its_own(models):
    t = [{"filter": "self_attn", "value": [0, 1]}, {"value": 0.5}]
    lines = explain(from_yaml(models, merge_method="slerp", parameters={"t": t}))
    found = {line.where: line.settings["t"] for line in lines}
    layers = CONFIG["num_hidden_layers"]
    assert found["attention of layer 0"] == 0
    assert found[f"attention of layer {layers - 1}"] == 1
    assert sum(len(line.names) for line in lines) == len(open_checkpoint(models["base"]).tensors)
    (rest,) = [line for line in lines if line.settings["t"] == 0.5]
    assert "mlp, norm of layers" in rest.where
    assert "embedding" in rest.where


def test_exact_end_points_are_named(models):
    weight = [{"filter": "mlp", "value": 0}, {"filter": "self_attn", "value": 1}, {"value": 0.5}]
    lines = explain(from_yaml(models, merge_method="task_arithmetic", parameters={"weight": weight}))
    copied = {line.settings["weight"]: line.copied_from for line in lines}
    assert copied == {(0.0,): str(models["base"]), (1.0,): str(models["one"]), (0.5,): None}


def test_a_scale_by_depth_is_shown_as_what_it_comes_to(models):
    lines = explain(planned(models, "lines", weight=1.0, alpha=0.25, beta=0.5))
    scales = [line.settings["lambda"] for line in lines]
    assert min(scales) == 0.25
    assert max(scales) == 0.75


@pytest.mark.parametrize(
    ("picked", "words"),
    [
        (lambda n: "mlp" in n, "mlp of layers 0–3"),
        (lambda n: "mlp" in n and ".2." not in n, "mlp of layers 0–1, 3"),
        (lambda n: "q_proj" in n, "self_attn.q_proj of layers 0–3"),
        (lambda n: ".1." in n, "attention, mlp, norm of layer 1"),
        (lambda n: n == "lm_head.weight", "head outside the layers"),
        (lambda n: "norm" in n, "norm of layers 0–3; norm outside the layers"),
        (lambda n: True, "all tensors"),
    ],
)
def test_tensors_are_described_by_group_and_layers(picked, words):
    assert describe([name for name in NAMES if picked(name)], NAMES) == words


@given(st.sets(st.sampled_from(NAMES), min_size=1), st.sets(st.sampled_from(NAMES), min_size=1))
def test_different_sets_of_tensors_have_different_descriptions(one, other):
    def words(names):
        return describe([name for name in NAMES if name in names], NAMES)

    assert (words(one) == words(other)) == (one == other)


def deep(layers):
    names = [
        f"model.layers.{n}.{end}" for n in range(layers) for end in ("mlp.up_proj.weight", "input_layernorm.weight")
    ]
    return open_checkpoint({name: torch.zeros(2, 2) for name in names} | {"model.embed_tokens.weight": torch.zeros(2)})


@pytest.mark.parametrize(("course", "expected"), [([0, 1], [0, 0.25, 0.5, 0.75, 1]), ([0, 1, 0], [0, 0.5, 1, 0.5, 0])])
def test_layers_that_a_gradient_tells_apart_are_one_run_in_their_order(course, expected):
    keys = {"merge_method": "slerp", "base_model": "b", "models": [{"model": "d"}]}
    t = [{"filter": "mlp", "value": course}, {"value": 0.3}]
    recipe = load_recipe({**keys, "parameters": {"t": t}})
    lines = explain(plan_merge(recipe, {name: deep(5) for name in "bd"}))
    runs = layer_runs([line for line in lines if line.copied_from is None])
    assert sum(len(line.names) for run in layer_runs(lines) for line in run) == 11
    inner = [value for value in expected if value not in (0, 1)]
    found = [[line.settings["t"] for line in layer_by_layer(run)] for run in runs]
    assert [0.3] in found
    assert (inner in found) == (len(set(inner)) > 2)


def test_recipes_that_use_each_other_are_planned_on_what_the_others_would_write(models, tmp_path):
    path = tmp_path / "recipes.yaml"
    path.write_text(
        f"""
name: soup
merge_method: linear
models: [{{model: {models["one"]}}}, {{model: {models["two"]}}}]
parameters: {{weight: 1}}
out_dtype: bfloat16
---
merge_method: task_arithmetic
base_model: {models["base"]}
models: [{{model: soup}}]
parameters: {{weight: 0.5}}
"""
    )
    chain = load_recipes(path)
    soup, result = plan_chain(chain)
    costs = [estimate_cost(plan, bytes_per_second=1e9) for plan in (soup, result)]
    report = merge_chain(chain, tmp_path / "out")
    assert (costs[1].bytes_read, costs[1].bytes_written) == (report.bytes_read, report.bytes_written)
    total = total_cost(costs)
    assert total.bytes_written == soup.nbytes + result.nbytes
    assert total.seconds == pytest.approx(sum(cost.seconds for cost in costs))
    assert explain(result)[0].models == ("soup",)


def test_the_lines_are_json(models):
    lines = explain(planned(models, dapt=["one", "two"], weight=[0.3, 0.5]))
    assert json.loads(json.dumps([line.to_dict() for line in lines]))[0]["parameters"]["weight"] == [0.3, 0.5]


def test_bytes_are_those_that_the_merge_reports(models, tmp_path):
    plan = planned(models, "ties", ["one", "two"], weight=0.3, out_dtype="bfloat16")
    cost = estimate_cost(plan, bytes_per_second=1e9)
    report = merge_to_disk(plan, tmp_path / "out")
    assert (cost.bytes_read, cost.bytes_written) == (report.bytes_read, report.bytes_written)
    assert cost.seconds == pytest.approx((report.bytes_read + report.bytes_written) / 1e9)


def test_a_threshold_over_the_whole_model_reads_the_inputs_more_often(models):
    once, often = (
        estimate_cost(planned(models, "ties", weight=0.3, density=0.5, trim_scope=scope), bytes_per_second=1e9)
        for scope in ("tensor", "model")
    )
    assert often.bytes_read == 4 * once.bytes_read


def memory(elements=1 << 20, layers=8, threads=2, **keys):
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": torch.empty(elements).expand(64, -1) for n in range(layers)}
    content = {"merge_method": "linear", "base_model": "base", "models": [{"model": "dapt"}]}
    content |= {"parameters": {"weight": 0.5}} if "merge_method" not in keys else {}
    plan = plan_merge(load_recipe(content | keys), {name: open_checkpoint(tensors) for name in ("base", "dapt")})
    return estimate_cost(plan, threads=threads, bytes_per_second=1e9).memory_bytes


def test_what_goes_through_in_runs_takes_the_same_memory_whatever_its_size():
    assert memory() == memory(elements=1 << 21) == memory(layers=80)
    assert memory(threads=1) < memory(threads=2)


@pytest.mark.parametrize("keys", [{"merge_method": "tsv"}, {"rounding": "stochastic", "out_dtype": "bfloat16"}])
def test_what_is_held_whole_follows_the_tensors_in_flight_and_not_the_size_of_the_model(keys):
    assert memory(layers=8, **keys) == memory(layers=80, **keys)
    assert memory(threads=2, **keys) == memory(threads=16, **keys), "at most twice the largest tensor is in flight"
    assert memory(elements=1 << 21, **keys) > 1.5 * memory(**keys) > 2 * memory()


def test_a_throughput_that_is_not_given_is_told_by_copying_or_tried_with_the_methods_own_arithmetic(models):
    for method in ("slerp", "ties"):
        plan = planned(models, method, weight=0.3)
        for trial, source in ((False, "copying"), (True, "trial")):
            cost = estimate_cost(plan, threads=1, trial=trial)
            assert cost.source == source
            assert cost.bytes_per_second > 0
            assert cost.seconds > 0


def test_the_time_of_a_method_that_grows_with_the_matrix_is_not_told_by_copying(models):
    plan = planned(models, "tsv")
    assert estimate_cost(plan, threads=1).seconds is None
    tried = estimate_cost(plan, threads=1, trial=True)
    assert tried.seconds > 0
    assert tried.to_dict()["seconds_are_a_lower_bound"]


def test_the_rate_of_the_last_such_merge_goes_before_a_trial(models, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("dapt_merge.merging.rates._TELLING_BYTES", 0)
    plan = planned(models, "slerp", weight=0.3)
    report = merge_to_disk(plan, tmp_path / "out", threads=1)
    cost = estimate_cost(plan, threads=1)
    assert cost.source == "last merge"
    assert cost.seconds >= report.seconds
    assert estimate_cost(plan, threads=2).source == "copying", "with other threads it may be another rate"
    assert estimate_cost(planned(models, "linear", weight=0.3), threads=1).source == "copying"
    assert estimate_cost(plan, threads=1, bytes_per_second=5).source == "given"
    kept = json.loads((tmp_path / "dapt-merge" / "merge_rates.json").read_text())
    (key,) = kept
    (tmp_path / "dapt-merge" / "merge_rates.json").write_text(json.dumps({key: [1.0, 9.0, 2.0]}))
    assert estimate_cost(plan, threads=1).bytes_per_second == 2.0, "the median, since a machine may be busy"
    for content in ("", "[]", '{"a": 1', json.dumps({key: "b"}), json.dumps({key: [None, -1]})):
        (tmp_path / "dapt-merge" / "merge_rates.json").write_text(content)
        assert estimate_cost(plan, threads=1).source == "copying"


def test_small_merges_leave_no_rate(models, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    merge_to_disk(planned(models, weight=0.3), tmp_path / "out")
    assert not (tmp_path / "dapt-merge").exists()


def test_whole_model_trimming_can_be_tried_too(models):
    plan = planned(models, "ties", weight=0.3, density=0.5, trim_scope="model")
    assert estimate_cost(plan, threads=1, trial=True).bytes_per_second > 0


# --- tokenizer and chat template --------------------------------------------------------------------------------------


def test_the_tokenizer_and_the_template_are_told_as_they_are_written(tmp_path):
    """What is told is held against the files of the merge."""
    base = save_tokenized(tmp_path / "base", byte_pairs(), 0)
    chat = save_tokenized(tmp_path / "chat", with_added(byte_pairs(), "<med>", pad="<pad>"), 1)
    (chat / "chat_template.jinja").write_text("{{ messages }}")
    for number, (source, setting, words) in enumerate(
        [
            ("base", None, ["that of BASE (base's tokens): 20 tokens in 20 rows", "chat template: none"]),
            ("union", "auto", ["that of BASE and 2 tokens more (all inputs' tokens): 22", "most inputs have: CHAT"]),
            (str(chat), None, ["that of CHAT (tokens of CHAT): 22 tokens in 22 rows", "chat template: that of CHAT"]),
            (str(chat), "chatml", ["that of CHAT", "chat template: chatml, a built-in one"]),
            (str(chat), "{{ 1 }}", ["that of CHAT", "chat template: the one that the recipe holds"]),
        ]
    ):
        recipe = {"merge_method": "linear", "base_model": str(base), "models": [{"model": str(chat)}]}
        keys = {"parameters": {"weight": 0.5}, "tokenizer_source": source, "chat_template": setting}
        plan = plan_merge(load_recipe({**recipe, **keys}))
        told = explain_tokenizer(plan)
        for line, said in zip(told.sentences(), words, strict=True):
            assert said in line.replace(str(base), "BASE").replace(str(chat), "CHAT")
        merge_to_disk(plan, tmp_path / f"{number}")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / f"{number}")
        assert len(tokenizer.get_vocab()) == told.tokens
        assert (tokenizer.chat_template is None) == (told.template is None)


def test_a_tokenizer_that_no_key_settles_is_the_configurations(models, tmp_path):
    plan = planned(models, weight=0.3)
    assert explain_tokenizer(plan).sentences() == [
        f"tokenizer: that of {models['base']}, as it is",
        "chat template: none",
    ]
    bare = save_model(tmp_path / "bare", random_weights(8), tokens=None)
    plan = plan_merge(load_recipe({"merge_method": "passthrough", "models": [{"model": str(bare)}]}))
    assert explain_tokenizer(plan).sentences() == ["tokenizer: none (there are no files of one)"]
