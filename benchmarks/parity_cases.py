"""What the parity table compares: tiny models of every shape of checkpoint, and a recipe for every shared method.

The models are transformers' own architectures with random weights: a base, and two DAPT checkpoints whose task vectors
have a direction in common (Model Stock needs one). The recipes are in mergekit's dialect, so that one file runs through
both engines. What this module does not know: how anything is merged, or how close two merges have to be.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": "Llama, a head of its own",
    "tied": "Llama, head tied to the embeddings",
    "gqa": "Llama, grouped queries",
    "qwen2": "Qwen2: biases, tied, grouped queries",
    "bert": "BERT for sequence classification",
    "sharded": "Llama in shards, cut differently in every checkpoint",
}
SHARD_SIZES = {"base": "20KB", "one": "45KB", "two": "1MB"}
NAMES = ("base", "one", "two")


def build_model(kind: str) -> Any:
    """Return a tiny transformers model with its library's initial weights."""
    import transformers as hf

    if kind == "bert":
        return hf.BertForSequenceClassification(
            hf.BertConfig(**SIZES, intermediate_size=48, max_position_embeddings=32)
        )
    keys = {"key_value": 4 if kind in ("llama", "tied") else 2}
    common = {**SIZES, "intermediate_size": 48, "num_key_value_heads": keys["key_value"]}
    if kind == "qwen2":
        return hf.Qwen2ForCausalLM(hf.Qwen2Config(**common, tie_word_embeddings=True))
    return hf.LlamaForCausalLM(hf.LlamaConfig(**common, tie_word_embeddings=kind in ("tied", "gqa")))


def save_models(kind: str, folder: Path) -> dict[str, Path]:
    """Save base and DAPT checkpoints of one kind, in both dtypes: {"float32/base": folder, …}.

    No tensor is left at zeros or ones, which no method could tell apart; task vectors have rms 0.01 and cosine 0.64.
    """
    torch.manual_seed(0)
    model = build_model(kind)
    start = [p.detach() + 0.02 * torch.randn(p.shape) for p in model.parameters()]
    common = [torch.randn(p.shape) for p in start]
    folders = {}
    for position, name in enumerate(NAMES):
        torch.manual_seed(position)
        for parameter, value, shared in zip(model.parameters(), start, common, strict=True):
            step = 0.8 * shared + 0.6 * torch.randn(value.shape)
            parameter.data = value + (0.01 * step if name != "base" else 0)
        for dtype in (torch.float32, torch.bfloat16):
            place = folder / kind / str(dtype).split(".")[1] / name
            shards = {"max_shard_size": SHARD_SIZES[name]} if kind == "sharded" else {}
            model.to(dtype).save_pretrained(place, **shards)
            model.to(torch.float32)
            folders[f"{place.parent.name}/{name}"] = place
    return folders


@dataclass(frozen=True)
class Case:
    """One method with one set of parameters, as both engines read it.

    Attributes:
        method: the merge method's name.
        parameters: global parameters of the recipe.
        weights: one per DAPT checkpoint that takes part; none when the method knows no weight.
        base: "base_model" (named as the base), "models" (listed among the models) or "none".
        count: how many DAPT checkpoints take part.
    """

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    base: str = "base_model"
    count: int = 2

    def recipe(self, folders: dict[str, Path], stored: str, keys: dict[str, Any]) -> dict[str, Any]:
        """Return the recipe over the checkpoints of one dtype; `keys` are those of its arithmetic."""
        models: list[dict[str, Any]] = [{"model": str(folders[f"{stored}/{name}"])} for name in NAMES[1:][: self.count]]
        for entry, weight in zip(models, self.weights, strict=False):
            entry["parameters"] = {"weight": weight}
        base = str(folders[f"{stored}/base"])
        if self.base == "models":
            models.insert(0, {"model": base})
        content = {"merge_method": self.method, "models": models, "parameters": self.parameters, **keys}
        if self.base == "base_model":
            content["base_model"] = base
        return content


_TWO = (0.4, 0.6)
CASES = {
    "linear": Case("linear", weights=(0.3, 0.5), base="none"),
    "slerp": Case("slerp", {"t": 0.3}, count=1),
    "nuslerp": Case("nuslerp", weights=(0.3, 0.5), base="none"),
    "nuslerp, rows": Case("nuslerp", {"nuslerp_flatten": False}, (0.3, 0.5), base="none"),
    "nuslerp, columns": Case("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, (0.3, 0.5), base="none"),
    "nuslerp, task vectors": Case("nuslerp", weights=(0.3, 0.5)),
    "multislerp": Case("multislerp", weights=(0.3, 0.5), base="none"),
    "multislerp, task vectors": Case("multislerp", weights=(0.3, 0.5)),
    "karcher": Case("karcher", {"tol": 1e-7, "max_iter": 20}, base="models"),
    "task_arithmetic": Case("task_arithmetic", {"lambda": 0.9}, _TWO),
    "task_arithmetic, normalized": Case("task_arithmetic", {"normalize": True}, (0.3, 0.5)),
    "ties": Case("ties", {"density": 0.5, "lambda": 0.9}, _TWO),
    "ties, sum": Case("ties", {"density": 0.3, "normalize": False}, _TWO),
    "ties, rescaled": Case("ties", {"density": 0.5, "rescale": True}, _TWO),
    "dare_linear, density 1": Case("dare_linear", {"density": 1.0}, _TWO),
    "dare_ties, density 1": Case("dare_ties", {"density": 1.0, "normalize": True}, _TWO),
    "della_linear, density 1": Case("della_linear", {"density": 1.0}, _TWO),
    "della, density 1": Case("della", {"density": 1.0, "normalize": True}, _TWO),
    "breadcrumbs": Case("breadcrumbs", {"density": 0.6, "gamma": 0.05}, _TWO),
    "breadcrumbs_ties": Case("breadcrumbs_ties", {"density": 0.6, "gamma": 0.05, "normalize": False}, _TWO),
    "breadcrumbs, rescaled": Case("breadcrumbs", {"density": 0.6, "gamma": 0.05, "rescale": True}, _TWO),
    "model_stock": Case("model_stock"),
    "model_stock, filter-wise": Case("model_stock", {"filter_wise": True}),
    "sce": Case("sce"),
    "sce, select_topk": Case("sce", {"select_topk": 0.5}),
    "nearswap": Case("nearswap", {"t": 0.005}, count=1),
    "ram": Case("ram", {"epsilon": 0.008}),
    "ramplus_tl": Case("ramplus_tl", {"epsilon": 0.008, "r": 0.5}),
    "arcee_fusion": Case("arcee_fusion", count=1),
    "passthrough": Case("passthrough", {"scale": 0.7}, base="none", count=1),
}
# Drawn at random, so compared in distribution: the same flags for both, since the two engines' defaults differ.
DRAWN = {
    "dare_linear": Case("dare_linear", {"density": 0.5, "rescale": True}, _TWO),
    "dare_ties": Case("dare_ties", {"density": 0.5, "rescale": True, "normalize": False}, _TWO),
    "della_linear": Case("della_linear", {"density": 0.5, "epsilon": 0.2, "rescale": True}, _TWO),
    "della": Case("della", {"density": 0.5, "epsilon": 0.2, "rescale": True, "normalize": False}, _TWO),
}


@dataclass(frozen=True)
class Arithmetic:
    """How a recipe is calculated.

    Attributes:
        stored: the checkpoints' dtype.
        keys: the recipe's.
        unit: unit roundoff of mergekit's arithmetic; ours is float32's throughout.
        rounded: unit roundoff of the output, 0 where it is that of the arithmetic.
    """

    stored: str
    keys: dict[str, str]
    unit: float
    rounded: float = 0.0


ARITHMETIC = {
    "float32": Arithmetic("float32", {"dtype": "float32"}, 2.0**-24),
    "bfloat16 of float32": Arithmetic("bfloat16", {"dtype": "float32", "out_dtype": "bfloat16"}, 2.0**-24, 2.0**-8),
    "bfloat16": Arithmetic("bfloat16", {"dtype": "bfloat16"}, 2.0**-8),
}
