"""Which Optuna sampler proposes, and how its randomness survives a restart.

The idea: a sampler's memory is the storage; all else in it is its random state. So every trial gets a fresh sampler
whose seed is derived from the study's seed and from how many trials have finished, and a resumed study proposes what an
uninterrupted one would have. What this module does not know: the space, and what a trial does.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dapt_merge.errors import InputError, nearest

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import Trial

    from dapt_merge.study.config import SamplerConfig
    from dapt_merge.study.space import Choices, Range

# Optuna's default generation of 50 is plain random search for the budgets that scoring a language model allows.
_OUR_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"nsgaii": {"population_size": 10}, "nsgaiii": {"population_size": 10}}


def trial_seed(seed: int, ordinal: int) -> int:
    """Derive the seed of one trial: a function of the study's seed and the trial's place among the finished ones."""
    return int(np.random.SeedSequence([seed, ordinal]).generate_state(1)[0])


def sampler_for(config: SamplerConfig, ordinal: int, *, fixed: bool) -> BaseSampler:
    """Make the sampler of one trial.

    Args:
        config: the study's sampler section.
        ordinal: how many trials have finished before.
        fixed: whether the trial's point is given already (an end, an enqueued or a repeated point).

    Raises:
        InputError: an option that the sampler does not have.
    """
    from optuna import samplers

    seed = trial_seed(config.seed, ordinal)
    # A Sobol sequence moves on by one with every trial it sees, and must not for a point that it did not propose.
    if config.name in ("grid", "random") or (fixed and config.name == "qmc"):
        return samplers.RandomSampler(seed=seed)
    kinds = {
        "tpe": samplers.TPESampler,
        "nsgaii": samplers.NSGAIISampler,
        "nsgaiii": samplers.NSGAIIISampler,
        "gp": samplers.GPSampler,
        "qmc": samplers.QMCSampler,
    }
    options = {**_OUR_DEFAULTS.get(config.name, {}), **config.options}
    if config.name == "qmc":
        # The scrambling has to be one and the same over the whole sequence.
        options = {"scramble": True, "warn_independent_sampling": False, **options}
        seed = config.seed
    return _make(kinds[config.name], config.name, seed, options)


def check_sampler(config: SamplerConfig) -> None:
    """Raise InputError now for options that would fail at the first proposal."""
    if config.name in ("grid", "random") and config.options:
        raise InputError(f"the sampler {config.name} has no options", where="sampler.options", remedy="Remove them.")
    sampler_for(config, 0, fixed=False)


def _make(kind: Any, name: str, seed: int, options: Mapping[str, Any]) -> BaseSampler:
    known = [key for key in inspect.signature(kind).parameters if key != "seed"]
    for key in options:
        if key not in known:
            raise InputError(
                f"the sampler {name} has no option '{key}'.{nearest(key, known)}",
                where="sampler.options",
                remedy=f"Options of Optuna's {kind.__name__}: {', '.join(known)}.",
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(seed=seed, **options)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the sampler {name} refuses its options: {error}", where="sampler.options", remedy="Correct the value."
        ) from error


def suggest(trial: Trial, name: str, setting: Range | Choices) -> Any:
    """Ask Optuna for a value of a setting; one that has a single value is proposed too, so that every trial has it."""
    from dapt_merge.study.space import Choices

    if isinstance(setting, Choices):
        return trial.suggest_categorical(name, setting.options)
    values = setting.values()
    if values is None:
        return trial.suggest_float(name, setting.low, setting.high, log=setting.log)
    high = float(values[-1])
    # Rounding as in `Range.values`, so that a value proposed and a value written down are one recipe.
    return round(trial.suggest_float(name, setting.low, high, step=setting.step if high > setting.low else None), 12)
