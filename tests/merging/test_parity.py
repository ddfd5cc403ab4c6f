"""Every method that mergekit shares, on whole models by both engines: no further apart than rounding lets them be.

What is compared, and how the bounds follow, is in benchmarks/parity*.py, which print the same comparison as a table.
The quick tests are a diagonal through methods, models and arithmetics; the slow ones are the whole product.
"""

from __future__ import annotations

import pytest
from mergekit.merge_methods import registered_methods
from parity import Workbench, difference, drawn
from parity_cases import ARITHMETIC, CASES, DRAWN, MODELS
from parity_differences import ARCHITECTURES, SITUATIONS, architecture, fusion_in_small_steps, rescaled_drops

# The share of elements that rounding may decide before a comparison says nothing; arcee_fusion has none to say in
# bfloat16, where the error of its divergences exceeds them.
MOST_UNDECIDED = {"float32": 0.01, "bfloat16 of float32": 0.03, "bfloat16": 0.25}
WIDENED = ("arcee_fusion", "ramplus_tl")  # mergekit writes these in float32 when asked for bfloat16


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Workbench(tmp_path_factory.mktemp("parity"))


def diagonal(cases):
    kinds, arithmetics = list(MODELS), list(ARITHMETIC)
    return [(kinds[i % len(kinds)], case, arithmetics[(i // 2) % len(arithmetics)]) for i, case in enumerate(cases)]


def check(bench, kind, case, arithmetic):
    found = difference(bench, kind, case, arithmetic)
    assert found.outside == 0, (kind, case, arithmetic, found)
    if (CASES[case].method, arithmetic) != ("arcee_fusion", "bfloat16"):
        assert found.undecided <= MOST_UNDECIDED[arithmetic], (kind, case, arithmetic, found)
    assert bool(found.widened) == (arithmetic == "bfloat16" and CASES[case].method in WIDENED)


def check_draws(bench, kind, case, arithmetic):
    for engine in drawn(bench, kind, case, arithmetic):
        assert abs(engine.rate_error) < 4
        assert abs(engine.move_error) < 4


def test_every_method_of_mergekit_is_compared():
    assert {method.spec.name for method in registered_methods()} == {case.method for case in CASES.values()}


@pytest.mark.parametrize(("kind", "case", "arithmetic"), diagonal(CASES))
def test_both_engines_make_one_model(bench, kind, case, arithmetic):
    check(bench, kind, case, arithmetic)


@pytest.mark.parametrize(("kind", "case", "arithmetic"), diagonal(DRAWN))
def test_both_engines_draw_as_their_formula_says(bench, kind, case, arithmetic):
    check_draws(bench, kind, case, arithmetic)


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("kind", MODELS)
def test_both_engines_agree_on_every_method_model_and_arithmetic(bench, kind, arithmetic):
    for case in CASES:
        check(bench, kind, case, arithmetic)
    for case in DRAWN:
        check_draws(bench, kind, case, arithmetic)


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: f"{situation.method}: {situation.what}")
def test_where_the_engines_part_both_do_what_the_table_says(situation):
    line = situation.line()
    assert line.holds, line


def test_few_kept_elements_are_scaled_by_the_density_and_not_by_what_happened_to_be_kept():
    assert rescaled_drops().holds


def test_fusion_selects_by_the_divergence_and_not_by_its_rounding():
    assert all(line.holds for line in fusion_in_small_steps())


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_merged_whole_whatever_mergekit_makes_of_it(name, tmp_path):
    line = architecture(name, tmp_path)
    assert line.holds, line
