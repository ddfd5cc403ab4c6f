"""What holds for every method: exact end points, refused input, no dependence on pieces or threads."""

import math

import pytest
import torch
from float64_reference import SHAPES, draw_tensors, merge, same_bits
from hypothesis import given
from hypothesis import strategies as st

from dapt_merge.errors import DaptMergeError, InputError
from dapt_merge.methods.apply import combine
from dapt_merge.methods.contract import Method, TensorContext
from dapt_merge.methods.registry import get_method, method_names

SPARSE_METHODS = [
    "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties",
]  # fmt: skip
DELTA_METHODS = ["linear", "task_arithmetic", *SPARSE_METHODS]
METHODS = [*DELTA_METHODS, "slerp"]
# Those without a weight: values that neither copy nor ignore an input.
WEIGHTLESS = {
    "model_stock": {"filter_wise": True},
    "sce": {"select_topk": 0.5},
    "nearswap": {"t": 0.1},
    "ram": {"epsilon": 0.05},
    "ramplus_tl": {"epsilon": 0.05},
    "arcee_fusion": {},
    "passthrough": {"scale": 0.5},
}
EVERY_METHOD = [*METHODS, *WEIGHTLESS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def values_for(name: str, weight: float = 0.6) -> dict[str, object]:
    if name in WEIGHTLESS:
        return dict(WEIGHTLESS[name])
    values: dict[str, object] = {"t" if name == "slerp" else "weight": weight}
    if get_method(name).parameter("density"):
        values["density"] = 0.4
    return values


def models_for(name: str, models: list[torch.Tensor]) -> list[torch.Tensor]:
    """As many of the models as the method takes."""
    most = get_method(name).max_models
    return models if most is None else models[:most]


def whole(name: str) -> dict[str, object]:
    """The values with which a method keeps every element."""
    return {"gamma": 0} if get_method(name).parameter("gamma") else {}


def awkward_pair(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed zeros, the smallest subnormals, the largest values, and differences that float32 cannot hold."""
    info = torch.finfo(dtype)
    base = torch.tensor([0.0, -0.0, -0.0, info.smallest_normal / 2, info.max / 4, 1.0, -1e-3], dtype=dtype)
    dapt = torch.tensor([-0.0, 0.0, -0.0, -info.smallest_normal, -info.max / 4, 1e-4, 1.0], dtype=dtype)
    return base, dapt


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_weight_0_is_the_base_and_weight_1_the_dapt_checkpoint_bit_for_bit(name, dtype):
    base, dapt = awkward_pair(dtype)
    knob = "t" if name == "slerp" else "weight"
    assert same_bits(merge(name, base, [dapt], **{knob: 0}), base)
    assert same_bits(merge(name, base, [dapt], **{knob: 1}, **whole(name)), dapt)


@given(st.integers(0, 1000), st.sampled_from(SHAPES), st.sampled_from(METHODS), st.sampled_from(DTYPES[:3]))
def test_end_points_hold_for_every_shape_and_dtype(seed, shape, name, dtype):
    base, dapt = draw_tensors(seed, shape, 2, dtype)
    knob = "t" if name == "slerp" else "weight"
    for end, source in ((0.0, base), (1.0, dapt)):
        assert same_bits(merge(name, base, [dapt], **{knob: end}, **whole(name)), source)


@pytest.mark.parametrize("name", SPARSE_METHODS)
def test_density_0_is_the_base_bit_for_bit(name):
    base, dapt = awkward_pair(torch.bfloat16)
    assert same_bits(merge(name, base, [dapt], weight=0.5, density=0), base)


@pytest.mark.parametrize("name", ["task_arithmetic", *SPARSE_METHODS])
def test_lambda_0_is_the_base_and_lambda_can_complete_the_weight(name):
    base, dapt = awkward_pair(torch.float32)
    assert same_bits(merge(name, base, [dapt], weight=0.5, lambda_=0), base)
    assert same_bits(merge(name, base, [dapt], weight=0.5, lambda_=2, **whole(name)), dapt)


@pytest.mark.parametrize("name", DELTA_METHODS)
def test_a_second_model_of_weight_0_changes_nothing_at_the_end_points(name):
    base, first, second = draw_tensors(0, (5,), 3)
    assert same_bits(merge(name, base, [first, second], weight=[1, 0], **whole(name)), first)
    assert same_bits(merge(name, base, [first, second], weight=[0, 0]), base)


def test_a_soup_of_one_model_is_that_model_bit_for_bit():
    _, model = awkward_pair(torch.bfloat16)
    assert same_bits(merge("linear", None, [model], weight=0.3), model)
    assert same_bits(merge("linear", None, [model, model * 2], weight=[0.3, 0]), model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EVERY_METHOD)
@pytest.mark.parametrize("shape", [*SHAPES, (0,), (3, 0), (0, 3)], ids=str)
def test_every_shape_gives_a_float32_tensor_of_that_shape_and_leaves_inputs_alone(name, shape, dtype):
    tensors = draw_tensors(1, shape, 3, dtype)
    before = [tensor.clone() for tensor in tensors]
    merged = merge(name, tensors[0], models_for(name, tensors[1:]), **values_for(name))
    assert merged.shape == shape
    assert merged.dtype == torch.float32
    assert all(same_bits(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_a_transposed_view_is_merged_like_its_copy(name):
    base, *models = (tensor.t() for tensor in draw_tensors(1, (6, 9), 3))
    models = models_for(name, models)
    expected = merge(name, base.contiguous(), [model.contiguous() for model in models], **values_for(name))
    assert torch.equal(merge(name, base, models, **values_for(name)), expected)


@pytest.mark.parametrize("name", EVERY_METHOD)
@pytest.mark.parametrize("shape", [(100_003,), (3001, 33)], ids=str)
def test_results_depend_neither_on_pieces_nor_on_threads(name, shape):
    """Odd sizes, so that vector remainders, rows and thread borders fall differently in every run."""
    base, *models = (tensor.bfloat16() for tensor in draw_tensors(2, shape, 3))
    models = models_for(name, models)
    values = values_for(name)
    if get_method(name).parameter("rescale"):
        values["rescale"] = "l1"
    if name == "slerp":
        base = base - base.mean()
        models = [models[0] + 0.5 * base.reshape(-1).flip(0).view(shape)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads, piece in [(1, None), (1, 1024), (2, None), (3, 65536), (4, 1 << 20)]:
            torch.set_num_threads(threads)
            context = TensorContext("w", seed=3)
            results.append(combine(get_method(name), base, models, values, context, piece_elements=piece))
            assert name == "model_stock" or "fallback" not in context.notes
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(result, results[0]) for result in results)


def test_the_result_can_be_rounded_on_the_way_out():
    base, dapt = draw_tensors(1, (30,), 2)
    context = TensorContext("w")
    rounded = combine(get_method("linear"), base, [dapt], {"weight": 0.3}, context, out_dtype=torch.bfloat16)
    assert same_bits(rounded, merge("linear", base, [dapt], weight=0.3).bfloat16())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in EVERY_METHOD if name not in ("model_stock", "sce", "passthrough")])
def test_non_finite_input_names_the_tensor_and_the_checkpoint(name, dtype, bad):
    base, dapt = draw_tensors(1, (300,), 2, dtype)
    dapt[123] = bad
    context = TensorContext("layers.7.weight", base_label="base/", model_labels=("dapt/",))
    with pytest.raises(InputError, match="dapt/") as caught:
        combine(get_method(name), base, [dapt], values_for(name), context)
    assert "layers.7.weight" in str(caught.value)
    with pytest.raises(InputError, match="base/"):
        combine(get_method(name), dapt, [base], values_for(name), context)


def test_non_finite_input_of_methods_with_two_models_or_without_a_base():
    base, one, two = draw_tensors(1, (30,), 3)
    two[3] = math.nan
    for name in ("model_stock", "sce"):
        with pytest.raises(InputError, match="model 2 holds NaN"):
            merge(name, base, [one, two], **values_for(name))
    with pytest.raises(InputError, match="model 1 holds NaN"):
        merge("passthrough", base, [two], scale=0.5)


def test_a_copied_end_point_is_checked_too():
    base, dapt = torch.zeros(2), torch.tensor([1.0, math.nan])
    with pytest.raises(InputError, match="model 1 holds NaN"):
        merge("linear", base, [dapt], weight=1)


def test_a_result_that_overflows_is_refused():
    with pytest.raises(InputError, match="overflows"):
        merge("task_arithmetic", torch.zeros(2), [torch.tensor([1e30, 0.0])], weight=1e30)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8], ids=str)
def test_buffers_that_agree_are_kept_and_others_refused(dtype):
    base, same, other = (torch.tensor(values).to(dtype) for values in ([1, 0, 1], [1, 0, 1], [1, 1, 1]))
    assert same_bits(merge("ties", base, [same], weight=0.3), base)
    with pytest.raises(InputError, match="model 1 disagrees with the base"):
        merge("ties", base, [other], weight=0.3)
    with pytest.raises(InputError, match="model 2 disagrees with model 1"):
        merge("linear", None, [base, other], weight=0.3)


def test_different_shapes_and_dtypes_that_cannot_be_mixed_are_refused():
    with pytest.raises(InputError, match=r"\(3,\).*\(2,\)"):
        merge("linear", torch.zeros(2), [torch.zeros(3)], weight=0.3)
    with pytest.raises(InputError, match="int64"):
        merge("linear", torch.zeros(2), [torch.zeros(2, dtype=torch.int64)], weight=0.3)
    with pytest.raises(InputError, match="float8"):
        merge("linear", torch.zeros(2), [torch.zeros(2).to(torch.float8_e4m3fn)], weight=0.3)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("ties", {"weight": 0.5, "density": 1.5}, r"'density' is 1.5, expected a number in \[0, 1\]"),
        ("ties", {"weight": 0.5, "density": -0.1}, r"expected a number in \[0, 1\]"),
        ("ties", {"weight": math.nan}, "'weight' is nan, expected a finite number"),
        ("ties", {"weight": True}, "'weight' is True"),
        ("ties", {"weight": "0.5"}, "'weight' is '0.5'"),
        ("ties", {"weight": 0.5, "elect": "largest"}, "one of weighted, unweighted, count"),
        ("ties", {"weight": 0.5, "normalize": 1}, "one of auto, true, false"),
        ("ties", {"weight": 0.5, "wieght": 1}, "no parameter 'wieght'. Did you mean 'weight'"),
        ("ties", {}, "needs a value for 'weight'"),
        ("ties", {"weight": [0.5, 0.5]}, "2 values for 1 models"),
        ("ties", {"weight": 0.5, "lambda": [1, 2]}, r"'lambda' is \[1, 2\]"),
        ("slerp", {"t": 1.01}, r"'t' is 1.01, expected a number in \[0, 1\]"),
        ("linear", {"weight": 1, "normalize": "yes"}, "expected true or false"),
        ("della", {"weight": 0.5, "density": 0.1}, "density 0.1 with epsilon 0.15 gives keep probabilities from -0.05"),
        ("della_linear", {"weight": 0.5, "density": 0.9, "epsilon": 0.2}, "to 1.1; they must be above 0 and at most 1"),
        ("della", {"weight": 0.5, "density": 0.4, "epsilon": 0.6}, r"a number in \[0, 0.5\]"),
        ("breadcrumbs", {"weight": 0.5, "gamma": 1.5}, r"'gamma' is 1.5, expected a number in \[0, 1\]"),
        ("breadcrumbs", {"weight": 0.5, "rescale": "expectation"}, "one of none, l1, true, false"),
        ("sce", {"select_topk": 2}, r"'select_topk' is 2, expected a number in \[0, 1\]"),
        ("nearswap", {}, "needs a value for 't'"),
        ("nearswap", {"t": -0.1}, "a finite number of at least 0"),
        ("ram", {"epsilon": -1e-5}, "a finite number of at least 0"),
        ("arcee_fusion", {"weight": 0.5}, "no parameter 'weight'"),
    ],
)
def test_a_wrong_value_says_what_it_is_where_and_what_is_allowed(name, values, expected):
    base, dapt = draw_tensors(0, (3,), 2)
    with pytest.raises(InputError, match=expected) as caught:
        merge(name, base, [dapt], **values)
    assert "layer.weight" in str(caught.value)


def test_the_number_of_models_and_a_missing_base_are_checked():
    base, first, second = draw_tensors(0, (3,), 3)
    with pytest.raises(InputError, match="2 models besides the base, expected exactly 1"):
        merge("slerp", base, [first, second], t=0.5)
    with pytest.raises(InputError, match="'ties' needs a base"):
        merge("ties", None, [first], weight=0.5)


def test_a_method_that_is_not_elementwise_gets_whole_tensors_and_must_return_their_shape():
    def mean(base, models, *, context):
        return torch.stack([base, *models]).mean(dim=0)

    base, dapt = draw_tensors(0, (3, 4), 2, torch.bfloat16)
    plugin = Method("mean", mean, (), "required", 1, None, "an example")
    merged = combine(plugin, base, [dapt], {}, TensorContext("w"))
    assert torch.equal(merged, (base.float() + dapt.float()) / 2)
    wrong = Method("wrong", lambda base, models, context: base[0], (), "required", 1, None, "an example")
    with pytest.raises(DaptMergeError, match="returned shape"):
        combine(wrong, base, [dapt], {}, TensorContext("w"))


@pytest.mark.parametrize(
    ("name", "values", "count", "knob"),
    [
        ("ties", {"weight": 0.3, "density": 0.5, "normalize": True}, 1, "weight"),
        ("dare_ties", {"weight": 0.3, "density": 0.5, "normalize": True}, 1, "weight"),
        ("ties", {"weight": [0.3, 0], "density": 0.5}, 2, "weight"),
        ("task_arithmetic", {"weight": 0.3, "normalize": True}, 1, "weight"),
        ("dare_linear", {"weight": 0.3, "density": 0.5, "normalize": True}, 1, "weight"),
        ("ties", {"weight": 0.3, "density": 0.5, "elect": "count"}, 1, "elect"),
        ("ties", {"weight": 0.3, "trim_scope": "model"}, 1, "trim_scope"),
        ("dare_linear", {"weight": 0.3}, 1, "density"),
        ("task_arithmetic", {"weight": 0.3, "lambda": 0}, 1, "lambda"),
        ("ties", {"weight": 0, "density": 0.5}, 2, "weight"),
        ("ties", {"weight": 1, "density": 0}, 2, "density"),
        ("della", {"weight": 0.3, "density": 0.5, "normalize": True}, 1, "weight"),
        ("della_linear", {"weight": 0.3}, 1, "density"),
        ("breadcrumbs", {"weight": 0.3, "density": 0.95, "gamma": 0.1}, 1, "density"),
        ("breadcrumbs", {"weight": 0.3, "gamma": 0, "rescale": "l1"}, 1, "rescale"),
        ("breadcrumbs_ties", {"weight": 0.3, "density": 0.5, "elect": "count"}, 1, "elect"),
        ("sce", {"select_topk": 0.5}, 1, "select_topk"),
        ("sce", {"select_topk": 0}, 2, "select_topk"),
        ("nearswap", {"t": 0}, 1, "t"),
        ("ramplus_tl", {}, 1, "r"),
        ("ramplus_tl", {"r": 0}, 2, "alpha"),
        ("ramplus_tl", {"alpha": 0}, 2, "r"),
    ],
)
def test_a_knob_without_effect_is_explained(name, values, count, knob):
    explain = get_method(name).dead_knobs
    assert explain is not None
    assert [sentence.split(":")[0] for sentence in explain(values, count)] == [knob]


@pytest.mark.parametrize("name", [name for name in METHODS if get_method(name).dead_knobs])
@pytest.mark.parametrize("count", [1, 2])
def test_ordinary_values_have_no_dead_knobs_and_each_weight_gives_another_model(name, count):
    explain = get_method(name).dead_knobs
    assert explain is not None
    assert explain(values_for(name), count) == []
    base, *models = draw_tensors(0, (200,), count + 1)
    low, high = ([weight] + [0.5] * (count - 1) for weight in (0.3, 0.9))
    values = values_for(name)
    assert not torch.equal(merge(name, base, models, **{**values, "weight": low}),
                           merge(name, base, models, **{**values, "weight": high}))  # fmt: skip


@pytest.mark.parametrize("name", ["task_arithmetic", *SPARSE_METHODS])
def test_the_cancelling_form_is_honoured(name):
    base, dapt = draw_tensors(0, (50,), 2)
    values = {**values_for(name), "normalize": True}
    results = [merge(name, base, [dapt], **{**values, "weight": weight}) for weight in (0.3, 1.0)]
    assert torch.equal(*results)


def test_every_method_states_its_reference_parameters_and_docstring():
    assert set(EVERY_METHOD) <= set(method_names())
    for name in EVERY_METHOD:
        declared = get_method(name)
        assert declared.reference
        assert declared.function.__doc__
        assert all(parameter.meaning and parameter.expected for parameter in declared.parameters)


def test_an_unknown_method_suggests_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'ties'"):
        get_method("tiess")
