"""Continued pre-training (DAPT): a corpus and a base model in, a row of checkpoints out.

The loop itself belongs to `transformers.Trainer`; what is ours is the data path, the precision, the checkpoints and
the way back after a kill. Merging and scores are not known here.
"""

from dapt_merge.pretraining.config import CorpusSource, PretrainConfig, load_pretrain_config
from dapt_merge.pretraining.training import pretrain

__all__ = ["CorpusSource", "PretrainConfig", "load_pretrain_config", "pretrain"]
