"""Compiled loops and torch functions give the same bits, the same counts and the same errors."""

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_merge.errors import InputError
from dapt_merge.methods import kernels, selection
from dapt_merge.methods.apply import combine, combine_in_runs
from dapt_merge.methods.contract import Method, TensorContext
from dapt_merge.methods.masks import keep_limits, keep_mask, mask_keys
from dapt_merge.methods.pieces import Operands
from dapt_merge.methods.registry import get_method, method_names
from dapt_merge.methods.selection import find_cutoffs
from dapt_merge.methods.stored_deltas import delta_magnitudes
from dapt_merge.tensors.dtypes import Dtype
from dapt_merge.tensors.stored import StoredTensor

_store_bfloat16, _store_float16 = kernels._store_bfloat16, kernels._store_float16
_subtract_and_drop = kernels._subtract_and_drop


@numba.njit
def store(values, base, rounded, in_bfloat16):
    """Parts of the compiled loops can only be called by what is compiled, too."""
    if in_bfloat16:
        return _store_bfloat16(values, base, rounded)
    return _store_float16(values, base, rounded)


@numba.njit
def subtract_and_drop(model, base, start, highest, keys, factor, delta):
    _subtract_and_drop(model, base, start, highest, keys, factor, delta)


COMPILED = [
    name
    for name in method_names()
    if get_method(name).kernel is not None and get_method(name).parameter("alpha") is None
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = st.one_of(
    st.tuples(st.integers(1, 5000)),
    st.tuples(st.integers(1, 12), st.integers(1, 600)),
    st.sampled_from([(), (1, 1), (700, 1), (3, 2048), (2, 1025)]),
)
SPECIAL = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 6e-8, -6e-8, 1e-5, 1.0, -1.0, 1.0078125, 2.5e-3])


def numbers(shape: tuple[int, ...], seed: int, scale: float) -> torch.Tensor:
    """Ordinary numbers, with zeros of either sign, subnormals and repeated values among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * scale
    special = SPECIAL[torch.randint(len(SPECIAL), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.2, special, values)


@st.composite
def merges(draw: st.DrawFn, name: str) -> tuple[Method, torch.Tensor | None, list[torch.Tensor], dict[str, object]]:
    method, shape = get_method(name), draw(SHAPES)
    count = draw(st.integers(1, method.max_models or 3))
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=count + 1, max_size=count + 1))
    seed = draw(st.integers(0, 2**31))
    base = numbers(shape, seed, 0.5)
    step = draw(st.sampled_from([1e-3, 0.1, 2.0]))
    models = [(base + numbers(shape, seed + 1 + place, step)).to(dtypes[place]) for place in range(count)]
    per_model = {
        "weight": st.sampled_from([0.0, 0.3, 1.0, -0.7, 1.5]),
        "density": st.sampled_from([0.0, 0.4, 0.5, 0.8, 1.0]),
        "epsilon": st.sampled_from([0.0, 0.1, 0.15]),
        "gamma": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    }
    values: dict[str, object] = {}
    for parameter in method.parameters:
        if parameter.name in per_model:
            values[parameter.name] = [draw(per_model[parameter.name]) for _ in range(count)]
        elif parameter.kind == "choice" and parameter.name != "trim_scope":
            values[parameter.name] = draw(st.sampled_from(parameter.choices))
        elif parameter.kind == "flag":
            values[parameter.name] = draw(st.booleans())
        elif parameter.name == "t":
            values[parameter.name] = draw(st.sampled_from([0.2, 0.5, 0.9]))
        elif parameter.name == "lambda":
            values[parameter.name] = draw(st.sampled_from([1.0, 0.5, -1.3]))
    without_base = method.base == "optional" and draw(st.booleans())
    return method, None if without_base else base.to(dtypes[-1]), models, values


def outcome(merge, out_dtype: torch.dtype, compiled: bool, run_elements: int | None = None):
    """Everything that can be seen of a merge: bits, counts and notes, or the error."""
    method, base, models, values = merge
    context = TensorContext("layer.weight", seed=7)
    merged = torch.empty(models[0].shape, dtype=out_dtype)
    try:
        result = combine_in_runs(
            method,
            base,
            models,
            values,
            context,
            lambda begin, end: StoredTensor.of(merged.view(-1)[begin:end]),
            out_dtype=Dtype.of(out_dtype),
            counted=True,
            run_elements=run_elements,
            compiled=compiled,
        )
    except InputError as error:
        return str(error)
    if isinstance(result, StoredTensor):
        return "an input itself", context.notes
    return bits(merged), result, context.notes


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16).flatten().tolist()


def test_the_methods_that_are_merged_most_have_compiled_loops():
    assert {"linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della"} <= set(COMPILED)
    assert {"della_linear", "breadcrumbs", "breadcrumbs_ties"} <= set(COMPILED)


def test_a_base_of_minus_zero_on_which_nobody_agrees_has_the_sign_that_the_torch_function_gives():
    base, values = torch.tensor([-0.0, 1.0]), {"weight": [-0.7, -0.7], "density": [1.0, 1.0], "lambda": 1.0}
    models = [torch.tensor([-0.0, 2.0]), torch.tensor([-0.0, 3.0])]
    for elect in ("weighted", "unweighted", "count"):
        settled = {**values, "normalize": True, "elect": elect, "rescale": "none", "trim_scope": "tensor"}
        merge = (get_method("ties"), base, models, settled)
        assert outcome(merge, torch.float32, compiled=True) == outcome(merge, torch.float32, compiled=False)


@pytest.mark.parametrize("name", COMPILED)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_they_give_the_bits_the_counts_and_the_notes_of_the_torch_function(name, data):
    merge = data.draw(merges(name))
    out_dtype = data.draw(st.sampled_from(DTYPES))
    expected = outcome(merge, out_dtype, compiled=False)
    assert outcome(merge, out_dtype, compiled=True) == expected
    run_elements = data.draw(st.sampled_from([600, 1024, 2048, 3000]))
    assert outcome(merge, out_dtype, compiled=True, run_elements=run_elements) == expected


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_they_refuse_what_is_not_finite_in_the_same_words(name, bad, dtype):
    method = get_method(name)
    base, model = torch.ones(3, 1500).to(dtype), torch.full((3, 1500), 2.0).to(dtype)
    model.view(-1)[4321] = bad
    values = {"t": 0.5} if name == "slerp" else {"weight": 0.5}
    if method.parameter("density"):
        values["density"] = 0.6
    merge = (method, base, [model], values)
    assert "holds" in outcome(merge, torch.bfloat16, compiled=True)
    assert outcome(merge, torch.bfloat16, compiled=True) == outcome(merge, torch.bfloat16, compiled=False)


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_they_refuse_what_overflows_in_the_same_words(out_dtype):
    base = torch.full((2500,), -3e38 if out_dtype != torch.float16 else 6e4)
    merge = (get_method("task_arithmetic"), base, [-base], {"weight": -1.0})
    assert "overflows" in outcome(merge, out_dtype, compiled=True)
    assert outcome(merge, out_dtype, compiled=True) == outcome(merge, out_dtype, compiled=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_a_16_bit_dtype_and_all_between_two_of_them_are_rounded_as_torch_rounds(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].float()
    gap = torch.nextafter(every, torch.tensor(torch.inf)) - every
    halves = (every[1:] + every[:-1]) / 2
    near = torch.cat([every, every + gap, halves, halves + halves.abs() * 2**-20, halves - halves.abs() * 2**-20])
    near = near[near.abs() < torch.finfo(dtype).max]
    rounded = torch.empty(near.shape, dtype=torch.int16).numpy().view(np.uint16)
    store(near.numpy(), near.numpy(), rounded, dtype == torch.bfloat16)
    assert (rounded == near.to(dtype).view(torch.int16).numpy().view(np.uint16)).all()


def test_masks_are_the_same_on_both_sides_of_two_to_the_32_elements():
    start, count = 2**32 - 700, 1500
    kept = np.empty(count, np.float32)
    ones, zeros, keys = np.ones(count, np.float32), np.zeros(count, np.float32), mask_keys(3, "w", 1, 2)
    subtract_and_drop(ones, zeros, start, keep_limits(0.3) - 1, keys, np.float32(1), kept)
    assert torch.equal(torch.from_numpy(kept).bool(), keep_mask(3, "w", 1, start, count, 0.3))


@pytest.mark.parametrize("probability", [1e-12, 2**-32, 0.5, 1 - 2**-33])
def test_probabilities_at_either_end_keep_what_the_torch_mask_keeps(probability):
    count = 4000
    kept = np.empty(count, np.float32)
    ones, zeros, keys = np.ones(count, np.float32), np.zeros(count, np.float32), mask_keys(0, "w", 0, 1)
    subtract_and_drop(ones, zeros, 0, keep_limits(probability) - 1, keys, np.float32(1), kept)
    assert torch.equal(torch.from_numpy(kept).bool(), keep_mask(0, "w", 0, 0, count, probability))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES), st.sampled_from(DTYPES)), min_size=1, max_size=3),
    st.integers(0, 2**31),
    st.sampled_from([1e-3, 1.0]),
    st.data(),
)
def test_thresholds_are_found_where_the_numbers_lie_as_a_sort_finds_them(tensors, seed, step, data):
    operands = []
    for place, (shape, base_dtype, model_dtype) in enumerate(tensors):
        base = numbers(shape, seed + place, 0.5).to(base_dtype)
        model = (base.float() + numbers(shape, seed + 10 + place, step)).to(model_dtype)
        operands.append(Operands(StoredTensor.of(base), (StoredTensor.of(model),), TensorContext("w")))
    deltas = torch.cat([(each.models[0].tensor.float() - each.base.tensor.float()).flatten() for each in operands])
    ranks = data.draw(st.lists(st.integers(1, len(deltas)), min_size=1, max_size=3))
    order = deltas.abs().sort(descending=True, stable=True).indices
    with pytest.MonkeyPatch.context() as patch:
        # So few are looked at together, and so few are sampled, that the search has to narrow several times.
        patch.setattr(selection, "_FEW", data.draw(st.sampled_from([1, 40])))
        patch.setattr(selection, "_FEW_OF", 10**9)
        patch.setattr(selection, "_SAMPLED", data.draw(st.sampled_from([1, 100])))
        found = find_cutoffs(delta_magnitudes(operands, 0), ranks)
        streamed = find_cutoffs(lambda: (delta.clone() for delta in deltas.split(1000)), ranks)
    assert found == streamed
    for rank, cutoff in zip(ranks, found, strict=True):
        expected = torch.zeros(len(deltas), dtype=torch.bool)
        expected[order[:rank]] = True
        assert torch.equal(selection.kept_mask(deltas, cutoff), expected)


@pytest.mark.parametrize(
    "spread",
    [
        "one outlier",
        "all equal",
        "two values",
        "descending",
        "ascending",
        "sparse",
        "many octaves",
        "subnormal",
        "near",
    ],
)
def test_rows_that_are_hard_to_order_are_ranked_exactly(spread):
    draws = torch.Generator().manual_seed(1)
    row = {
        "one outlier": torch.cat([torch.tensor([1e6]), torch.linspace(1e-5, 2e-5, 2999)]),
        "all equal": torch.full((3000,), 0.5),
        "two values": torch.tensor([1.0, 1.0 + 2**-20]).repeat(1500),
        "descending": torch.linspace(1.0 + 1e-3, 1.0, 3000),
        "ascending": torch.linspace(1.0, 1.0 + 1e-3, 3000),
        "sparse": torch.randn(3000, generator=draws) * (torch.arange(3000) % 300 == 7),
        "many octaves": torch.exp2(torch.rand(3000, generator=draws) * 200 - 100),
        "subnormal": torch.randint(1, 2000, (3000,), generator=draws) * 1e-45,
        "near": torch.randn(3000, generator=draws),
    }[spread]
    merge = (
        get_method("della_linear"),
        torch.zeros(2, 3000),
        [torch.stack([row, -row])],
        {"weight": 1.0, "density": 0.5, "epsilon": 0.3},
    )
    assert outcome(merge, torch.float32, compiled=True) == outcome(merge, torch.float32, compiled=False)


def test_tensors_that_the_loops_cannot_read_where_they_lie_are_merged_all_the_same():
    base, model = torch.randn(40, 50), torch.randn(40, 50)
    expected = combine(get_method("linear"), base, [model], {"weight": 0.3}, TensorContext("w"))
    transposed = combine(get_method("linear"), base.T, [model.T], {"weight": 0.3}, TensorContext("w"))
    doubles = base.double(), [model.double()]
    wide = combine(get_method("linear"), *doubles, {"weight": 0.3}, TensorContext("w"), arithmetic=torch.float32)
    odd = torch.zeros(40 * 50 * 4 + 1, dtype=torch.uint8)
    odd[1:] = model.flatten().view(torch.uint8)
    shifted = torch.frombuffer(odd.numpy(), dtype=torch.float32, offset=1).view(40, 50)
    unaligned = combine(get_method("linear"), base, [shifted], {"weight": 0.3}, TensorContext("w"))
    assert torch.equal(transposed, expected.T)
    assert torch.equal(wide, expected)
    assert torch.equal(unaligned, expected)


def test_where_no_folder_can_be_written_to_the_loops_are_compiled_for_this_process(monkeypatch):
    compile_in_memory = kernels.numba.njit

    def refuse_to_keep(function, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return compile_in_memory(function, **options)

    monkeypatch.setattr(kernels.numba, "njit", refuse_to_keep)
    assert kernels._compiled(lambda value: value + 1)(2) == 3
