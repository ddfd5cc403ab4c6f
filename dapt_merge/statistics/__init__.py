"""What a model makes of held-out text, kept for merges that weigh models by it: Fisher information, Gram matrices.

`collecting` runs the model over the text, `files` knows the format of what is kept. Which method uses the numbers, and
how, this package does not know. (Statistics of scores are in `evaluation.statistics`.)
"""

from dapt_merge.statistics.files import Statistics, open_statistics

__all__ = ["Statistics", "open_statistics"]
