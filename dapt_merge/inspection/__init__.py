"""What a DAPT run did to a base, tensor by tensor, before anything is merged: the task vector looked at.

Measurements of tensors in `measures` and `rank`, of whole checkpoints in `comparison`. This package merges nothing,
draws nothing and judges nothing.
"""

from dapt_merge.inspection.comparison import Comparison, Inspection, Place, Summary, TensorMeasures, inspect_checkpoints
from dapt_merge.inspection.measures import Difference, SignAgreement, UpdateRounding
from dapt_merge.inspection.rank import effective_rank

__all__ = [
    "Comparison",
    "Difference",
    "Inspection",
    "Place",
    "SignAgreement",
    "Summary",
    "TensorMeasures",
    "UpdateRounding",
    "effective_rank",
    "inspect_checkpoints",
]
