"""Tensors that a recipe keeps out of the merge: they stay the base's, or the target's where there is one.

A pattern is a group's name (`embedding`), or a part of tensor names in which * stands for anything (`layers.0.`,
`layers.*.mlp`). What this module does not know: how tensors are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from dapt_merge.checkpoints.groups import GROUPS, tensor_group
from dapt_merge.errors import InputError, nearest
from dapt_merge.merging.plan import TensorJob
from dapt_merge.methods.registry import get_method
from dapt_merge.recipe import ResolvedParameters


def is_frozen(name: str, pattern: str) -> bool:
    """Say whether a pattern of `freeze:` covers a tensor.

    Example:
        >>> is_frozen("lm_head.weight", "head"), is_frozen("model.layers.12.mlp.up_proj.weight", "layers.1.")
        (True, False)
    """
    if pattern in GROUPS:
        return tensor_group(name).kind == pattern
    return fnmatchcase(name, f"*{pattern}*")


def freeze(jobs: Sequence[TensorJob], patterns: Sequence[str], owner: str) -> list[TensorJob]:
    """Return the jobs, with those of frozen tensors turned into copies from the checkpoint `owner`.

    Raises:
        InputError: a pattern covers no tensor, or together they leave none to merge.
    """
    for index, pattern in enumerate(patterns):
        if not any(is_frozen(job.name, pattern) for job in jobs):
            raise InputError(
                f"'{pattern}' covers no tensor.{nearest(pattern, [*GROUPS, *(job.name for job in jobs)])}",
                where=f"freeze.{index}",
                remedy=f"Name a group ({', '.join(GROUPS)}) or a part of tensor names.",
            )
    copied = ResolvedParameters(get_method("passthrough"), {"scale": (1.0,)})
    frozen = {job.name for job in jobs if any(is_frozen(job.name, pattern) for pattern in patterns)}
    if len(frozen) == len(jobs):
        raise InputError(
            "every tensor is frozen, so nothing is merged", where="freeze", remedy="Leave some tensors to merge."
        )
    return [
        replace(job, base=None, models=(owner,), target=None, parameters=copied) if job.name in frozen else job
        for job in jobs
    ]
