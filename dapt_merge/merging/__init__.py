"""A recipe carried out: planned, streamed from disk to disk, or written into a live model.

Every way goes through `tensor.merge_tensor`, so that the bits do not depend on the way. The mathematics is in
`methods`, the meaning of a recipe in `recipe`; this package joins them with checkpoints.
"""

from dapt_merge.merging.api import LazyMerge, merge
from dapt_merge.merging.plan import MergePlan, TensorJob, plan_merge
from dapt_merge.merging.report import MergeReport
from dapt_merge.merging.resident import ResidentMerger
from dapt_merge.merging.stream import merge_to_disk
from dapt_merge.merging.tensor import MergedTensor, merge_tensor

__all__ = [
    "LazyMerge",
    "MergePlan",
    "MergeReport",
    "MergedTensor",
    "ResidentMerger",
    "TensorJob",
    "merge",
    "merge_tensor",
    "merge_to_disk",
    "plan_merge",
]
