"""A real base model from a Python package: a 4-bit GGUF file becomes an ordinary Hugging Face folder.

The idea: the quantised blocks are turned back into dense float32 once, and from then on the folder is like any other
checkpoint (safetensors, tied embeddings stored once, tokenizer, chat template). The weights keep the 4-bit rounding
that they went through: this is the model as published in the package, not the model as it was trained. What this module
does not know: where the GGUF file comes from, and what the model is used for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dapt_merge.atomic import atomic_folder
from dapt_merge.errors import InputError

WEIGHTS_FILE = "model.safetensors"
_GGUF_MAGIC = b"GGUF"
# Loading leaves these behind; they describe the loading, not the tokenizer.
_LOADING_ONLY_KEYS = ("is_local", "local_files_only", "name_or_path", "gguf_file")


def write_base_model(gguf_file: str | Path, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write the model in `gguf_file` as a float32 Hugging Face checkpoint, and return its folder.

    Args:
        gguf_file: one GGUF file with weights and tokenizer.
        folder: the checkpoint folder; it appears only when it is complete.
        overwrite: replace an existing folder.

    Returns:
        `folder`, which holds `model.safetensors` (float32), `config.json`, `generation_config.json`, the tokenizer and
        its chat template. A tied output head is not stored a second time.

    Raises:
        InputError: the file is missing or is not GGUF, or `folder` exists and `overwrite` is false.

    Example:
        >>> write_base_model("SmolLM2-135M-Instruct.Q4_1.gguf", "base/")  # doctest: +SKIP
        PosixPath('base')
    """
    gguf_file, folder = Path(gguf_file), Path(folder)
    _check_gguf(gguf_file)
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        _convert(gguf_file, temporary)
    return folder


def base_model_is_complete(folder: str | Path) -> bool:
    """Say whether `folder` holds what `write_base_model` leaves there."""
    folder = Path(folder)
    return all((folder / name).is_file() for name in (WEIGHTS_FILE, "config.json", "tokenizer.json"))


def _check_gguf(gguf_file: Path) -> None:
    if not gguf_file.is_file():
        raise InputError("the GGUF file does not exist", where=gguf_file, remedy="Check the path.")
    with gguf_file.open("rb") as stream:
        magic = stream.read(len(_GGUF_MAGIC))
    if magic != _GGUF_MAGIC:
        raise InputError(
            f"this is not a GGUF file: it starts with {magic!r}, expected {_GGUF_MAGIC!r}",
            where=gguf_file,
            remedy="Fetch it again.",
        )


def _convert(gguf_file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # `gguf_file` alone would keep the quantised blocks, which cannot be saved: both arguments are needed.
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    for name in ("gguf_file", "_name_or_path"):
        tokenizer.init_kwargs.pop(name, None)
    _restore_digit_splitting(gguf_file, tokenizer)
    model.save_pretrained(folder, max_shard_size="100GB")
    tokenizer.save_pretrained(folder)
    _drop_json_keys(folder / "config.json", ("quantization_config", "_name_or_path", "_model_name_or_path"))
    _drop_json_keys(folder / "tokenizer_config.json", _LOADING_ONLY_KEYS)
    # safetensors creates its file readable by the owner only; a checkpoint is shared like any other output.
    (folder / WEIGHTS_FILE).chmod(0o644)


def _restore_digit_splitting(gguf_file: Path, tokenizer: Any) -> None:
    """Split digits one by one where the file asks for the "smollm" rule; the loader knows only the byte-level rule."""
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as InOrder

    rule = GGUFReader(gguf_file).get_field("tokenizer.ggml.pre")
    if rule is not None and rule.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = InOrder(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )


def _drop_json_keys(path: Path, names: tuple[str, ...]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in names:
        content.pop(name, None)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
