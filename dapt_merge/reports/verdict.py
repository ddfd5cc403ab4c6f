"""What was found, in plain words, from the measured numbers only.

A sentence claims a gain or a loss only when its 95% interval leaves zero out; otherwise it says that the items cannot
tell. The wording follows the numbers: nothing here assumes that merging helps.
"""

from __future__ import annotations

from collections.abc import Sequence

from dapt_merge.reports.rows import Axis, Gain, Row


def verdict(rows: Sequence[Row], domain: Axis, general: Axis, *, knee_trial: int | None = None) -> list[str]:
    """Return sentences on DAPT against the base, then on the knee against both.

    Args:
        rows: the report's rows, with the roles "base" and "dapt" among them, and "knee" if that is neither of the two.
        domain: the axis of the domain objective.
        general: the axis of the general objective.
        knee_trial: the trial that is the knee.
    """
    by_role = {row.role: row for row in rows}
    dapt, knee = by_role["dapt"], by_role.get("knee")
    sentences = [
        f"DAPT against the base: {_change(dapt.gains[domain.name], domain)} on the domain, "
        f"{_change(dapt.gains[general.name], general)} in general."
    ]
    if knee is None:
        return [*sentences, _without_knee(rows, knee_trial)]
    sentences.append(f"{knee.label}: {_kept(knee)}, {_given_back(knee)}.")
    sentences.append(
        f"Against DAPT it has {_change(knee.over_dapt[general.name], general)} in general and "
        f"{_change(knee.over_dapt[domain.name], domain)} on the domain."
    )
    sentences.append(_balance(knee, domain, general))
    return sentences


def _without_knee(rows: Sequence[Row], knee_trial: int | None) -> str:
    if all(row.role in ("base", "dapt") for row in rows):
        return "No merge was scored beside the two ends."
    end = next((row.label for row in rows if row.trial == knee_trial), "an end")
    return f"The knee of the search's front is {end} itself: to the search, no merge was worth more."


def control_sentence(rows: Sequence[Row], domain: Axis, control: Axis) -> str:
    """Say how much of DAPT's domain gain a control shows too, where there is nothing to know but form.

    Args:
        rows: the report's rows.
        domain: the axis of the domain objective.
        control: an axis of texts with the domain's form and shuffled content, in the same unit.
    """
    dapt = next(row for row in rows if row.role == "dapt")
    gain = dapt.gains[control.name]
    if not gain.beyond_noise or gain.estimate <= 0:
        shown = _change(gain, control)
        return f"On the control (the same form, shuffled content) DAPT shows {shown}: the gain is content."
    return (
        f"On the control (the same form, shuffled content) DAPT has {_change(gain, control)} too, against "
        f"{dapt.gains[domain.name].estimate:+.3f} on the domain: that much can be learnt from form alone."
    )


def _change(gain: Gain, axis: Axis) -> str:
    size = f"{abs(gain.estimate):.3f} {axis.unit}" if axis.scale == 1 else f"{abs(gain.estimate):.1f} {axis.unit}"
    places = 3 if axis.scale == 1 else 1
    interval = f"[{gain.low:+.{places}f}, {gain.high:+.{places}f}]"
    if not gain.beyond_noise:
        return f"no difference beyond noise ({gain.estimate:+.{places}f} {interval} {axis.unit})"
    return f"a {'gain' if gain.estimate > 0 else 'loss'} of {size} {interval}"


def _share(share: Gain) -> str:
    return f"{100 * share.estimate:.0f}% [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def _kept(knee: Row) -> str:
    if knee.domain_gain_kept is None:
        return "DAPT has no domain gain beyond noise, so no share of it can be stated"
    return f"keeps {_share(knee.domain_gain_kept)} of the domain gain"


def _given_back(knee: Row) -> str:
    if knee.general_loss_given_back is None:
        return "DAPT has no general loss beyond noise, so no share of it can be stated"
    share = knee.general_loss_given_back
    if share.low > 1:
        return f"gives back all of the general loss and gains beyond it ({_share(share)})"
    return f"gives back {_share(share)} of the general loss"


def _balance(knee: Row, domain: Axis, general: Axis) -> str:
    on_domain, in_general = knee.gains[domain.name], knee.gains[general.name]
    if on_domain.low > 0 and in_general.low > 0:
        return "Against the base it is better on both sides, beyond noise."
    if on_domain.low > 0 and in_general.high < 0:
        return (
            f"Against the base it still costs {abs(in_general.estimate):.3f} {general.unit} in general "
            f"for {on_domain.estimate:.3f} {domain.unit} gained on the domain."
        )
    if on_domain.low > 0:
        return "Against the base it gains on the domain, and these items see no general loss beyond noise."
    return "Against the base these items see no domain gain beyond noise."
