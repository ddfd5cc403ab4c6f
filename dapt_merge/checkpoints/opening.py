"""Opens whatever a user calls a checkpoint: a folder, a file, a hub id, a live model or a state dict.

The idea: decide from names and headers alone, and refuse with the reason whatever is not a model in safetensors
(pickles, quantised weights, torn files). A LoRA adapter with its base counts as the model that they stand for. Files
are data from strangers: an index may not point outside its folder, and nothing is unpickled or imported. What a merge
needs of several checkpoints together is checked elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dapt_merge import prefetch
from dapt_merge.checkpoints.adapters import ADAPTER_CONFIG, Adapter, apply_adapter, is_adapter_folder
from dapt_merge.checkpoints.checkpoint import Checkpoint, CheckpointSource, TensorInfo, config_value
from dapt_merge.checkpoints.files import PICKLES, MappedFile, read_json
from dapt_merge.checkpoints.float8 import can_be_dequantised, dequantised_checkpoint
from dapt_merge.checkpoints.groups import embedding_and_head, natural_order, second_names
from dapt_merge.checkpoints.hub import looks_like_hub_id, snapshot_folder
from dapt_merge.checkpoints.live_names import stored_state
from dapt_merge.checkpoints.naming import canonical_names
from dapt_merge.checkpoints.references import split_architecture
from dapt_merge.errors import InputError, nearest
from dapt_merge.tensors.dtypes import SAFETENSORS_NAMES, Dtype
from dapt_merge.tensors.lazy_torch import torch
from dapt_merge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def open_checkpoint(
    source: CheckpointSource, label: str | None = None, *, base: Checkpoint | None = None
) -> Checkpoint:
    """Open a checkpoint; only headers and config.json are read.

    Args:
        source: a Hugging Face folder (one file or shards), a `.safetensors` file, a hub id, `"model+adapter"` (folders
            or hub ids), the folder of a LoRA adapter, a `PreTrainedModel`, a state dict, or a Checkpoint (returned as
            it is).
        label: its name in errors and reports (default: the path, or "model in memory").
        base: what an adapter's folder is applied to (default: the model that its configuration names).

    Raises:
        InputError: nothing is there, or it is not a full model in safetensors; the message names file and remedy.

    Example:
        >>> import torch
        >>> open_checkpoint({"w": torch.zeros(2, 3)}).tensors["w"].shape
        (2, 3)
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, str | Path):
        return _open_path(source, label or str(source), base)
    if isinstance(source, Mapping):
        return _open_state_dict(source, label or "state dict in memory", {})
    if callable(getattr(source, "state_dict", None)) and hasattr(source, "config"):
        return _open_state_dict(stored_state(source), label or "model in memory", source.config.to_dict())
    raise InputError(
        f"cannot open a {type(source).__name__} as a checkpoint",
        remedy="Give a folder, a .safetensors file, a hub id, a PreTrainedModel or a state dict.",
    )


def open_tokenizer(source: str) -> Checkpoint:
    """Open a model for its tokenizer alone: a checkpoint with a folder, and no tensors whatever lies there.

    Raises:
        InputError: there is no such folder or hub model.
    """
    folder, nothing = _local_folder(source), dict[str, StoredTensor]()
    return Checkpoint(source, nothing.__getitem__, [], folder=folder if folder.is_dir() else folder.parent)


def with_stated_architecture(checkpoint: Checkpoint, architecture: str) -> Checkpoint:
    """Return the checkpoint with a class's name as the `architectures` of its configuration."""
    return checkpoint.with_config({**checkpoint.config, "architectures": [architecture]})


def _open_path(source: str | Path, label: str, base: Checkpoint | None) -> Checkpoint:
    path = Path(source).expanduser()
    if not path.exists():
        plain, architecture = split_architecture(str(source))
        if architecture is not None:
            return with_stated_architecture(_open_path(plain, label, base), architecture)
        model, plus, adapter = str(source).rpartition("+")
        if plus:
            return _open_adapter(_local_folder(adapter), label, _open_path(model, model, None))
        path = _local_folder(source)
    if path.is_dir():
        return _open_adapter(path, label, base) if is_adapter_folder(path) else _open_folder(path, label)
    if path.suffix in PICKLES:
        raise _pickle_refused(path, path.parent)
    if path.suffix == ".gguf":
        raise _gguf_refused(path)
    if path.suffix != ".safetensors":
        raise InputError(
            "not a safetensors file", where=path, remedy="Give a Hugging Face model folder, or a .safetensors file."
        )
    if is_adapter_folder(path.parent):
        raise InputError("this file lies in the folder of a LoRA adapter", where=path, remedy="Give the folder itself.")
    return _open_files(path.parent, [path], label, expected=None)


def _local_folder(source: str | Path) -> Path:
    """Return the path of a folder or file that is there, or of a hub model's files in the cache."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    folder, at, revision = str(source).partition("@")
    if at and Path(folder).expanduser().exists():
        raise InputError(
            f"'{folder}' is on this disk, and only a model of the hub has revisions",
            where=str(source),
            remedy=f"Leave '@{revision}' out, or give the folder that holds that state of the model.",
        )
    if looks_like_hub_id(str(source)):
        return snapshot_folder(str(source), _hint_for_missing(path))
    raise InputError("there is no such file or folder", where=path, remedy=_remedy_for_missing(path))


def _open_adapter(folder: Path, label: str, base: Checkpoint | None) -> Checkpoint:
    """Open an adapter's folder on top of a base: the one given, else the one that its configuration names."""
    if not is_adapter_folder(folder):
        raise InputError(
            f"this is no LoRA adapter: it has no {ADAPTER_CONFIG}",
            where=folder,
            remedy="In 'model+adapter', name a folder that peft saved after the plus sign.",
        )
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        raise InputError(
            "the folder holds a full model and a LoRA adapter",
            where=folder,
            remedy=f"Remove {ADAPTER_CONFIG} if the model contains it already, or move the adapter to its own folder.",
        )
    adapter = Adapter(folder)
    if base is None:
        if adapter.base_name is None:
            raise InputError(
                "the LoRA adapter does not say which model it was trained on",
                where=folder / ADAPTER_CONFIG,
                remedy=f"Name its base before it: MODEL+{folder}.",
            )
        base = _open_path(adapter.base_name, adapter.base_name, None)
    return apply_adapter(base, adapter, label)


def _open_folder(folder: Path, label: str) -> Checkpoint:
    if (folder / SINGLE_FILE).is_file():
        return _open_files(folder, [folder / SINGLE_FILE], label, expected=None)
    if (folder / INDEX_FILE).is_file():
        weight_map = _read_index(folder / INDEX_FILE)
        shards = natural_order(set(weight_map.values()))
        return _open_files(folder, [folder / shard for shard in shards], label, expected=weight_map)
    raise _no_weights(folder)


def _read_index(path: Path) -> dict[str, str]:
    """Return tensor name → shard file name; every shard exists and lies in the index's own folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError("the index has no usable 'weight_map'", where=path, remedy="Copy it again from its source.")
    for shard in sorted(set(weight_map.values())):
        parts = PurePosixPath(shard.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in shard:
            raise InputError(
                f"the index points outside its folder, to '{shard}'", where=path, remedy="Do not use this checkpoint."
            )
        if not shard.endswith(".safetensors"):
            raise InputError(
                f"the index names '{shard}', which is not safetensors", where=path, remedy="Convert the checkpoint."
            )
        if not (path.parent / shard).is_file():
            raise InputError(
                f"the index names '{shard}', which is missing",
                where=path,
                remedy="Download or copy the missing shard into that folder.",
            )
    return weight_map


def _open_files(folder: Path, files: list[Path], label: str, expected: dict[str, str] | None) -> Checkpoint:
    """Map the files, read their headers, and hold them against the index where there is one."""
    opened_files: dict[Path, MappedFile] = {}
    infos: dict[str, TensorInfo] = {}
    config = _read_config(folder)
    quantisation = config.get("quantization_config")
    for file in files:
        opened_files[file] = MappedFile(file, float8=bool(quantisation))
        for info in opened_files[file].tensors:
            if info.name in infos:
                raise InputError(
                    f"tensor '{info.name}' is stored in two shards", where=file, remedy="Save the checkpoint again."
                )
            infos[info.name] = info
    if expected is not None:
        _check_against_index(infos, expected, folder)
    named = canonical_names(infos, config)
    where = {named[name]: (opened_files[info.file], name) for name, info in infos.items() if info.file is not None}
    infos = {named[name]: replace(info, name=named[name]) for name, info in infos.items()}
    aliases = _tied_in_file(infos, config)

    def read(name: str) -> StoredTensor:
        opened_file, stored_as = where[name]
        return opened_file.stored(stored_as)

    def known_digest(name: str) -> bytes | None:
        file = infos[name].file
        return None if file is None else prefetch.known_digest(file, where[name][1])

    opened = Checkpoint(
        label,
        read,
        (info for name, info in infos.items() if name not in aliases),
        folder=folder,
        config=config,
        aliases=aliases,
        files=files,
        known_digest=known_digest,
    )
    return dequantised_checkpoint(opened, quantisation) if quantisation else opened


def _check_against_index(infos: Mapping[str, TensorInfo], expected: Mapping[str, str], folder: Path) -> None:
    for name in sorted(infos.keys() | expected.keys()):
        info = infos.get(name)
        if info is None or expected.get(name) is None or info.file != folder / expected[name]:
            stated = expected.get(name, "no shard")
            found = "no shard" if info is None or info.file is None else info.file.name
            raise InputError(
                f"the index puts tensor '{name}' in {stated}, but it lies in {found}",
                where=folder / INDEX_FILE,
                remedy="Copy the index and the shards again from one source.",
            )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    config = read_json(path)
    quantisation = config.get("quantization_config")
    if quantisation and not (isinstance(quantisation, Mapping) and can_be_dequantised(quantisation)):
        raise InputError(
            "the checkpoint is quantised; its numbers cannot be averaged",
            where=path,
            remedy="Use the original float32, bfloat16 or float16 weights; of quantised ones only float8 can be read.",
        )
    return config


def _tied_in_file(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, str]:
    """Return second name → first of what is one parameter: then a stored copy of it is no second tensor.

    That holds for the head when the configuration ties it to the embedding, and for pairs that every class ties.
    """
    pairs = second_names(infos)
    embedding, head = embedding_and_head(infos)
    if embedding is not None and head is not None and config_value(config, "tie_word_embeddings") is True:
        pairs[head] = embedding
    return {second: first for second, first in pairs.items() if infos[second].shape == infos[first].shape}


def _open_state_dict(tensors: Mapping[str, Tensor], label: str, config: dict[str, Any]) -> Checkpoint:
    """Open live tensors; those that share their memory are one, under the embedding's name where it is among them."""
    if any(".lora_A." in name for name in tensors):
        raise InputError(
            "this model in memory has a LoRA adapter beside its weights",
            where=label,
            remedy="Give model.merge_and_unload(), or the paths as 'model+adapter'.",
        )
    stored_as = {canonical: stored for stored, canonical in canonical_names(tensors, config).items()}
    embedding, _ = embedding_and_head(stored_as)
    owners: dict[object, str] = {}
    aliases: dict[str, str] = {}
    infos = []
    for name in sorted(natural_order(stored_as), key=lambda name: name != embedding):
        tensor = tensors[stored_as[name]]
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            what = "a meta tensor" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise InputError(
                f"'{name}' holds no data ({what})",
                where=label,
                remedy="Load the model's weights first; a state dict maps names to tensors.",
            )
        dtype = _mergeable_dtype(tensor)
        if dtype is None:
            raise InputError(f"tensor '{name}' has dtype {tensor.dtype}, which cannot be merged", where=label)
        storage = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and storage in owners:
            aliases[name] = owners[storage]
        else:
            owners[storage] = name
            infos.append(TensorInfo(name, dtype, tuple(tensor.shape), tensor.numel() * dtype.itemsize))
    return Checkpoint(
        label, lambda name: tensors[stored_as[name]].detach().cpu(), infos, config=config, aliases=aliases
    )


def _mergeable_dtype(tensor: Tensor) -> Dtype | None:
    try:
        dtype = Dtype.of(tensor.dtype)
    except ValueError:
        return None
    return dtype if dtype in SAFETENSORS_NAMES else None


def _no_weights(folder: Path) -> InputError:
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES and path.name != "training_args.bin")
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    gguf = sorted(folder.glob("*.gguf"))
    if gguf and not others and not pickles:
        return _gguf_refused(gguf[0])
    if pickles and not others:
        return _pickle_refused(pickles[0], folder)
    if others:
        return InputError(
            f"neither {SINGLE_FILE} nor {INDEX_FILE} is here, only {', '.join(others[:3])}",
            where=folder,
            remedy=f"Copy {INDEX_FILE} beside the shards, or give the .safetensors file itself.",
        )
    return InputError("the folder holds no safetensors weights", where=folder, remedy=_remedy_for_missing(folder))


def _gguf_refused(file: Path) -> InputError:
    return InputError(
        "the weights are in GGUF, whose blocks are quantised and named for another program",
        where=file,
        remedy='Dequantise it once, weights and tokenizer: python -c "from dapt_merge.demo.base_model import '
        f"write_base_model as write; write('{file}', '{file.with_suffix('')}-safetensors')\". A file of 8 bits or "
        "fewer stays as coarse as it was; where you have the original tokenizer, put it in place of the one written.",
    )


def _pickle_refused(file: Path, folder: Path) -> InputError:
    return InputError(
        "the weights are a pickle, which can run code when it is opened; it is refused",
        where=file,
        remedy="Convert it once, where you trust its source: "
        'python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\"",
    )


def _remedy_for_missing(path: Path) -> str:
    """Suggest the neighbour with the closest name, or the model folders just below."""
    if path.is_dir():
        below = sorted(p.parent.name for p in path.glob("*/*.safetensors*"))
        return f"Did you mean {path / below[-1]}?" if below else "Give a folder with model.safetensors or its shards."
    return f"Check the path.{_hint_for_missing(path)}"


def _hint_for_missing(path: Path) -> str:
    """Name the neighbour with the closest name, if one is close."""
    neighbours = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return nearest(path.name, neighbours)
