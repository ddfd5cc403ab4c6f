"""Checkpoints of which some tie their head to the embedding and others have trained a head of its own.

The idea: a tied head is the embedding, so a tied checkpoint can be read as one with a head: the embedding under a
second name. Then both kinds have the same tensors, and the merge has a head of its own. Where every stored head is a
mere copy of its embedding nothing is done here; that merge stays tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dapt_merge.checkpoints.checkpoint import Checkpoint
from dapt_merge.checkpoints.groups import embedding_and_head
from dapt_merge.tensors.stored import StoredTensor


def with_own_heads(checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Return the checkpoints, the tied ones with a head where another one's head is not its embedding.

    Example:
        >>> import torch
        >>> from dapt_merge.checkpoints import open_checkpoint
        >>> table = {"embed_tokens.weight": torch.ones(2, 2)}
        >>> own = open_checkpoint(table | {"lm_head.weight": torch.zeros(2, 2)})
        >>> list(with_own_heads({"tied": open_checkpoint(table), "own": own})["tied"].tensors)
        ['embed_tokens.weight', 'lm_head.weight']
    """
    pairs = {key: embedding_and_head(checkpoint.tensors) for key, checkpoint in checkpoints.items()}
    tied = {key: embedding for key, (embedding, head) in pairs.items() if embedding and not head}
    apart = next(
        (
            (head, checkpoints[key].label)
            for key, (embedding, head) in pairs.items()
            if tied and embedding and head and not same_bytes(checkpoints[key], embedding, head)
        ),
        None,
    )
    if apart is None:
        return dict(checkpoints)
    return {
        key: UntiedCheckpoint(checkpoint, tied[key], *apart) if key in tied else checkpoint
        for key, checkpoint in checkpoints.items()
    }


def same_bytes(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Say whether two tensors of a checkpoint are stored with the same bytes, or are one."""
    first, second = checkpoint.stored_as(one), checkpoint.stored_as(other)
    return first.is_same_as(second)


class UntiedCheckpoint(Checkpoint):
    """A checkpoint whose tied head is a tensor of its own name; its content and fingerprint are those of the tied one.

    Args:
        own: the checkpoint.
        embedding: the table that its head is tied to.
        head: the name that the head gets.
        because: the label of the checkpoint that has a head of its own.
    """

    def __init__(self, own: Checkpoint, embedding: str, head: str, because: str) -> None:
        self._own, self._second = own, {head: embedding}
        remark = f"{head} is tied to the embedding in {own.label} and not in {because}: the merge has a head of its own"
        super().__init__(
            own.label,
            self._read,
            [*own.tensors.values(), replace(own.tensors[embedding], name=head)],
            folder=own.folder,
            config={**own.config, "tie_word_embeddings": False} if own.config else {},
            aliases={name: owner for name, owner in own.aliases.items() if name != head},
            remarks=(*own.remarks, remark),
        )
        self.vocabulary_key, self.moved_ids, self.computed = own.vocabulary_key, own.moved_ids, own.computed

    def digest(self, name: str) -> bytes:
        """Return the hash of the tensor's bytes."""
        return self._own.digest(self._second.get(name, name))

    def fingerprint(self) -> str:
        """Return the fingerprint of the content, in which a tied head counts once."""
        return self._own.fingerprint()

    def _read(self, name: str) -> StoredTensor:
        return self._own.stored(self._second.get(name, name))
