"""A checkpoint: named tensors that are read one at a time, and identified by what they hold.

Opening costs headers only; `read` gives a view into the memory-mapped file (or the live tensor), never a copy. A head
tied to the embedding is one tensor, under the embedding's name; the head's name stays readable as an alias. Where the
tensors come from (`opening`) and what is done with them (`merging`) this module does not know.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import xxhash

from dapt_merge.checkpoints.groups import natural_order, tensor_group
from dapt_merge.checkpoints.threads import map_in_threads
from dapt_merge.errors import InputError, nearest
from dapt_merge.tensors.dtypes import Dtype
from dapt_merge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CheckpointSource: TypeAlias = "str | Path | Checkpoint | PreTrainedModel | Mapping[str, Tensor]"
Reader: TypeAlias = "Callable[[str], Tensor | StoredTensor]"


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor: nothing has been read yet.

    `file` is None for a tensor in memory. `stored_dtype` is the dtype that the model is kept in, where the tensor is
    computed in a wider one when it is read.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path | None = None
    stored_dtype: Dtype | None = None

    @property
    def elements(self) -> int:
        """How many numbers the tensor holds."""
        return self.nbytes // self.dtype.itemsize


class Checkpoint:
    """A lazily read model checkpoint; get one from `open_checkpoint`.

    Attributes:
        label: the name it has in errors and reports (the path, unless another was given).
        folder: where config.json and the tokenizer lie; None for a checkpoint in memory.
        config: the model configuration as plain data; empty when there is none.
        tensors: name → TensorInfo, in natural order (layer 2 before layer 10), each stored tensor once.
        aliases: name → name of the tensor that it is tied to.
        remarks: sentences on how it was opened, for the report of whatever is made of it.
        files: the weight files that every tensor is read from as it is stored; empty where some are computed, or lie in
            memory.
        num_layers: how many layers the stack has, or None when neither config nor names say; see `layers_of`.

    Example:
        >>> import torch
        >>> ones = {"w": torch.ones(2)}
        >>> checkpoint = Checkpoint("ones", ones.__getitem__, [TensorInfo("w", Dtype.FLOAT32, (2,), 8)])
        >>> checkpoint.read("w")
        tensor([1., 1.])
    """

    def __init__(
        self,
        label: str,
        reader: Reader,
        tensors: Iterable[TensorInfo],
        *,
        folder: Path | None = None,
        config: dict[str, Any] | None = None,
        aliases: Mapping[str, str] | None = None,
        remarks: Iterable[str] = (),
        files: Iterable[Path] = (),
        known_digest: Callable[[str], bytes | None] = lambda name: None,
    ) -> None:
        infos = {info.name: info for info in tensors}
        self.label = label
        self.folder = folder
        self.config: dict[str, Any] = config or {}
        self.tensors: Mapping[str, TensorInfo] = {name: infos[name] for name in natural_order(infos)}
        self.aliases: Mapping[str, str] = dict(aliases or {})
        self.num_layers = _num_layers(self.config, self.tensors)
        self._layers = _layers_by_stack(self.tensors)
        self.remarks = tuple(remarks)
        self.files = tuple(files)
        # The tensors that are computed from files whenever they are read; see `keeping`.
        self.computed: frozenset[str] = frozenset()
        # Set where embeddings were aligned: equal keys mean equal tokens in equal rows, whatever the files say.
        self.vocabulary_key: str | None = None
        # There too: own token id → its id now (None: the token is dropped), for those that changed.
        self.moved_ids: Mapping[int, int | None] = {}
        self._reader = reader
        self._known_digest = known_digest
        self._digests: dict[str, bytes] = {}

    def read(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype, on the CPU: a view that must not be written to.

        Raises:
            InputError: the checkpoint holds no such tensor.
        """
        return self.stored(name).tensor

    def stored(self, name: str) -> StoredTensor:
        """Return a tensor as `read` does, where it lies: torch is not needed for that, unless it is computed.

        Raises:
            InputError: the checkpoint holds no such tensor.
        """
        name = self.aliases.get(name, name)
        if name not in self.tensors:
            raise InputError(
                f"no tensor '{name}'.{nearest(name, tuple(self.tensors))}",
                where=self.label,
                remedy="Use a name that the checkpoint holds.",
            )
        stored = StoredTensor.of(self._reader(name))
        if name in self.computed and name not in self._digests:
            # Now that it is computed: asking for its hash must not compute it once more.
            self._digests[name] = tensor_digest(stored)
        return stored

    def layers_of(self, stack: str | None) -> int | None:
        """Return how many layers a stack has: "encoder" and "decoder" are counted apart, None is the only one."""
        return self._layers.get(stack, self.num_layers)

    def stored_as(self, name: str) -> StoredTensor:
        """Return what is stored under exactly this name: of a tied head, its own copy where there is one."""
        return StoredTensor.of(self._reader(name))

    def with_config(self, config: dict[str, Any]) -> Checkpoint:
        """Return the same tensors with another configuration."""
        changed = copy.copy(self)
        changed.config = config
        return changed

    def with_reader(self, reader: Reader) -> Checkpoint:
        """Return the same tensors, read in another way."""
        changed = copy.copy(self)
        changed._reader = reader
        return changed

    def digest(self, name: str) -> bytes:
        """Return the 128-bit hash of a tensor's bytes. For files it is remembered; tensors in memory may change."""
        found = self._digests.get(name) or self._known_digest(name)
        if found is None:
            found = tensor_digest(self.stored(name))
            if self.tensors[name].file is not None:
                self._digests[name] = found
        return found

    def remember_digest(self, name: str, digest: bytes) -> None:
        """Take the hash of a tensor's bytes from whoever computed it earlier, of the same files."""
        self._digests[name] = digest

    def fingerprint(self) -> str:
        """Return `"xxh3:<32 hex digits>"` of the content: names, dtypes, shapes and bytes, whatever the shards.

        A tied head counts once, so storing a copy of it changes nothing.
        """
        names = list(self.tensors)
        digests = map_in_threads(self.digest, names, size=lambda name: self.tensors[name].nbytes)
        infos = self.tensors.values()
        return content_fingerprint((i.name, i.dtype, i.shape, d) for i, d in zip(infos, digests, strict=True))

    @property
    def nbytes(self) -> int:
        """The size of all tensors, each counted once."""
        return sum(info.nbytes for info in self.tensors.values())

    def __repr__(self) -> str:
        return f"Checkpoint({self.label!r}, {len(self.tensors)} tensors, {self.nbytes} bytes)"


def tensor_digest(tensor: Tensor | StoredTensor) -> bytes:
    """Return the XXH3 128-bit digest of a tensor's bytes, in row-major order."""
    return xxhash.xxh3_128(StoredTensor.of(tensor).memory).digest()


def content_fingerprint(rows: Iterable[tuple[str, Dtype, tuple[int, ...], bytes]]) -> str:
    """Combine (name, dtype, shape, digest of the bytes) of every tensor into one fingerprint, in any order."""
    total = xxhash.xxh3_128()
    for name, dtype, shape, digest in sorted(rows, key=lambda row: row[0]):
        total.update(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode())
        total.update(digest)
    return f"xxh3:{total.hexdigest()}"


def config_value(config: Mapping[str, Any], *keys: str) -> Any:
    """Return the first of the keys that the configuration, or its nested text model, states; else None."""
    text = config.get("text_config")
    places = [config, text] if isinstance(text, Mapping) else [config]
    return next((place[key] for place in places for key in keys if place.get(key) is not None), None)


def _num_layers(config: Mapping[str, Any], names: Iterable[str]) -> int | None:
    stated = config_value(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if isinstance(stated, int):
        return stated
    layers = [layer for layer in (tensor_group(name).layer for name in names) if layer is not None]
    return max(layers) + 1 if layers else None


def _layers_by_stack(names: Iterable[str]) -> dict[str | None, int]:
    counts: dict[str | None, int] = {}
    for group in map(tensor_group, names):
        if group.stack is not None and group.layer is not None:
            counts[group.stack] = max(counts.get(group.stack, 0), group.layer + 1)
    return counts
