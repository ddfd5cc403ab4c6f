"""Checkpoints as they lie on the disk or in memory: opened lazily, identified by content, written in shards.

Nothing here knows recipes, merge methods or scores: a checkpoint is a set of named tensors and the configuration and
tokenizer files beside them.
"""

from dapt_merge.checkpoints.checkpoint import Checkpoint, CheckpointSource, TensorInfo
from dapt_merge.checkpoints.companions import copy_companions
from dapt_merge.checkpoints.groups import TensorGroup, tensor_group
from dapt_merge.checkpoints.opening import open_checkpoint
from dapt_merge.checkpoints.writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointSource",
    "CheckpointWriter",
    "TensorGroup",
    "TensorInfo",
    "copy_companions",
    "open_checkpoint",
    "tensor_group",
]
