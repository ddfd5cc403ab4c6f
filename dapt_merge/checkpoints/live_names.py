"""A live model's tensors under the names that its files have.

transformers holds some parts otherwise in memory than in files: the experts of a layer, which files list one by one,
are one tensor. Its own conversion says how; here it is asked for views instead of copies, so that reading one of them
reads the live model, and writing to it writes there. What the tensors mean this module does not know.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dapt_merge.tensors.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def stored_state(model: Any, *, keep_vars: bool = False) -> dict[str, Tensor]:
    """Return a model's state dict under the names, and in the pieces, that its files have.

    The pieces are views of the model's memory wherever they can be; `copied_names` tells.

    Args:
        model: a `PreTrainedModel`; any other module's state is returned as it is.
        keep_vars: as for `Module.state_dict`.

    Example:
        >>> list(stored_state(torch.nn.Linear(1, 1)))
        ['weight', 'bias']
    """
    state = dict(model.state_dict(keep_vars=keep_vars))
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return state
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers converted anything
        return state
    try:
        with torch.no_grad(), _without_copies():
            return dict(revert_weight_conversion(model, state))
    except Exception:  # some conversions cannot be undone; then the names are those in memory, and are told to differ
        return state


def _without_copies() -> Any:
    """Return a mode that leaves a piece where it is, where transformers would copy it to have it in one run."""
    from torch.overrides import TorchFunctionMode

    class WithoutCopies(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., Any],
            types: Any,
            args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))

    return WithoutCopies()


def copied_names(pieces: Mapping[str, Tensor], model: Any) -> list[str]:
    """Return the names among `pieces` that are copies: writing to them would not change the model."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    return [name for name, piece in pieces.items() if piece.untyped_storage().data_ptr() not in own]
