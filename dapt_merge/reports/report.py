"""A study's report as plain data: the front and both ends on report items, ready to be printed, drawn and read again.

The idea: the search chose on its own items, so what is claimed comes from others. `build_report` joins the study with
the scores of those other items; `save_report` writes `report.json` and `report.md` into the study's folder, from which
every later picture is drawn without a model. What this module does not know: how a score was made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapt_merge.atomic import write_text
from dapt_merge.errors import InputError
from dapt_merge.reports.plot import FrontPicture, TrialPoint
from dapt_merge.reports.rows import Axis, Gain, Role, Row, build_row
from dapt_merge.reports.table import CAPTION, to_markdown
from dapt_merge.reports.verdict import control_sentence, verdict

if TYPE_CHECKING:
    from dapt_merge.evaluation.statistics import Scores
    from dapt_merge.study.results import StudyResult, StudyTrial

REPORT_JSON = "report.json"
REPORT_MARKDOWN = "report.md"


@dataclass(frozen=True)
class Report:
    """The report of a study. `held_out` says whether the rows' items are disjoint from those of the search."""

    title: str
    rows: tuple[Row, ...]
    axes: tuple[Axis, ...]
    trials: tuple[TrialPoint, ...]
    items: Mapping[str, int]
    held_out: bool
    of_trials: int
    verdict: tuple[str, ...]

    @property
    def footnote(self) -> str:
        """How many items stand behind the bars, and which."""
        counts = ", ".join(f"{count} {name}" for name, count in self.items.items() if name in self._main)
        kind = "Report items" if self.held_out else "SEARCH items (they chose these merges: the gains flatter)"
        return f"{kind}: {counts}. Bars: 95% paired-bootstrap intervals of the difference from the base."

    @property
    def _main(self) -> tuple[str, str]:
        domain, general = main_axes(self.axes)
        return domain.name, general.name

    def picture(self) -> FrontPicture:
        """The Pareto picture of the two main axes."""
        domain, general = main_axes(self.axes)
        return FrontPicture(self.rows, self.trials, domain.name, general.name, domain.unit, self.title, self.footnote)


def main_axes(axes: Sequence[Axis]) -> tuple[Axis, Axis]:
    """The first domain and the first general axis: the two that the picture and the verdict are about.

    Raises:
        InputError: one of the two sides has no axis.
    """
    found = {axis.side: axis for axis in reversed(axes)}
    if len(found) < 2:
        raise InputError(
            f"a trade-off needs a domain and a general side, found only {', '.join(found)}",
            where="objectives",
            remedy="Give the suites of the objectives `axis: domain` and `axis: general`.",
        )
    return found["domain"], found["general"]


def build_report(
    study: StudyResult,
    scores: Mapping[int, Scores],
    axes: Sequence[Axis],
    *,
    held_out: bool,
    title: str | None = None,
    seed: int = 0,
) -> Report:
    """Join a study with per-item scores of its front and ends.

    Args:
        study: the study, for labels, the knee (chosen on search items) and the faint background of trials.
        scores: trial number → scores; the base and the DAPT model among them.
        axes: what is compared; the objectives' axes first.
        held_out: whether the scored items are disjoint from those of the search.
        title: of the picture; default the study's name.
        seed: of the bootstrap.
    """
    from dapt_merge.study.front import knee

    assert study.base is not None
    assert study.dapt is not None
    roles: dict[int, Role] = dict.fromkeys(scores, "front")
    knee_trial = knee(study).number
    roles[knee_trial] = "knee"
    # An end that is itself the knee stays an end: no merge was worth more.
    roles |= {study.base: "base", study.dapt: "dapt"}
    base, dapt = scores[study.base], scores[study.dapt]
    rows = [
        build_row(study.trial(number).label, roles[number], number, scores[number], base, dapt, axes, seed=seed)
        for number in scores
    ]
    domain, general = main_axes(axes)
    rows.sort(key=lambda row: (row.role not in ("base", "dapt"), row.role, -row.gains[domain.name].estimate))
    items = {axis.name: _count(base, axis) for axis in axes}
    return Report(
        title=title or study.name,
        rows=tuple(rows),
        axes=tuple(axes),
        trials=tuple(_background(study)),
        items=items,
        held_out=held_out,
        of_trials=len(study.finished),
        verdict=(*verdict(rows, domain, general, knee_trial=knee_trial), *_control(rows, axes, domain)),
    )


def _control(rows: Sequence[Row], axes: Sequence[Axis], domain: Axis) -> list[str]:
    """A recorded suite named `control` (or `report-control`) is read as the control of the domain gain."""
    return [
        control_sentence(rows, domain, axis) for axis in axes if axis.name == "control" and axis.metric == domain.metric
    ]


def save_report(report: Report, folder: str | Path) -> Path:
    """Write `report.json` and `report.md` into `folder`; returns the path of the former."""
    folder = Path(folder)
    text = "\n".join(
        [
            f"# {report.title}",
            "",
            *report.verdict,
            "",
            to_markdown(report.rows, report.axes),
            f"{CAPTION}.",
            "",
            report.footnote,
            "",
        ]
    )
    write_text(folder / REPORT_MARKDOWN, text)
    write_text(folder / REPORT_JSON, json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n")
    return folder / REPORT_JSON


def load_report(folder: str | Path) -> Report:
    """Read a report that `save_report` wrote.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = Path(folder) / REPORT_JSON
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return Report(
            title=plain["title"],
            rows=tuple(_row(row) for row in plain["rows"]),
            axes=tuple(Axis(**{**axis, "tasks": tuple(axis["tasks"])}) for axis in plain["axes"]),
            trials=tuple(TrialPoint(**point) for point in plain["trials"]),
            items=plain["items"],
            held_out=plain["held_out"],
            of_trials=plain["of_trials"],
            verdict=tuple(plain["verdict"]),
        )
    except FileNotFoundError as error:
        raise InputError("there is no report yet", where=path, remedy="Run the search to its end.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"the report is damaged: {error}", where=path, remedy="Run the search again.") from error


def _row(plain: dict[str, Any]) -> Row:
    def gain(value: Any) -> Gain | None:
        return None if value is None else Gain(**value)

    shares = {key: gain(plain[key]) for key in ("domain_gain_kept", "general_loss_given_back")}
    by_axis = {key: {name: Gain(**value) for name, value in plain[key].items()} for key in ("gains", "over_dapt")}
    return Row(**{**plain, **shares, **by_axis})


def _background(study: StudyResult) -> list[TrialPoint]:
    """Every trial as the search saw it, ends left out."""
    sides = {objective.side: objective.name for objective in reversed(study.objectives)}
    points = []
    for trial in study.complete:
        gains = study.gains(trial)
        if trial.endpoint is None and gains:
            points.append(TrialPoint(gains[sides["domain"]], gains[sides["general"]], method_of(trial)))
    return points


def method_of(trial: StudyTrial) -> str:
    """The merge method of a trial."""
    return str(trial.params.get("method", "?"))


def _count(scores: Scores, axis: Axis) -> int:
    from dapt_merge.evaluation.items import pick

    return sum(len(pick(scores, task, axis.metric)) for task in axis.tasks)
