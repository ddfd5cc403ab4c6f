"""How much of the hardware a run uses: model FLOPs of a token, and the peak of known accelerators.

MFU is counted as in PaLM (arXiv 2204.02311, appendix B): the arithmetic that the model needs, attention over the whole
sequence included, and nothing for recomputing activations; a mixture of experts is counted whole. Peaks are the makers'
dense bfloat16 figures; for a device that is not in the list there is no MFU.
"""

from __future__ import annotations

from typing import Any

import torch

# FLOP/s, dense bfloat16; the first name that is part of the device's counts.
_PEAKS = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10", 125e12),
    ("4090", 165e12),
    ("3090", 71e12),
)


def flops_per_token(model: Any, sequence_length: int) -> float:
    """Return the FLOPs of one token's forward and backward pass.

    6 for every weight that a token is multiplied with (4 for a frozen one: no gradient of its own), and
    12 · layers · width · length for attention. An embedding is looked up, not multiplied, unless it is the head too.
    """
    tied = model.get_output_embeddings() is not None and (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    looked_up = None if tied else model.get_input_embeddings().weight
    weights = sum((6 if p.requires_grad else 4) * p.numel() for p in model.parameters() if p is not looked_up)
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)
    width = heads * (getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0))
    return weights + 12.0 * getattr(text, "num_hidden_layers", 0) * width * sequence_length


def peak_flops(device: torch.device) -> float | None:
    """Return the device's peak in dense bfloat16, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS if part in name), None)
