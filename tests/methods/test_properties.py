"""What every registered method promises, whatever its formula: those of tomorrow too, since the registry is asked.

Values are drawn as models hold them and worse: signed zeros, subnormals, equal magnitudes, three dtypes in one merge.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from float64_reference import assert_close, draw_tensors, merge, same_bits, wide
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dapt_merge.methods.apply import combine
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.registry import get_method, method_names

SEEDS = st.integers(0, 10_000)
# Values for what has no default, or whose default leaves nothing to be seen. A distance scales with the inputs.
VALUES = {"weight": 0.4, "t": 0.3, "density": 0.5, "alpha": 0.6, "beta": 0.2, "scale": 0.5, "fisher": "f", "gram": "g"}
DISTANCES = {"nearswap": {"t": 0.1}, "ram": {"epsilon": 0.05}, "ramplus_tl": {"epsilon": 0.05}}
# `lines_…` is the method on which it stands with another lambda; one of them stands for all.
EVERY_METHOD = [name for name in method_names() if not name.startswith("lines_")]
RANDOM = [name for name in EVERY_METHOD if get_method(name).random]
ONE_MODEL = [name for name in EVERY_METHOD if get_method(name).max_models == 1]
SYMMETRIC = [name for name in EVERY_METHOD if name not in (*RANDOM, *ONE_MODEL)]
SINGULAR = ("tsv", "iso_c", "iso_cts")


def values_for(name, **given):
    known = [parameter.name for parameter in get_method(name).parameters]
    drawn = {**{key: value for key, value in VALUES.items() if key in known}, **DISTANCES.get(name, {})}
    if name in ("regmean", "ramplus_tl", "fisher"):
        drawn.pop("alpha", None)
    return {**drawn, **given}


def run(name, base, models, **given):
    """Merge as many of the models as the method takes, in the middle of a model of five layers."""
    method = get_method(name)
    models = models[: method.max_models or len(models)]
    statistics = ()
    if name == "fisher":
        statistics = tuple(torch.full(model.shape, 1.0 + place) for place, model in enumerate(models))
    if name == "regmean" and models[0].dim() == 2 and models[0].shape[1] < 100:
        statistics = tuple(torch.eye(model.shape[1]) for model in models)
    context = TensorContext("layer.weight", seed=3, layer=2, num_layers=5, statistics=statistics)
    return combine(method, None if method.base == "unused" else base, models, values_for(name, **given), context)


FLOATS = hnp.arrays(
    np.float32,
    (3, 12),
    elements=st.one_of(
        st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1.0, -1.0, 0.5]),
        st.floats(-2, 2, width=32),
    ),
)


@pytest.mark.parametrize("name", EVERY_METHOD)
@settings(max_examples=12)
@given(values=FLOATS, shape=st.sampled_from([(12,), (3, 4), (12, 1), (1, 12), (2, 2, 3)]))
def test_signed_zeros_subnormals_and_equal_magnitudes_give_a_finite_tensor_twice_the_same(name, values, shape):
    tensors = [torch.from_numpy(row.copy()).reshape(shape) for row in values]
    before = [tensor.clone() for tensor in tensors]
    merged = run(name, tensors[0], tensors[1:])
    assert merged.shape == shape
    assert bool(torch.isfinite(merged).all())
    assert all(same_bits(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))
    assert same_bits(run(name, tensors[0], tensors[1:]), merged)


@pytest.mark.parametrize("name", EVERY_METHOD)
@pytest.mark.parametrize("shape", [(), (1,), (4, 6), (1, 40_000), (40_000, 1)], ids=str)
def test_dtypes_may_be_mixed_and_each_counts_as_the_float32_that_it_is(name, shape):
    base, one, two = draw_tensors(4, shape, 3)
    mixed = [base, one.bfloat16(), two.half()]
    merged = run(name, mixed[0], mixed[1:])
    assert same_bits(merged.float(), run(name, base, [tensor.float() for tensor in mixed[1:]]))


@pytest.mark.parametrize("name", EVERY_METHOD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_that_are_all_the_base_give_the_base(name, dtype):
    (base,) = draw_tensors(5, (6, 7), 1, dtype)
    merged = run(name, base, [base.clone(), base.clone()], **({"scale": 1} if name == "passthrough" else {}))
    assert_close(merged, base, [base])
    if get_method(name).base == "required":  # there a task vector of zeros is all that is added
        assert same_bits(merged.to(dtype), base)


@pytest.mark.parametrize(
    "name", [*ONE_MODEL, "nuslerp", "multislerp", "karcher", "model_stock", "sce", "ram", "fisher"]
)
def test_models_that_are_all_alike_give_that_model_or_lie_between(name):
    base, model = draw_tensors(6, (6, 7), 2)
    merged = run(name, base, [model, model.clone()], **({"scale": 1} if name == "passthrough" else {}))
    if name in ONE_MODEL:
        low, high = torch.minimum(base, model), torch.maximum(base, model)
        slack = 0.2 if name == "slerp" else 1e-6  # an arc bulges out of the box of its ends
        assert bool(((merged >= low - slack) & (merged <= high + slack)).all())
    elif name == "ram":
        moved = (model - base).abs() > DISTANCES["ram"]["epsilon"]
        assert_close(merged, torch.where(moved, model, base), [base, model])
    else:
        assert_close(merged, model, [base, model])


@given(SEEDS, st.floats(0, 1), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_share_of_the_way_never_leaves_the_way(seed, weight, dtype):
    base, model = draw_tensors(seed, (50,), 2, dtype)
    merged = merge("linear", base, [model], weight=weight).float()
    low, high = torch.minimum(base, model).float(), torch.maximum(base, model).float()
    assert bool(((merged >= low) & (merged <= high)).all())


@pytest.mark.parametrize("name", SYMMETRIC)
@settings(max_examples=15)
@given(seed=SEEDS, order=st.permutations([0, 1, 2]))
def test_the_order_of_the_models_does_not_matter(name, seed, order):
    base, *models = draw_tensors(seed, (6, 5), 4)
    most = get_method(name).max_models or 3
    order = [place for place in order if place < most]
    forth = run(name, base, models[:most])
    back = run(name, base, [models[place] for place in order]) if name != "fisher" else fisher_in(order, models)
    relative = 2e-4 if name in SINGULAR else 1e-5 if name in ("nuslerp", "multislerp", "karcher", "regmean") else 1e-6
    assert_close(back, forth, [base, *models, torch.full((6, 5), float(forth.abs().max()))], relative=relative)


def fisher_in(order, models):
    statistics = tuple(torch.full((6, 5), 1.0 + place) for place in order)
    context = TensorContext("layer.weight", statistics=statistics)
    return combine(get_method("fisher"), None, [models[place] for place in order], values_for("fisher"), context)


@pytest.mark.parametrize("name", [name for name in EVERY_METHOD if name not in (*SINGULAR, "arcee_fusion", "regmean")])
@settings(max_examples=15)
@given(seed=SEEDS, exponent=st.integers(-12, 12))
def test_scaling_every_input_by_a_power_of_two_scales_the_result_bit_for_bit(name, seed, exponent):
    """arcee_fusion compares softmaxes, which have a scale of their own; eps and tol are lengths of their own too."""
    scale = 2.0**exponent
    base, *models = draw_tensors(seed, (6, 5), 3)
    given_distances = {key: value * scale for key, value in DISTANCES.get(name, {}).items()}
    if name == "multislerp":
        given_distances["eps"] = 0
    if name == "karcher":  # tol is an angle and a length at once; one step leaves only the length, far below
        given_distances.update(max_iter=1, tol=1e-9)
    expected = run(name, base, models, **({"eps": 0} if name == "multislerp" else {}),
                   **({"max_iter": 1, "tol": 1e-9} if name == "karcher" else {}))  # fmt: skip
    scaled = run(name, base * scale, [model * scale for model in models], **given_distances)
    assert same_bits(scaled, expected * scale)


@pytest.mark.parametrize("name", SINGULAR)
@pytest.mark.parametrize("exponent", [-12, -1, 3, 12])
def test_scaling_every_input_scales_decompositions_up_to_rounding(name, exponent):
    base, *models = draw_tensors(8, (6, 5), 3)
    scaled = run(name, base * 2.0**exponent, [model * 2.0**exponent for model in models]) * 2.0**-exponent
    assert_close(scaled, run(name, base, models), [torch.full((6, 5), 3.0)], relative=1e-5)


WEIGHTED = [name for name in EVERY_METHOD if get_method(name).parameter("weight") and name != "nuslerp"]


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_model_of_weight_0_has_no_part_at_all(name):
    """Not even in what a random method draws for the others: each model has a stream of its own."""
    base, one, two = draw_tensors(9, (40, 6), 3)
    fixed = {"normalize": False} if get_method(name).parameter("normalize") else {}
    both = run(name, base, [one, two], **fixed, weight=[0.7, 0])
    alone = run(name, base, [one], **fixed, weight=[0.7])
    assert same_bits(both, alone)


@pytest.mark.parametrize("name", [name for name in WEIGHTED if name not in ("fisher", "multislerp", "linear")])
def test_negative_weights_lead_away_from_the_model(name):
    base, model = draw_tensors(10, (40, 6), 2)
    there, away = (run(name, base, [model], weight=weight, normalize=False) for weight in (0.5, -0.5))
    assert_close(away - base, wide(base - there), [base, model])
    assert not torch.equal(away, base)


@pytest.mark.parametrize("name", [name for name in EVERY_METHOD if get_method(name).parameter("density")])
@settings(max_examples=15)
@given(seed=SEEDS, density=st.floats(0.2, 0.8))
def test_in_bfloat16_where_magnitudes_tie_the_same_number_is_kept(name, seed, density):
    """⌊density·n⌋ of those that a method selects by size, however many are equal; the others draw around it."""
    if name in RANDOM:
        base, model = draw_tensors(seed, (60, 50), 2, torch.bfloat16)
        extra = {"epsilon": 0.1} if get_method(name).parameter("epsilon") else {}
        moved = int((run(name, base, [model], density=density, **extra) != base).sum())
        unmovable = int((model == base).sum())
        spread = 5 * (3000 * density * (1 - density)) ** 0.5
        assert abs(moved - density * 3000) <= spread + unmovable
        return
    base = torch.zeros(3000, dtype=torch.bfloat16)
    model = torch.randint(1, 4, (3000,), generator=torch.Generator().manual_seed(seed)).bfloat16()
    gamma = {"gamma": 0.01} if get_method(name).parameter("gamma") else {}
    outliers = int(0.01 * 3000) if gamma else 0
    moved = int((run(name, base, [model], density=density, **gamma) != 0).sum())
    assert moved == min(int(density * 3000), 3000 - outliers)
