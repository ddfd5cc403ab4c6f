"""A LoRA adapter and its base, read as the full model that they stand for.

The idea: an adapter changes few tensors, each by a product of two thin matrices, so the adapted tensor is computed when
it is read and never kept:

    W' = W + s·B·A          s = alpha / r, or alpha / √r (rsLoRA)                                   (arXiv 2106.09685)
    W' = m · (W + s·B·A) / ‖W + s·B·A‖   norms over each output's inputs, m the magnitude (DoRA)    (arXiv 2402.09353)

The arithmetic is in float64, rounded once to float32 (of a float64 base: not at all), so that no kernel's order of
summation shows. What this module does not know: recipes, and adapters of other kinds than LoRA, which it refuses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapt_merge.checkpoints.checkpoint import Checkpoint, TensorInfo
from dapt_merge.checkpoints.files import MappedFile, read_json
from dapt_merge.checkpoints.groups import embedding_and_head
from dapt_merge.checkpoints.hub import looks_like_hub_id
from dapt_merge.checkpoints.naming import canonical_names
from dapt_merge.checkpoints.vocabulary import has_tokenizer
from dapt_merge.errors import InputError, nearest
from dapt_merge.tensors.dtypes import at_least_float32
from dapt_merge.tensors.lazy_torch import torch
from dapt_merge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# Settings that change what the stored matrices mean; an adapter that uses one is refused by its name.
_UNSUPPORTED = (
    "layer_replication",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
)
# Initialisations that subtract from the base's own weights, which then are not those of the base checkpoint.
_CHANGES_THE_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)
TRANSPOSING_TYPES = ("gpt2", "openai-gpt")  # their Conv1D stores (in, out) where Linear stores (out, in)
_KEY = re.compile(
    r"^(?P<module>.+?)\.(?P<part>lora_embedding_A|lora_embedding_B|lora_A|lora_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)\w+)?(?:\.(?P<leaf>weight|bias))?$"
)
_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
_CHUNK_ELEMENTS = 1 << 20


@dataclass
class _Change:
    """What an adapter does to one tensor; the strings are keys of the adapter's file."""

    replaced_by: str | None = None
    down: str | None = None  # A: rank × in
    up: str | None = None  # B: out × rank
    magnitude: str | None = None
    bias: str | None = None
    rows: str | None = None
    row_indices: list[int] = field(default_factory=list)
    scaling: float = 1.0
    transposed: bool = False


class Adapter:
    """A peft LoRA folder, opened: its settings, and its tensors' headers.

    Raises:
        InputError: no safetensors weights, pickled ones, another kind than LoRA, or a setting that is not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / ADAPTER_CONFIG)
        _refuse_unsupported(self.config, folder / ADAPTER_CONFIG)
        file = folder / ADAPTER_WEIGHTS
        if not file.is_file():
            raise _no_adapter_weights(folder)
        self._file = MappedFile(file)
        self.tensors = {info.name: info for info in self._file.tensors}

    def read(self, key: str) -> Tensor:
        """Return a stored tensor of the adapter."""
        return self._file.stored(key).tensor

    @property
    def base_name(self) -> str | None:
        """The model that it says it was trained on: a path, or a hub id with the revision where it states one."""
        name, revision = self.config.get("base_model_name_or_path"), self.config.get("revision")
        if not isinstance(name, str) or not name:
            return None
        dated = isinstance(revision, str) and revision and not Path(name).exists() and "@" not in name
        return f"{name}@{revision}" if dated and looks_like_hub_id(name) else name


def is_adapter_folder(folder: Path) -> bool:
    """Say whether a folder holds a peft adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def apply_adapter(base: Checkpoint, adapter: Adapter, label: str) -> Checkpoint:
    """Return the full model that a base and an adapter stand for; nothing is computed until a tensor is read.

    Adapted tensors are float32, or float64 of a base that is; `TensorInfo.stored_dtype` keeps the dtype of the base.

    Raises:
        InputError: the adapter changes a tensor that the base does not have, or of another shape.
    """
    changes = _changes(base, adapter)
    config = dict(base.config)
    aliases = {name: owner for name, owner in base.aliases.items() if name not in changes}
    _, head = embedding_and_head(changes)
    if len(aliases) < len(base.aliases) or (head is not None and head not in base.tensors):
        # A head that the adapter changes is tied no longer; an embedding that it changes takes its tied head along.
        config["tie_word_embeddings"] = False
    untied = {n: replace(base.tensors[owner], name=n) for n, owner in base.aliases.items() if n in changes}
    stored = {**base.tensors, **untied}
    infos = {name: info for name, info in stored.items() if name not in changes}
    infos |= {name: _adapted_info(name, change, stored.get(name), adapter) for name, change in changes.items()}
    embedding, _ = embedding_and_head(infos)
    if embedding is not None and "vocab_size" in config:
        config["vocab_size"] = infos[embedding].shape[0]

    def read(name: str) -> Tensor | StoredTensor:
        change = changes.get(name)
        if change is None:
            return base.stored_as(name)
        weight = base.read(name) if change.replaced_by is None else adapter.read(change.replaced_by)
        return _adapted(weight, change, adapter)

    folder = adapter.folder if has_tokenizer(adapter.folder) else base.folder
    remarks = (*base.remarks, *_remarks(base, adapter))
    made = Checkpoint(label, read, infos.values(), folder=folder, config=config, aliases=aliases, remarks=remarks)
    made.computed = frozenset(name for name in changes if infos[name].file is not None)
    return made


def _remarks(base: Checkpoint, adapter: Adapter) -> list[str]:
    stated = adapter.base_name
    if stated is None or Path(stated).name == Path(base.label).name:
        return []
    return [f"the adapter {adapter.folder} names {stated} as its base; it was applied to {base.label}"]


def _adapted(weight: Tensor, change: _Change, adapter: Adapter) -> Tensor:
    if change.down is not None and change.up is not None:
        magnitude = None if change.magnitude is None else adapter.read(change.magnitude)
        down, up = adapter.read(change.down), adapter.read(change.up)
        weight = adapted_weight(weight, down, up, change.scaling, magnitude, transposed=change.transposed)
    if change.bias is not None:
        weight = (weight.double() + change.scaling * adapter.read(change.bias).double()).to(
            at_least_float32(weight.dtype).torch_dtype
        )
    if change.rows is not None:
        rows = torch.tensor(change.row_indices)
        wide = weight.to(at_least_float32(weight.dtype).torch_dtype)
        weight = wide.index_copy(0, rows, adapter.read(change.rows).to(wide.dtype))
    return weight


def adapted_weight(
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scaling: float,
    magnitude: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """Return W + s·B·A in float32 (of a float64 W in float64), or with a magnitude DoRA's rescaling of it.

    Args:
        weight: W, out × in; with `transposed` in × out.
        down: A, rank × in.
        up: B, out × rank.
        scaling: s.
        magnitude: m, one number for each output.
        transposed: W is stored in × out, as GPT-2's layers and embeddings are.

    Example:
        >>> adapted_weight(torch.eye(2), torch.ones(1, 2), torch.ones(2, 1), 0.5)
        tensor([[1.5000, 0.5000],
                [0.5000, 1.5000]])
    """
    result = torch.empty(weight.shape, dtype=at_least_float32(weight.dtype).torch_dtype)
    source, target = (weight.T, result.T) if transposed else (weight, result)
    down_exact = down.double()
    step = max(1, _CHUNK_ELEMENTS // max(1, source.shape[1]))
    for begin in range(0, source.shape[0], step):
        run = slice(begin, begin + step)
        moved = source[run].double() + scaling * (up[run].double() @ down_exact)
        if magnitude is not None:
            moved *= (magnitude[run].double() / moved.norm(dim=1))[:, None]
        target[run] = moved
    return result


# --- which tensors an adapter changes ---------------------------------------------------------------------------------


def _changes(base: Checkpoint, adapter: Adapter) -> dict[str, _Change]:
    """Sort the adapter's tensors under the names of the tensors that they change, and check their shapes."""
    changes: dict[str, _Change] = {}
    modules: dict[str, str] = {}
    plain = {key: key.removeprefix("base_model.model.") for key in adapter.tensors}
    targets = {key: _target(name) for key, name in plain.items()}
    named = canonical_names(dict.fromkeys(target for target, _ in targets.values()), base.config)
    for key, (target, part) in targets.items():
        change = changes.setdefault(named[target], _Change())
        setattr(change, part, key)
        modules[named[target]] = target.rpartition(".")[0]
    for name, change in changes.items():
        _settle(name, modules[name], change, base, adapter)
    # Stored second names of one parameter (BERT's decoder bias) are kept apart by no model class.
    return {name: change for name, change in changes.items() if not _repeats_its_owner(name, changes, base)}


def _target(name: str) -> tuple[str, str]:
    """Return (name of the tensor that is changed, field of `_Change`) for a stored name without its prefix."""
    found = _KEY.match(name)
    if found is not None:
        part, module = found["part"], found["module"]
        if part == "lora_B" and found["leaf"] == "bias":
            return f"{module}.bias", "bias"
        if part == "lora_magnitude_vector":
            return f"{module}.weight", "magnitude"
        return f"{module}.weight", "down" if part.endswith("_A") else "up"
    if name.endswith(_TOKEN_ROWS):
        return name.removesuffix(_TOKEN_ROWS) + ".weight", "rows"
    plain = name.replace(".base_layer.", ".")
    return re.sub(r"\.modules_to_save(?:\.\w+)?\.(weight|bias)$", r".\1", plain), "replaced_by"


def _settle(name: str, module: str, change: _Change, base: Checkpoint, adapter: Adapter) -> None:
    """Fill in scaling, orientation and rows, and refuse what does not fit the base."""
    info = base.tensors.get(base.aliases.get(name, name))
    where = adapter.folder / ADAPTER_WEIGHTS
    new_part = change.replaced_by is not None and _is_saved_module(module, adapter)
    if info is None and not new_part:
        raise InputError(
            f"the adapter changes '{name}', which {base.label} does not have.{nearest(name, tuple(base.tensors))}",
            where=where,
            remedy="Name the model that the adapter was trained on as its base.",
        )
    settings = adapter.config
    alpha = float(_by_pattern(settings, "alpha_pattern", module, settings.get("lora_alpha", 8)))
    if change.down is not None or change.up is not None:
        changed = info if change.replaced_by is None else adapter.tensors[change.replaced_by]
        assert changed is not None
        shape = changed.shape
        change.transposed = _check_low_rank(name, module, change, shape, base, adapter)
        assert change.down is not None
        rank = adapter.tensors[change.down].shape[0]
    else:
        rank = int(_by_pattern(settings, "rank_pattern", module, settings.get("r", 8)))
    change.scaling = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    if change.rows is not None:
        change.row_indices = _row_indices(settings, module, where)


def _check_low_rank(
    name: str, module: str, change: _Change, shape: tuple[int, ...], base: Checkpoint, adapter: Adapter
) -> bool:
    """Return whether the tensor is stored in × out; raise unless both matrices are there and fit it."""
    where = adapter.folder / ADAPTER_WEIGHTS
    if change.down is None or change.up is None:
        raise InputError(f"one of the two matrices for '{name}' is missing", where=where, remedy="Save it again.")
    down, up = adapter.tensors[change.down].shape, adapter.tensors[change.up].shape
    settings = adapter.config
    stated = _by_pattern(settings, "rank_pattern", module, settings.get("r", 8))
    product = (up[0], down[-1])
    flips = "lora_embedding_" in change.down
    if product[0] == product[1] and not flips:
        flips = bool(settings.get("fan_in_fan_out")) or base.config.get("model_type") in TRANSPOSING_TYPES
    elif not flips:
        flips = product != shape
    if len(down) != 2 or len(up) != 2 or (product[::-1] if flips else product) != shape:
        raise InputError(
            f"the adapter's matrices for '{name}' give {product}, and the tensor is {shape} in {base.label}",
            where=where,
            remedy="Name the model that the adapter was trained on as its base; only matrices can be adapted.",
        )
    if down[0] != up[1] or down[0] != stated:
        raise InputError(
            f"the rank for '{name}' is {stated} in {ADAPTER_CONFIG}, and {down[0]} and {up[1]} in its matrices",
            where=where,
            remedy="Copy the adapter again: its two files do not belong together.",
        )
    return flips


def _is_saved_module(module: str, adapter: Adapter) -> bool:
    """Say whether a module was trained whole; a head that the base lacks may come from there."""
    saved = adapter.config.get("modules_to_save") or ()
    return any(part in saved for part in module.split("."))


def _by_pattern(settings: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """Return the value of the first pattern that a module's name ends with, else the default."""
    patterns = settings.get(key) or {}
    return next((value for p, value in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), default)


def _row_indices(settings: Mapping[str, Any], module: str, where: Path) -> list[int]:
    stated = settings.get("trainable_token_indices")
    if isinstance(stated, Mapping):
        stated = next((rows for end, rows in stated.items() if module.endswith(end)), None)
    if not isinstance(stated, list):
        raise InputError(
            "the adapter has trained token rows, and its configuration does not say which",
            where=where,
            remedy="Merge it with peft: merge_and_unload, then save_pretrained.",
        )
    return [int(row) for row in stated]


def _adapted_info(name: str, change: _Change, stored: TensorInfo | None, adapter: Adapter) -> TensorInfo:
    source = stored if change.replaced_by is None else adapter.tensors[change.replaced_by]
    assert source is not None
    kept_as = source.dtype if stored is None else stored.dtype
    computed = change.down is not None or change.bias is not None or change.rows is not None
    dtype = at_least_float32(source.dtype) if computed else source.dtype
    file = None if stored is not None and stored.file is None else adapter.folder / ADAPTER_WEIGHTS
    return TensorInfo(name, dtype, source.shape, math.prod(source.shape) * dtype.itemsize, file, kept_as)


def _repeats_its_owner(name: str, changes: Mapping[str, _Change], base: Checkpoint) -> bool:
    owner = base.aliases.get(name)
    return owner is not None and name.endswith(".bias") and owner in changes


# --- refusals ---------------------------------------------------------------------------------------------------------


def _refuse_unsupported(config: Mapping[str, Any], where: Path) -> None:
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2]
    remedy = "Merge it into a full model with peft first: merge_and_unload, then save_pretrained."
    if kind != "LORA":
        raise InputError(f"the adapter is of kind {kind}; LoRA and DoRA can be read", where=where, remedy=remedy)
    for key in _UNSUPPORTED:
        if config.get(key):
            raise InputError(f"the adapter uses '{key}', which is not supported", where=where, remedy=remedy)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and _CHANGES_THE_BASE.search(start):
        raise InputError(
            f"the adapter began as '{start}', which changes the base's own weights too", where=where, remedy=remedy
        )


def _no_adapter_weights(folder: Path) -> InputError:
    if (folder / "adapter_model.bin").is_file():
        return InputError(
            "the adapter is a pickle, which can run code when it is opened; it is refused",
            where=folder / "adapter_model.bin",
            remedy="Convert it once, where you trust its source: load it with peft's PeftModel.from_pretrained and "
            "save it again with save_pretrained (safetensors is the default).",
        )
    return InputError(
        f"this is a LoRA adapter ({ADAPTER_CONFIG}) without {ADAPTER_WEIGHTS}",
        where=folder,
        remedy=f"Copy {ADAPTER_WEIGHTS} beside it; or remove {ADAPTER_CONFIG} if the folder holds a full model.",
    )
