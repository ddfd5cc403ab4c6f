"""Statistics of paired comparisons: known answers, symmetry, coverage, and refusal to compare what is not the same."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_merge.errors import InputError
from dapt_merge.evaluation.items import TaskItems
from dapt_merge.evaluation.statistics import (
    gain,
    paired_arrays,
    paired_bootstrap,
    resampled_scores,
    retained_share,
    standard_error,
    suite_score,
    suite_standard_error,
)


def record(numerators, denominators=None, *, task="t", metric="acc", higher=True, ids=None, version="1"):
    numerators = np.asarray(numerators, dtype=float)
    denominators = np.ones_like(numerators) if denominators is None else denominators
    ids = tuple(f"{number:05d}" for number in range(len(numerators))) if ids is None else ids
    return TaskItems(task, version, metric, higher, ids, numerators, denominators)


def scores(*records):
    return {item.task: item for item in records}


def shuffled(item, seed):
    order = np.random.default_rng(seed).permutation(len(item))
    ids = tuple(item.item_ids[index] for index in order)
    return record(item.numerators[order], item.denominators[order], task=item.task, ids=ids)


item_values = st.lists(st.floats(0, 100), min_size=3, max_size=20)


def test_the_score_is_a_ratio_of_sums_not_a_mean_of_ratios():
    assert record([1.0, 6.0], [1.0, 3.0]).score == 7 / 4


def test_a_suite_score_weighs_every_task_the_same():
    items = scores(record([1, 1, 1, 1, 0, 0, 0, 0], task="long"), record([1, 1], task="short"))
    assert suite_score(items, ["long", "short"], "acc") == 0.75


def test_records_are_found_by_task_and_metric_whatever_their_keys():
    items = {"t": record([1, 0]), "t:acc_norm": record([1, 1], metric="acc_norm")}
    assert suite_score(items, ["t"], "acc_norm") == 1.0


def test_the_standard_error_of_accuracy_is_lm_evals():
    correct = np.array([1, 0, 1, 1, 0, 1, 1])
    assert standard_error(record(correct)) == pytest.approx(np.std(correct, ddof=1) / math.sqrt(7))


def test_the_standard_error_of_a_ratio_agrees_with_its_resamples():
    random = np.random.default_rng(1)
    item = record(random.gamma(3, 40, 300), random.uniform(50, 200, 300))
    resampled = resampled_scores([scores(item)], ["t"], "acc", resamples=20_000)
    assert standard_error(item) == pytest.approx(resampled.resamples[0].std(), rel=0.03)


def test_the_standard_error_of_a_suite_adds_independent_tasks():
    first, second = record([1, 0, 1, 1], task="a"), record([0, 0, 1], task="b")
    expected = math.hypot(standard_error(first), standard_error(second)) / 2
    assert suite_standard_error(scores(first, second), ["a", "b"], "acc") == pytest.approx(expected)


def test_the_interval_agrees_with_scipy_on_one_task_of_plain_means():
    random = np.random.default_rng(3)
    a, b = random.normal(1.0, 1.0, 400), random.normal(0.8, 1.0, 400)
    ours = paired_bootstrap(scores(record(a)), scores(record(b)), ["t"], "acc", resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=4,
    )
    assert ours.estimate == pytest.approx(np.mean(a - b))
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.05 * (ours.high - ours.low))
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.05 * (ours.high - ours.low))
    assert ours.standard_error == pytest.approx(theirs.standard_error, rel=0.05)


def test_the_interval_agrees_with_scipy_on_a_difference_of_ratios():
    random = np.random.default_rng(5)
    size = random.uniform(50, 300, 200)
    a, b = size * random.gamma(30, 0.03, 200), size * random.gamma(30, 0.035, 200)
    ours = paired_bootstrap(scores(record(a, size)), scores(record(b, size)), ["t"], "acc", resamples=20_000)

    def difference(x, y, z, axis):
        return (np.sum(x, axis=axis) - np.sum(y, axis=axis)) / np.sum(z, axis=axis)

    theirs = scipy.stats.bootstrap(
        (a, b, size), difference, paired=True, method="percentile", n_resamples=20_000, rng=6
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * (theirs.high - theirs.low))
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * (theirs.high - theirs.low))


@pytest.mark.parametrize("kind", ["correct answers", "bits"])
def test_a_95_percent_interval_covers_the_truth_in_92_to_98_percent_of_samples(kind):
    random = np.random.default_rng(11)
    simulations, covered = 400, 0
    for _ in range(simulations):
        a, b, truth = {}, {}, []
        for task, count in (("x", 60), ("y", 90)):
            difficulty = random.normal(size=count)
            if kind == "bits":
                size = random.uniform(50, 300, count)
                pair = [
                    size * np.exp(0.2 * difficulty + 0.1 * random.normal(size=count)) * level for level in (1.1, 1.0)
                ]
                truth.append(0.1 * math.exp(0.2**2 / 2 + 0.1**2 / 2))
            else:
                size = np.ones(count)
                pair = [(difficulty + random.normal(size=count) < cut).astype(float) for cut in (0.4, 0.0)]
                truth.append(scipy.stats.norm.cdf(0.4 / math.sqrt(2)) - 0.5)
            a[task], b[task] = (record(values, size, task=task) for values in pair)
        interval = paired_bootstrap(a, b, ["x", "y"], "acc", resamples=1_000, seed=int(random.integers(2**31)))
        covered += interval.low <= np.mean(truth) <= interval.high
    assert 0.92 <= covered / simulations <= 0.98


def test_pairing_narrows_the_interval_of_models_that_agree_on_most_items():
    random = np.random.default_rng(0)
    b = (random.uniform(size=300) < 0.5).astype(float)
    a = b.copy()
    a[:15] = 1.0
    interval = paired_bootstrap(scores(record(a)), scores(record(b)), ["t"], "acc")
    unpaired = math.hypot(standard_error(record(a)), standard_error(record(b)))
    assert interval.standard_error < 0.3 * unpaired


def test_the_order_of_items_does_not_matter():
    random = np.random.default_rng(2)
    a, b = record(random.uniform(size=50)), record(random.uniform(size=50))
    expected = paired_bootstrap(scores(a), scores(b), ["t"], "acc", resamples=500)
    assert paired_bootstrap(scores(shuffled(a, 1)), scores(shuffled(b, 2)), ["t"], "acc", resamples=500) == expected


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    random = np.random.default_rng(2)
    a, b = scores(record(random.uniform(size=50))), scores(record(random.uniform(size=50)))
    first, again, other = (paired_bootstrap(a, b, ["t"], "acc", resamples=500, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_tasks_draws_do_not_depend_on_the_other_tasks():
    random = np.random.default_rng(2)
    first, second = record(random.uniform(size=50), task="x"), record(np.ones(50), task="y")
    alone = resampled_scores([scores(first)], ["x"], "acc", resamples=200).resamples
    together = resampled_scores([scores(first, second)], ["y", "x"], "acc", resamples=200).resamples
    assert 2 * together - 1 == pytest.approx(alone)


def test_resamples_are_the_same_in_blocks_as_at_once(monkeypatch):
    a = scores(record(np.random.default_rng(2).uniform(size=50)))
    at_once = resampled_scores([a], ["t"], "acc", resamples=999).resamples
    monkeypatch.setattr("dapt_merge.evaluation.statistics._COUNTS_PER_BLOCK", 700)
    assert resampled_scores([a], ["t"], "acc", resamples=999).resamples == pytest.approx(at_once)


@settings(max_examples=50, deadline=None)
@given(first=item_values, data=st.data())
def test_swapping_the_models_mirrors_the_interval(first, data):
    second = data.draw(st.lists(st.floats(0, 100), min_size=len(first), max_size=len(first)))
    a, b = scores(record(first)), scores(record(second))
    forwards = paired_bootstrap(a, b, ["t"], "acc", resamples=200)
    backwards = paired_bootstrap(b, a, ["t"], "acc", resamples=200)
    assert forwards.estimate == -backwards.estimate
    assert forwards.low == pytest.approx(-backwards.high, abs=1e-9)
    assert forwards.p_value == backwards.p_value


@settings(max_examples=50, deadline=None)
@given(values=item_values, sizes=st.data())
def test_a_model_does_not_differ_from_itself(values, sizes):
    denominators = np.array(sizes.draw(st.lists(st.floats(1, 1e4), min_size=len(values), max_size=len(values))))
    a = scores(record(values, denominators))
    interval = paired_bootstrap(a, scores(record(values, denominators)), ["t"], "acc", resamples=200)
    assert (interval.estimate, interval.low, interval.high, interval.p_value) == (0.0, 0.0, 0.0, 1.0)


@settings(max_examples=50, deadline=None)
@given(values=item_values, shift=st.floats(0.1, 10))
def test_a_constant_shift_is_found_exactly(values, shift):
    interval = paired_bootstrap(
        scores(record(np.array(values) + shift)), scores(record(values)), ["t"], "acc", resamples=200
    )
    assert interval.low == pytest.approx(shift, rel=1e-6)
    assert interval.high == pytest.approx(shift, rel=1e-6)


def test_the_p_value_and_the_interval_agree_on_zero():
    random = np.random.default_rng(8)
    for shift in (0.0, 0.05, 0.1, 0.2, 0.4):
        a, b = random.normal(shift, 1, 200), random.normal(0, 1, 200)
        interval = paired_bootstrap(scores(record(a)), scores(record(b)), ["t"], "acc", resamples=2_000)
        assert interval.excludes_zero == (interval.p_value < 0.05)


def test_a_gain_is_positive_when_the_model_is_better_whatever_the_metric():
    low, high = np.linspace(0.1, 0.5, 20), np.linspace(0.2, 0.7, 20)
    assert gain(scores(record(high)), scores(record(low)), ["t"], "acc", resamples=100).estimate > 0
    lower_is_better = [scores(record(values, metric="bits_per_byte", higher=False)) for values in (low, high)]
    assert gain(*lower_is_better, ["t"], "bits_per_byte", resamples=100).estimate > 0


def test_the_retained_share_is_kept_gain_over_whole_gain():
    random = np.random.default_rng(9)
    base = random.uniform(2, 3, 200)
    dapt = base - random.uniform(0.8, 1.2, 200)
    merged = base + 0.7 * (dapt - base)
    share = retained_share(*(scores(record(values)) for values in (merged, base, dapt)), ["t"], "acc", resamples=500)
    assert share.estimate == pytest.approx(0.7)
    assert (share.low, share.high) == (pytest.approx(0.7), pytest.approx(0.7))


def test_the_interval_of_a_retained_share_covers_its_truth():
    random = np.random.default_rng(12)
    covered = 0
    for _ in range(300):
        base = random.normal(3, 1, 100)
        dapt = base - 0.5 + random.normal(0, 0.5, 100)
        merged = base - 0.35 + random.normal(0, 0.5, 100)
        trio = [scores(record(values)) for values in (merged, base, dapt)]
        share = retained_share(*trio, ["t"], "acc", resamples=1_000, seed=int(random.integers(2**31)))
        covered += share.low <= 0.7 <= share.high
    assert 0.92 <= covered / 300 <= 0.98


def test_the_share_of_a_gain_that_may_be_zero_is_unbounded():
    random = np.random.default_rng(10)
    base, dapt, merged = (scores(record(random.normal(0, 1, 50))) for _ in range(3))
    share = retained_share(merged, base, dapt, ["t"], "acc", resamples=500)
    assert (share.low, share.high) == (-math.inf, math.inf)


def test_models_scored_on_different_items_are_not_compared():
    a = scores(record([1, 0, 1]))
    for ids, common in ((("x", "y", "z"), 0), (("00000", "00001", "z"), 2)):
        with pytest.raises(InputError, match=f"not scored on the same items.* {common} in common"):
            paired_bootstrap(a, scores(record([1, 0, 1], ids=ids)), ["t"], "acc")


def test_two_versions_of_a_task_are_not_compared():
    with pytest.raises(InputError, match="two versions"):
        paired_arrays([record([1, 0]), record([1, 0], version="2")])


def test_one_item_has_no_interval():
    with pytest.raises(InputError, match="one item"):
        paired_bootstrap(scores(record([1])), scores(record([0])), ["t"], "acc")
    assert math.isnan(standard_error(record([1])))


def test_a_missing_task_or_metric_is_named():
    with pytest.raises(InputError, match="Did you mean 'texts'"):
        suite_score(scores(record([1, 0], task="texts")), ["text"], "acc")
    with pytest.raises(InputError, match="it has: acc"):
        suite_score(scores(record([1, 0])), ["t"], "f1")


@pytest.mark.parametrize(
    ("numerators", "denominators", "ids", "message"),
    [
        ([], [], (), "no items"),
        ([1.0, 2.0], [1.0], ("a", "b"), "2 item ids"),
        ([1.0, 2.0], [1.0, 1.0], ("a", "a"), "twice"),
        ([1.0, math.nan], [1.0, 1.0], ("a", "b"), "not finite"),
        ([0.0, 0.0], [0.0, 0.0], ("a", "b"), "empty"),
    ],
)
def test_records_that_make_no_score_are_refused(numerators, denominators, ids, message):
    with pytest.raises(InputError, match=message):
        TaskItems("t", "1", "acc", True, ids, np.array(numerators), np.array(denominators))
