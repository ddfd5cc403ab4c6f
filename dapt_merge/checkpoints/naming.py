"""One name for one tensor, whatever the age of the file and the class that saved it.

The same weights are stored as `LayerNorm.gamma` by BERT's first files and as `LayerNorm.weight` since, with or without
`transformer.` before GPT-2's layers, and GPT-NeoX's head has one name in files and another in a live model. Merging
needs one spelling: the one that transformers writes today. What this module does not know: shapes and values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# What a class with a head puts before the names of the model under it; files saved without a head lack it.
_PREFIXES = {
    "gpt2": "transformer",
    "bloom": "transformer",
    "bert": "bert",
    "roberta": "roberta",
    "camembert": "roberta",
    "xlm-roberta": "roberta",
    "distilbert": "distilbert",
    "electra": "electra",
}
# Names that sit beside the model and not in it, in those families.
_HEADS = re.compile(
    r"^(?:lm_head|cls|classifier|score|qa_outputs|multiple_choice_head|vocab_\w+|pre_classifier|"
    r"generator_\w+|discriminator_\w+)\."
)
_BARE_CLASS = re.compile(r"^(?!.*(?:LMHead|DoubleHeads)Model$)\w+Model$")


def canonical_names(stored: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Return stored name → the name that the tensor goes by here.

    Args:
        stored: the names in a file, or in a live model's state dict.
        config: the model's configuration; an empty one leaves the prefixes alone.

    Example:
        >>> canonical_names(["wte.weight"], {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
        {'wte.weight': 'transformer.wte.weight'}
        >>> canonical_names(["bert.embeddings.LayerNorm.gamma"], {})
        {'bert.embeddings.LayerNorm.gamma': 'bert.embeddings.LayerNorm.weight'}
    """
    names = list(stored)
    prefix = _missing_prefix(names, config)
    found = {name: _renamed(name, prefix, config) for name in names}
    # Two names for one tensor in one file cannot be told apart by rules: then each keeps its own.
    return found if len(set(found.values())) == len(names) else {name: name for name in names}


def _renamed(name: str, prefix: str, config: Mapping[str, Any]) -> str:
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            name = name.removesuffix(old) + new
    if config.get("model_type") == "gpt_neox" and name == "lm_head.weight":
        return "embed_out.weight"
    return name if not prefix or _HEADS.match(name) else f"{prefix}.{name}"


def _missing_prefix(names: list[str], config: Mapping[str, Any]) -> str:
    """Return the prefix that the stated class would have written and this file lacks, or an empty string."""
    prefix = _PREFIXES.get(str(config.get("model_type")))
    architectures = config.get("architectures")
    if prefix is None or not isinstance(architectures, list) or not architectures:
        return ""
    if _BARE_CLASS.match(str(architectures[0])) or any(name.startswith(f"{prefix}.") for name in names):
        return ""
    return prefix
