"""The report claims what the items show, and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from dapt_merge.errors import InputError
from dapt_merge.evaluation.items import TaskItems
from dapt_merge.reports.plot import FrontPicture, TrialPoint, save_front
from dapt_merge.reports.rows import Axis, build_row
from dapt_merge.reports.table import to_markdown, to_rich
from dapt_merge.reports.verdict import control_sentence, verdict

DOMAIN = Axis("domain", "domain", "bits_per_byte", ("domain_bpb",))
GENERAL = Axis("general", "general", "bits_per_byte", ("general_bpb",))
QUIZ = Axis("quiz", "domain", "acc", ("quiz",))
ITEMS = 200


def scores(domain: float, general: float, accuracy: float, *, noise: float = 0.0, seed: int = 0):
    """Items of one model with these mean bits per byte; `noise` is per item and model, so it does not cancel."""
    random = np.random.default_rng(seed)
    hardness = np.random.default_rng(99).normal(0, 0.3, ITEMS)
    ids = tuple(f"item-{i}" for i in range(ITEMS))
    size = np.full(ITEMS, 100.0)

    def bits(mean: float) -> np.ndarray:
        return size * (mean + hardness + noise * random.normal(size=ITEMS))

    correct = (np.arange(ITEMS) < accuracy * ITEMS).astype(float)
    return {
        "domain_bpb": TaskItems("domain_bpb", "1", "bits_per_byte", False, ids, bits(domain), size),
        "general_bpb": TaskItems("general_bpb", "1", "bits_per_byte", False, ids, bits(general), size),
        "quiz": TaskItems("quiz", "1", "acc", True, ids, correct, np.ones(ITEMS)),
    }


@pytest.fixture
def rows():
    base, dapt = scores(2.0, 1.0, 0.3, noise=0.05, seed=1), scores(1.5, 1.2, 0.6, noise=0.05, seed=2)
    knee = scores(1.55, 1.06, 0.55, noise=0.05, seed=3)
    axes = [DOMAIN, GENERAL, QUIZ]
    return [
        build_row("base", "base", 0, base, base, dapt, axes),
        build_row("DAPT checkpoint-160", "dapt", 1, dapt, base, dapt, axes),
        build_row("linear weight 0.62", "knee", 7, knee, base, dapt, axes),
    ]


def test_a_gain_is_positive_when_better_whatever_the_metrics_direction(rows):
    dapt = rows[1]
    assert dapt.gains["domain"].estimate == pytest.approx(0.5, abs=0.02)
    assert dapt.gains["general"].estimate == pytest.approx(-0.2, abs=0.02)
    assert dapt.gains["quiz"].estimate == pytest.approx(30.0)


def test_the_base_has_no_gain_over_itself_and_dapt_keeps_all_of_its_own(rows):
    base, dapt, _ = rows
    assert all(gain.estimate == gain.low == gain.high == 0 for gain in base.gains.values())
    assert dapt.domain_gain_kept.estimate == 1
    assert dapt.general_loss_given_back.estimate == 0


def test_shares_follow_from_the_scores(rows):
    knee = rows[2]
    assert knee.domain_gain_kept.estimate == pytest.approx(0.9, abs=0.03)
    assert knee.general_loss_given_back.estimate == pytest.approx(0.7, abs=0.05)
    assert knee.general_loss_given_back.low < knee.general_loss_given_back.estimate < knee.general_loss_given_back.high


def test_the_verdict_states_the_shares_and_both_comparisons(rows):
    text = " ".join(verdict(rows, DOMAIN, GENERAL))
    knee = rows[2]
    assert f"keeps {100 * knee.domain_gain_kept.estimate:.0f}%" in text
    assert f"gives back {100 * knee.general_loss_given_back.estimate:.0f}%" in text
    assert "still costs" in text


def test_the_verdict_says_when_no_merge_is_the_knee(rows):
    ends = list(rows[:2])
    assert "No merge was scored" in verdict(ends, DOMAIN, GENERAL, knee_trial=ends[1].trial)[-1]
    merged = replace(rows[2], role="front")
    said = verdict([*ends, merged], DOMAIN, GENERAL, knee_trial=ends[1].trial)[-1]
    assert f"is {ends[1].label} itself" in said


def test_a_control_that_gains_as_much_is_told(rows):
    control = Axis("control", "domain", "bits_per_byte", ("domain_bpb",))
    base, dapt = scores(2.0, 1.0, 0.3, noise=0.05, seed=1), scores(1.5, 1.2, 0.6, noise=0.05, seed=2)
    told = [build_row("DAPT", "dapt", 1, dapt, base, dapt, [DOMAIN, control])]
    assert "from form alone" in control_sentence(told, DOMAIN, control)
    nothing = Axis("control", "domain", "bits_per_byte", ("general_bpb",))
    flat = [build_row("DAPT", "dapt", 1, dapt, base, dapt, [DOMAIN, nothing])]
    assert "the gain is content" in control_sentence(flat, DOMAIN, nothing)


def test_where_dapt_gained_in_general_no_loss_is_given_back():
    base, dapt = scores(2.0, 1.0, 0.3, noise=0.05, seed=1), scores(1.5, 0.9, 0.6, noise=0.05, seed=2)
    row = build_row("linear weight 0.5", "knee", 2, dapt, base, dapt, [DOMAIN, GENERAL])
    assert row.general_loss_given_back is None
    assert row.domain_gain_kept.estimate == 1


def test_the_verdict_claims_nothing_within_noise():
    base, dapt = scores(2.0, 1.0, 0.3, noise=2.0, seed=1), scores(1.99, 1.01, 0.3, noise=2.0, seed=2)
    rows = [
        build_row(label, role, index, model, base, dapt, [DOMAIN, GENERAL])
        for index, (label, role, model) in enumerate(
            [("base", "base", base), ("DAPT", "dapt", dapt), ("linear weight 0.5", "knee", dapt)]
        )
    ]
    text = " ".join(verdict(rows, DOMAIN, GENERAL))
    assert "no difference beyond noise" in text
    assert "no share of it can be stated" in text
    assert "keeps" not in text.replace("no share", "")


def test_the_table_shows_scores_for_the_base_and_marks_what_is_within_noise(rows):
    text = to_markdown(rows, [DOMAIN, GENERAL, QUIZ])
    lines = text.splitlines()
    assert len(lines) == 5
    assert "30.0%" in lines[2]
    assert "+30.0 [" in lines[3]
    assert "°" in lines[2 + 1] or "°" not in lines[3]
    base_again = to_markdown([build_row("same", "front", 3, *(scores(2.0, 1.0, 0.3),) * 3, [DOMAIN])], [DOMAIN])
    assert "°" in base_again


@pytest.mark.parametrize("width", [60, 200])
def test_the_table_loses_no_column_on_any_terminal(rows, width):
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=width)
    for table in to_rich(rows, [DOMAIN, GENERAL, QUIZ], title="Report"):
        console.print(table)
    text = "".join(console.file.getvalue().split())
    for part in ("domain", "general", "quiz", "linear"):
        assert part in text


def picture(rows) -> FrontPicture:
    trials = [TrialPoint(0.3, -0.05, "linear"), TrialPoint(0.4, -0.1, "ties")]
    return FrontPicture(rows, trials, "domain", "general", "bits per byte", "Title", "Footnote")


def test_the_same_numbers_give_the_same_picture_file(rows, tmp_path):
    for kind in ("png", "svg"):
        first = save_front(picture(rows), tmp_path / f"a.{kind}").read_bytes()
        second = save_front(picture(rows), tmp_path / f"b.{kind}").read_bytes()
        assert first == second


def test_the_svg_names_every_labelled_model(rows, tmp_path):
    text = save_front(picture(rows), tmp_path / "front.svg").read_text()
    for label in ("base", "DAPT checkpoint-160", "knee: linear weight 0.62"):
        assert label in text


def test_html_is_self_contained(rows, tmp_path):
    text = save_front(picture(rows), tmp_path / "front.html").read_text()
    assert 'src="http' not in text
    assert "knee: linear weight 0.62" in text


def test_an_unknown_picture_format_is_refused(rows, tmp_path):
    with pytest.raises(InputError, match=r"\.bmp"):
        save_front(picture(rows), tmp_path / "front.bmp")
    assert list(tmp_path.iterdir()) == []


def test_a_share_of_nothing_is_not_stated():
    base = scores(2.0, 1.0, 0.3)
    row = build_row("same", "knee", 2, base, base, base, [DOMAIN, GENERAL])
    assert row.domain_gain_kept is None
    assert row.general_loss_given_back is None
    assert not math.isnan(row.scores["domain"])
