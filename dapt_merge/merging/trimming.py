"""Thresholds that only the whole model can give: `trim_scope: model`.

A method that trims each task vector as one long vector needs to know, before the first tensor is merged, which
magnitude the density share ends at. One pass over the inputs finds it, in one arithmetic for all tensors, so that their
magnitudes compare. How a method uses it, this module does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dapt_merge.errors import InputError
from dapt_merge.merging.plan import MergePlan, TensorJob
from dapt_merge.methods.contract import TensorContext
from dapt_merge.methods.pieces import Operands, arithmetic_dtype, dtypes_of
from dapt_merge.methods.ties import model_cutoffs
from dapt_merge.tensors.dtypes import Dtype


def settle_cutoffs(plan: MergePlan) -> MergePlan:
    """Return the plan with the thresholds of the whole model in its jobs; unchanged where no job asks for them.

    Raises:
        InputError: trimming over the whole model was asked for, with different densities in different tensors.
    """
    asking = [job for job in plan.jobs if _trims_over_the_model(job)]
    if not asking:
        return plan
    densities: set[tuple[float, ...]] = {_densities(job) for job in asking}
    if len(densities) > 1:
        raise InputError(
            f"trim_scope is 'model', but the density differs between tensors: {sorted(densities)[:2]}",
            where="parameters.density",
            remedy="Give one density for the whole model, or use trim_scope: tensor.",
        )
    operands = [_operands(plan, job) for job in asking]
    arithmetic = _widest(operands, asking)
    found = model_cutoffs([replace(each, arithmetic=arithmetic) for each in operands], next(iter(densities)))
    settled = {
        job.name: replace(job, cutoffs=row, arithmetic=arithmetic) for job, row in zip(asking, found, strict=True)
    }
    return replace(plan, jobs=tuple(settled.get(job.name, job) for job in plan.jobs))


def _widest(operands: Sequence[Operands], jobs: Sequence[TensorJob]) -> Dtype:
    """Return float64 where any of the tensors is merged in it, else float32."""
    for each, job in zip(operands, jobs, strict=True):
        if (job.arithmetic or arithmetic_dtype(dtypes_of(each.base, *each.models), job.out_dtype)) == Dtype.FLOAT64:
            return Dtype.FLOAT64
    return Dtype.FLOAT32


def _trims_over_the_model(job: TensorJob) -> bool:
    return job.out_dtype.is_floating_point and job.parameters.values.get("trim_scope") == "model"


def _operands(plan: MergePlan, job: TensorJob) -> Operands:
    assert job.base is not None
    context = TensorContext(job.name, base_label=job.base, model_labels=job.models)
    base, models = job.inputs(plan.read)
    return Operands(base, tuple(models), context)


def _densities(job: TensorJob) -> tuple[float, ...]:
    per_model = job.parameters.values["density"]
    assert isinstance(per_model, tuple)
    return per_model
