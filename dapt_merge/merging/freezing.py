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


def freeze(
    jobs: Sequence[TensorJob], patterns: Sequence[str], owners: Sequence[tuple[str, str] | None]
) -> list[TensorJob]:
    """Return the jobs, with those of frozen tensors turned into copies.

    Args:
        jobs: all of the merge.
        patterns: see `is_frozen`.
        owners: for each job the checkpoint's label and tensor that it then is a copy of; None where there is no base.

    Raises:
        InputError: a pattern covers no tensor, together they leave none to merge, or a frozen tensor has no owner.
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
    return [_copied(job, owner, copied) if job.name in frozen else job for job, owner in zip(jobs, owners, strict=True)]


def _copied(job: TensorJob, owner: tuple[str, str] | None, copied: ResolvedParameters) -> TensorJob:
    if owner is None:
        raise InputError(
            f"'{job.name}' is frozen, and its slice has no base among its sources to take it from",
            where="freeze",
            remedy="Add the base with its layer_range to the slice's sources, or freeze less.",
        )
    label, name = owner
    return replace(job, base=None, models=(label,), target=None, parameters=copied, stored=(name,))
