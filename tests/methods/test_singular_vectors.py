"""tsv, iso_c and iso_cts against float64, and what they do with tensors that are no matrices."""

import numpy as np
import pytest
import torch
from float64_reference import assert_close, draw_tensors, merge, same_bits, wide
from hypothesis import given
from hypothesis import strategies as st

from dapt_merge.methods.apply import combine
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.registry import get_method

METHODS = ["tsv", "iso_c", "iso_cts"]
SEEDS = st.integers(0, 10_000)
MATRICES = st.sampled_from([(6, 6), (4, 9), (9, 4), (12, 5)])


def polar(matrix: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def tsv(deltas):
    each = min(deltas[0].shape) // len(deltas)
    parts = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = np.hstack([part[0][:, :each] for part in parts])
    right = np.vstack([part[2][:each] for part in parts])
    return polar(left) @ np.diag(np.concatenate([part[1][:each] for part in parts])) @ polar(right)


def iso_c(deltas):
    left, values, right = np.linalg.svd(sum(deltas), full_matrices=False)
    return values.mean() * left @ right


def iso_cts(deltas, fraction):
    rank, tasks = min(deltas[0].shape), len(deltas)
    each = min(round((rank - int(rank * fraction)) / tasks), rank // tasks)
    common = rank - each * tasks
    left, values, right = (part for part in np.linalg.svd(sum(deltas), full_matrices=False))
    lefts, strengths, rights = [left[:, :common]], [values[:common]], [right[:common]]
    for delta in deltas:
        own = np.linalg.svd((np.eye(len(left)) - left[:, :common] @ left[:, :common].T) @ delta, full_matrices=False)
        lefts.append(own[0][:, :each])
        strengths.append(own[1][:each])
        rights.append(own[2][:each])
    return np.concatenate(strengths).mean() * polar(np.hstack(lefts)) @ polar(np.vstack(rights))


def well_conditioned(seed, shape, count):
    """Task vectors whose singular values lie apart, so that float32 can tell their directions."""
    generator = np.random.default_rng(seed)
    base = generator.normal(size=shape)
    models = []
    for _ in range(count):
        left, right = polar(generator.normal(size=(shape[0],) * 2)), polar(generator.normal(size=(shape[1],) * 2))
        rank = min(shape)
        values = np.linspace(1, 0.3, rank) * generator.uniform(0.98, 1.02, rank)
        models.append(base + (left[:, :rank] * values) @ right[:rank])
    return [torch.tensor(tensor, dtype=torch.float32) for tensor in (base, *models)]


def condition(deltas) -> float:
    values = np.linalg.svd(sum(deltas), compute_uv=False)
    return values[0] / values[-1]


@given(SEEDS, MATRICES, st.integers(1, 3), st.floats(0.2, 1.5))
def test_tsv_is_the_formula_in_float64(seed, shape, count, lambda_):
    base, *models = well_conditioned(seed, shape, count)
    deltas = [wide(model) - wide(base) for model in models]
    expected = tsv(deltas)
    parts = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    each = min(shape) // count
    stacked = [np.hstack([p[0][:, :each] for p in parts]), np.vstack([p[2][:each] for p in parts])]
    steepness = max(np.linalg.cond(matrix) for matrix in stacked)
    merged = merge("tsv", base, models, lambda_=lambda_)
    error = np.abs(wide(merged) - wide(base) - lambda_ * expected).max()
    assert error <= 1e-4 * steepness


@given(SEEDS, MATRICES, st.integers(1, 3), st.floats(0.2, 1.5))
def test_iso_c_is_the_formula_in_float64(seed, shape, count, lambda_):
    base, *models = well_conditioned(seed, shape, count)
    deltas = [wide(model) - wide(base) for model in models]
    error = np.abs(wide(merge("iso_c", base, models, lambda_=lambda_)) - wide(base) - lambda_ * iso_c(deltas)).max()
    assert error <= 1e-6 * condition(deltas) * 10


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts_is_the_formula_in_float64(seed, fraction):
    base, *models = well_conditioned(seed, (12, 10), 2)
    deltas = [wide(model) - wide(base) for model in models]
    merged = wide(merge("iso_cts", base, models, common_fraction=fraction))
    assert np.abs(merged - wide(base) - iso_cts(deltas, fraction)).max() <= 1e-4


def test_a_worked_example():
    """Two tasks that each strengthen one axis of a 2×2 matrix: 4·e₁e₁ᵀ and 2·e₂e₂ᵀ."""
    base = torch.ones(2, 2)
    models = [base + torch.diag(torch.tensor([4.0, 0.0])), base + torch.diag(torch.tensor([0.0, 2.0]))]
    assert_close(merge("tsv", base, models), np.array([[5.0, 1.0], [1.0, 3.0]]), [base])
    assert_close(merge("iso_c", base, models), np.array([[4.0, 1.0], [1.0, 4.0]]), [base])
    assert_close(merge("iso_c", base, models, lambda_=0.5), np.array([[2.5, 1.0], [1.0, 2.5]]), [base])


def test_tsv_separates_what_two_tasks_share():
    """Both tasks use one direction, which would be twice as strong in their sum."""
    base, direction = torch.zeros(3, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    nudge = torch.tensor([[0.0, 0.0], [0.0, 0.3], [0.0, 0.0]])
    merged = merge("tsv", base, [direction + nudge, direction - nudge])
    values = torch.linalg.svdvals(merged)
    assert float(values.max()) <= 1 + 1e-5


@given(SEEDS, MATRICES, st.floats(0.2, 1.5))
def test_tsv_of_one_task_vector_is_task_arithmetic(seed, shape, lambda_):
    base, model = draw_tensors(seed, shape, 2)
    expected = merge("task_arithmetic", base, [model], weight=lambda_)
    assert_close(merge("tsv", base, [model], lambda_=lambda_), expected, [base, model])


@given(SEEDS, MATRICES, st.integers(1, 3))
def test_iso_gives_every_direction_the_mean_strength(seed, shape, count):
    base, *models = well_conditioned(seed, shape, count)
    strength = np.linalg.svd(sum(wide(model) - wide(base) for model in models), compute_uv=False).mean()
    values = np.linalg.svd(wide(merge("iso_c", base, models)) - wide(base), compute_uv=False)
    assert values == pytest.approx(np.full(min(shape), strength), rel=1e-4)
    spread = np.linalg.svd(wide(merge("iso_cts", base, models)) - wide(base), compute_uv=False)
    assert spread == pytest.approx(np.full(min(shape), spread.mean()), rel=1e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_task_vectors_does_not_matter(name, seed):
    base, *models = well_conditioned(seed, (12, 10), 3)
    forth, back = merge(name, base, models), merge(name, base, models[::-1])
    assert_close(forth, back, [torch.full((12, 10), float(base.abs().max()))], relative=1e-4)


def test_iso_cts_with_nothing_of_its_own_is_iso_c():
    base, *models = well_conditioned(1, (8, 6), 2)
    assert torch.equal(merge("iso_cts", base, models, common_fraction=1), merge("iso_c", base, models))
    assert torch.equal(merge("iso_cts", base, models[:1]), merge("iso_c", base, models[:1]))
    explain = get_method("iso_cts").dead_knobs
    assert explain is not None
    assert explain({}, 1)[0].startswith("common_fraction")
    assert explain({}, 2) == []


@pytest.mark.parametrize("name", METHODS)
@given(seed=SEEDS, shape=st.sampled_from([(), (1,), (7,), (3, 2, 5)]), lambda_=st.floats(0.2, 1.5))
def test_what_is_no_matrix_gets_the_plain_mean_and_says_so(name, seed, shape, lambda_):
    base, *models = draw_tensors(seed, shape, 3)
    context = TensorContext("w")
    merged = combine(get_method(name), base, models, {"lambda": lambda_}, context)
    mean = sum(wide(model) - wide(base) for model in models) / 2
    assert_close(merged, wide(base) + lambda_ * mean, [base, *models])
    assert str(context.notes["fallback"]).startswith("average: not a matrix")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lambda_0_is_the_base_bit_for_bit(name, dtype):
    base, *models = draw_tensors(1, (4, 6), 3, dtype)
    assert same_bits(merge(name, base, models, lambda_=0), base)
    if name == "tsv":
        assert same_bits(merge(name, base, models[:1]), models[0])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(5, 1), (1, 6), (2, 2), (0, 4), (4, 0), (0,), (20_000, 3), (2, 30_000)], ids=str)
def test_narrow_empty_and_very_long_matrices_are_merged(name, shape):
    base, *models = draw_tensors(1, shape, 4, torch.bfloat16)
    before = [tensor.clone() for tensor in (base, *models)]
    assert merge(name, base, models).shape == shape
    assert all(same_bits(tensor, copy) for tensor, copy in zip((base, *models), before, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_a_matrix_that_no_task_trained_is_the_base(name):
    base = draw_tensors(1, (4, 6), 1)[0]
    assert torch.equal(merge(name, base, [base, base]), base)


@pytest.mark.parametrize("name", METHODS)
def test_directions_that_only_rounding_determines_are_counted(name):
    base = torch.zeros(6, 5)
    direction = torch.outer(torch.linspace(1, 2, 6), torch.linspace(-1, 1, 5))
    context = TensorContext("w")
    combine(get_method(name), base, [direction, 2 * direction], {}, context)
    assert int(context.notes["undetermined_directions"]) >= 1


@pytest.mark.parametrize("name", METHODS)
def test_the_number_of_threads_changes_no_bit(name):
    """Decompositions that are split over threads round differently."""
    base, *models = draw_tensors(2, (150, 110), 3)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(merge(name, base, models))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(result, results[0]) for result in results)


def low_rank(*directions):
    """Task vectors of rank one in a matrix of 6 by 5, whose other directions nobody uses."""
    deltas = []
    for strength, left, right in directions:
        delta = torch.zeros(6, 5)
        delta[: len(left), : len(right)] = strength * torch.outer(torch.tensor(left), torch.tensor(right))
        deltas.append(delta)
    return deltas


def test_directions_that_no_task_uses_do_not_enter_tsv():
    """The worked example of two by two, in a larger matrix: what the null spaces happen to be must not matter."""
    models = low_rank((3.0, [1.0, 0.0], [1.0, 0.0]), (3.0, [0.6, 0.8], [0.0, 1.0]))
    expected = torch.zeros(6, 5)
    expected[:2, :2] = 3 * torch.tensor([[0.94868, 0.31623], [-0.31623, 0.94868]])
    context = TensorContext("w")
    merged = combine(get_method("tsv"), torch.zeros(6, 5), models, {}, context)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=0)
    assert context.notes["undetermined_directions"] == 2  # of the two of each task, one


def test_equal_tasks_share_their_directions():
    """One task vector given twice: each direction once, not doubled and not with noise beside it."""
    (delta,) = low_rank((3.0, [0.6, 0.8], [0.0, 1.0]))
    base = torch.zeros(6, 5)
    torch.testing.assert_close(merge("tsv", base, [delta, delta]), delta, atol=1e-5, rtol=0)


def test_isotropic_merging_strengthens_no_direction_that_no_task_uses():
    """Singular values 3 and 1 of five: mean strength 4/5 in those two directions, nothing elsewhere."""
    models = low_rank((3.0, [1.0, 0.0], [1.0, 0.0]), (1.0, [0.0, 1.0], [0.0, 1.0]))
    expected = torch.zeros(6, 5)
    expected[0, 0] = expected[1, 1] = 0.8
    for name in ("iso_c", "iso_cts"):
        torch.testing.assert_close(merge(name, torch.zeros(6, 5), models), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_merged_into_float32_weights_is_still_of_low_rank(name):
    """Rounding the sum of weights and adapter leaves noise of full rank, which must not be taken for directions."""
    generator = torch.Generator().manual_seed(0)
    base = 0.05 * torch.randn(64, 48, generator=generator)
    adapters = [1e-3 * torch.randn(64, 3, generator=generator) @ torch.randn(3, 48, generator=generator) for _ in "ab"]
    merged = merge(name, base, [base + adapter for adapter in adapters])
    values = torch.linalg.svdvals(merged.double() - base.double())
    assert int((values > 1e-3 * values[0]).sum()) == 6
