"""Continued pre-training (DAPT): a corpus and a base model in, a row of checkpoints out.

The loop itself belongs to `transformers.Trainer`; what is ours is the precision, the safeguards, the checkpoints and
the way back after a kill. Texts become rows of tokens in `corpus`, held-out texts are scored by `evaluation`; merging
is not known here.
"""

from dapt_merge.pretraining.config import PretrainConfig, load_pretrain_config
from dapt_merge.pretraining.training import RunPaused, pretrain

__all__ = ["PretrainConfig", "RunPaused", "load_pretrain_config", "pretrain"]
