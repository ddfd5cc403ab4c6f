"""A statistics file: safetensors, one float32 tensor for each tensor of the model that the pass has numbers on.

The header says of which kind the numbers are, of which weights, and from which text, so that a file is not taken for
another; tensors that share their numbers are stored once. What this module does not know: how the numbers are
collected, and what merges do with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dapt_merge.atomic import atomic_file
from dapt_merge.checkpoints.files import MappedFile
from dapt_merge.errors import InputError
from dapt_merge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "dapt-merge statistics 1"
KINDS = {
    "fisher": "the diagonal of the empirical Fisher information: squared gradients, per token",
    "gram": "the Gram matrix XᵀX of the inputs of each linear layer, per token",
}


@dataclass(frozen=True)
class Statistics:
    """An open statistics file; tensors are read when asked for.

    Attributes:
        path: the file.
        kind: "fisher" or "gram".
        model: the content fingerprint of the weights that it was collected from.
        about: everything that the header says.
        shapes: tensor name → shape.
        places: tensor name → the name that its numbers are stored under.
    """

    path: Path
    kind: str
    model: str
    about: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, str]
    _file: MappedFile = field(repr=False)

    def stored(self, name: str) -> StoredTensor:
        """Return what is kept for a tensor: float32, a view into the file that must not be written to."""
        return self._file.stored(self.places[name])


def open_statistics(path: str | Path, kind: str) -> Statistics:
    """Open a file of one kind; only its header is read.

    Raises:
        InputError: there is no such file, it is not a statistics file, or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path).expanduser()
    remedy = f"Make it: dapt-merge statistics MODEL --corpus FILE --kind {kind} -o {path.name}."
    if not path.is_file():
        raise InputError(f"there is no such statistics file ({kind})", where=path, remedy=remedy)
    try:
        with safe_open(path, framework="np") as handle:
            about = handle.metadata() or {}
        file = MappedFile(path)
        shapes = {info.name: info.shape for info in file.tensors}
        shared = json.loads(about.get("shared", "{}"))
        places = {name: name for name in shapes} | {name: owner for name, owner in shared.items() if owner in shapes}
        shapes = {name: shapes[owner] for name, owner in places.items()}
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"the file is truncated or not safetensors ({error})", where=path, remedy=remedy) from error
    if about.get("format") != FORMAT:
        raise InputError("this safetensors file holds no statistics", where=path, remedy=remedy)
    if about.get("kind") != kind:
        raise InputError(f"the file holds '{about.get('kind')}', expected '{kind}'", where=path, remedy=remedy)
    return Statistics(path, kind, about.get("model", ""), about, shapes, places, file)


def write_statistics(
    tensors: Mapping[str, Tensor], about: Mapping[str, str], out: str | Path, *, overwrite: bool = False
) -> None:
    """Write a statistics file, whole or not at all.

    Raises:
        InputError: `out` exists and may not be replaced, or cannot be written.
    """
    from safetensors.torch import save_file

    owners: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, tensor in tensors.items():
        owner = owners.setdefault(id(tensor), name)
        if owner != name:
            shared[name] = owner
    header = {**about, "format": FORMAT} | ({"shared": json.dumps(shared)} if shared else {})
    with atomic_file(out, overwrite=overwrite) as temporary:
        kept = {name: tensor.contiguous() for name, tensor in tensors.items() if name not in shared}
        save_file(kept, temporary, header)


def write_unfinished(path: Path, key: str, sums: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
    """Keep the sums of a pass that goes on, whole or not at all."""
    from safetensors.torch import save_file

    header = {"key": key, "counts": json.dumps(dict(counts))}
    with atomic_file(path) as temporary:
        save_file({name: total.cpu().contiguous() for name, total in sums.items()}, temporary, header)


def read_unfinished(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, int]] | None:
    """Return the sums and counts that the same pass kept; None when there are none, or they are another's."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            header = handle.metadata() or {}
            if header.get("key") != key:
                return None
            return {name: handle.get_tensor(name) for name in handle.keys()}, json.loads(header["counts"])  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
