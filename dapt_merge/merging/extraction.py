"""A merged model written as a LoRA adapter on its base: each linear layer's difference, cut to its largest directions.

For a matrix with task vector δ = W − W₀ the best product of rank r (Eckart–Young) is U_r·S_r·V_rᵀ; a randomised SVD
(arXiv 0909.4061) finds it without the full decomposition, and the report says how much of ‖δ‖² it keeps. What is no
matrix of attention or MLP (embeddings, norms, biases, heads) a product cannot hold: it is kept whole or left out, as
asked, and the report names it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from dapt_merge.atomic import atomic_folder, refuse_existing
from dapt_merge.checkpoints.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRANSPOSING_TYPES
from dapt_merge.checkpoints.checkpoint import Checkpoint
from dapt_merge.checkpoints.groups import tensor_group
from dapt_merge.checkpoints.threads import map_in_threads
from dapt_merge.checkpoints.tying import with_own_heads
from dapt_merge.errors import InputError
from dapt_merge.merging.agreement import agree
from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

# Directions computed beyond the rank, and passes over the matrix: they make the first `rank` of them exact enough.
_EXTRA_DIRECTIONS = 8
_PASSES = 4


@dataclass(frozen=True)
class LayerEnergy:
    """How much of one matrix's difference an adapter keeps: `kept` is 1 − ‖δ − B·A‖² / ‖δ‖²."""

    name: str
    layer: int | None
    kind: str
    rank: int
    norm: float
    kept: float


@dataclass(frozen=True)
class Extraction:
    """The account of one extraction.

    Attributes:
        base, merged: what was compared.
        rank: asked for; a matrix with a smaller side has that side's.
        kept: share of the squared norm of all differences, of those left out too, that the adapter keeps.
        matrices: one entry for each matrix in the adapter.
        whole: tensors kept whole.
        left_out: tensor → norm of its difference, for what differs and is not in the adapter.
        bytes_written: size of the adapter's weights.
        seconds: wall time.
    """

    base: str
    merged: str
    rank: int
    kept: float
    matrices: tuple[LayerEnergy, ...]
    whole: tuple[str, ...]
    left_out: dict[str, float]
    bytes_written: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the account as JSON-ready data."""
        shares = {"kept_of_matrices": self.kept_of_matrices, "left_out_share": self.left_out_share}
        return {**asdict(self), **shares}

    @property
    def kept_of_matrices(self) -> float:
        """Share of the squared norm of the adapted matrices' differences that is kept; 1 where there are none."""
        return _kept(self.matrices) if self.matrices else 1.0

    @property
    def left_out_share(self) -> float:
        """Share of the squared norm of all differences that lies in the tensors left out."""
        lost = math.fsum(norm**2 for norm in self.left_out.values())
        adapted = math.fsum(matrix.norm**2 * (1 - matrix.kept) for matrix in self.matrices)
        return lost * (1 - self.kept) / (lost + adapted) if lost else 0.0

    def by_layer(self) -> dict[int | None, float]:
        """Return layer → share of the squared norm of its matrices' differences that is kept."""
        layers: dict[int | None, list[LayerEnergy]] = {}
        for matrix in self.matrices:
            layers.setdefault(matrix.layer, []).append(matrix)
        return {layer: _kept(rows) for layer, rows in layers.items()}


def extract_lora(
    base: Checkpoint,
    merged: Checkpoint,
    out: str | Path,
    *,
    rank: int = 16,
    seed: int = 0,
    keep_whole: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Extraction:
    """Write the difference of two models of one architecture as a peft adapter folder.

    Args:
        base: the model that the adapter will stand on.
        merged: the model that base and adapter approximate.
        out: the folder to create.
        rank: directions kept of each matrix.
        seed: of the randomised SVD; the same seed gives the same bytes.
        keep_whole: store what is no matrix of attention or MLP, and differs, whole (peft's modules_to_save).
        overwrite: replace an existing output.
        on_progress: called with (elements compared, elements in all).

    Raises:
        InputError: the rank is below 1, the models do not belong together, do not differ, or `out` exists.
    """
    started = time.monotonic()
    refuse_existing(out, overwrite)
    if rank < 1:
        raise InputError(f"the rank is {rank}; it must be 1 or more", where="rank", remedy="Give for example 16.")
    base, merged = with_own_heads({"base": base, "merged": merged}).values()
    names = agree([base, merged]).names
    # One thread: the random numbers are torch's global ones, and sums over several cores would round differently.
    pieces = map_in_threads(
        lambda name: _piece(base, merged, name, rank, seed, keep_whole),
        names,
        lambda name: base.tensors[name].elements,
        threads=1,
        on_progress=on_progress,
    )
    found = [piece for piece in pieces if piece.norm > 0]
    if not found:
        raise InputError(
            "the two models hold the same weights: there is nothing to extract",
            where=merged.label,
            remedy="Name the base first, and the merged model second.",
        )
    tensors = {key: tensor for piece in found for key, tensor in piece.tensors.items()}
    report = _report(base, merged, rank, found, tensors, time.monotonic() - started)
    with atomic_folder(out, overwrite=overwrite) as folder:
        _write(folder, base, rank, found, tensors)
    return report


@dataclass(frozen=True)
class _Piece:
    name: str
    norm: float
    tensors: Mapping[str, Tensor]
    energy: LayerEnergy | None = None


def _piece(base: Checkpoint, merged: Checkpoint, name: str, rank: int, seed: int, keep_whole: bool) -> _Piece:
    changed = merged.read(name)
    if not changed.is_floating_point():
        return _Piece(name, 0.0, {})
    delta = changed.float() - base.read(name).float()
    norm = float(delta.double().norm())
    key = f"base_model.model.{name.removesuffix('.weight')}"
    if norm == 0 or not _is_linear(name, delta):
        return _Piece(name, norm, {f"base_model.model.{name}": changed.clone()} if norm and keep_whole else {})
    oriented = delta.T if base.config.get("model_type") in TRANSPOSING_TYPES else delta
    down, up = low_rank(oriented, rank, seed=xxhash.xxh3_64_intdigest(name.encode(), seed=seed) >> 1)
    lost = float((oriented.double() - up.double() @ down.double()).square().sum())
    group = tensor_group(name)
    energy = LayerEnergy(name, group.layer, group.kind, down.shape[0], norm, max(0.0, 1 - lost / norm**2))
    return _Piece(name, norm, {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, energy)


def _is_linear(name: str, tensor: Tensor) -> bool:
    in_a_layer = tensor_group(name).kind in ("attention", "mlp") and tensor_group(name).layer is not None
    # T5's table of distances is a matrix in attention, and an embedding all the same.
    return in_a_layer and tensor.dim() == 2 and name.endswith(".weight") and "relative_attention_bias" not in name


def low_rank(delta: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return (A, B) of rank at most `rank` whose product B·A is nearest to a float32 matrix, found at random.

    Example:
        >>> down, up = low_rank(torch.ones(3, 2), 1)
        >>> torch.allclose(up @ down, torch.ones(3, 2))
        True
    """
    rank = min(rank, *delta.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, values, right = torch.svd_lowrank(delta, q=min(rank + _EXTRA_DIRECTIONS, *delta.shape), niter=_PASSES)
    root = values[:rank].sqrt()
    return (root[:, None] * right[:, :rank].T).contiguous(), (left[:, :rank] * root).contiguous()


def _report(
    base: Checkpoint, merged: Checkpoint, rank: int, found: Sequence[_Piece], tensors: Mapping[str, Tensor], took: float
) -> Extraction:
    matrices = tuple(piece.energy for piece in found if piece.energy is not None)
    whole = tuple(piece.name for piece in found if piece.energy is None and piece.tensors)
    left_out = {piece.name: piece.norm for piece in found if not piece.tensors}
    kept = sum(m.kept * m.norm**2 for m in matrices) + sum(piece.norm**2 for piece in found if piece.name in whole)
    return Extraction(
        base=base.label,
        merged=merged.label,
        rank=rank,
        kept=kept / sum(piece.norm**2 for piece in found),
        matrices=matrices,
        whole=whole,
        left_out=left_out,
        bytes_written=sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()),
        seconds=took,
    )


def _kept(rows: Sequence[LayerEnergy]) -> float:
    return sum(row.kept * row.norm**2 for row in rows) / math.fsum(row.norm**2 for row in rows)


def _write(folder: Path, base: Checkpoint, rank: int, found: Sequence[_Piece], tensors: Mapping[str, Tensor]) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    ranks = {_module(piece.name): piece.energy.rank for piece in found if piece.energy is not None}
    smaller = {module: found_rank for module, found_rank in ranks.items() if found_rank != rank}
    whole = sorted({_module(piece.name) for piece in found if piece.energy is None and piece.tensors})
    LoraConfig(
        r=rank,
        lora_alpha=rank,  # s = 1: the product is the difference itself
        target_modules=sorted(ranks),
        rank_pattern=smaller,
        alpha_pattern=smaller,
        modules_to_save=whole or None,
        fan_in_fan_out=base.config.get("model_type") in TRANSPOSING_TYPES,
        base_model_name_or_path=base.label,
        task_type=_task_type(base),
        inference_mode=True,
    ).save_pretrained(folder)
    save_file(dict(tensors), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    # safetensors keeps its file for its owner alone; whoever may read the settings may read the weights.
    (folder / ADAPTER_WEIGHTS).chmod((folder / ADAPTER_CONFIG).stat().st_mode)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _task_type(base: Checkpoint) -> str | None:
    architecture = str((base.config.get("architectures") or [""])[0])
    endings = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
    }
    return next((task for ending, task in endings.items() if architecture.endswith(ending)), None)
