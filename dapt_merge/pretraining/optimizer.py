"""AdamW on float32 master weights, while the model itself holds bfloat16 copies of them.

A bfloat16 number has 8 bits of mantissa: an update of less than 1/512 of a weight is lost in it, and at DAPT's learning
rates most updates are smaller. So the update is made in float32, on the master, and rounded into the model afterwards;
forward and backward keep bfloat16's speed. Schedules and data are not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def split_off_masters(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Turn a float32 model into bfloat16 in place, and return its float32 parameters as the masters.

    The masters are the model's old storage, so nothing is held twice. Buffers (rotary frequencies) stay float32.
    """
    masters = {}
    for parameter in model.parameters():
        masters[parameter] = parameter.data
        parameter.data = parameter.data.to(torch.bfloat16)
    return masters


class MasterWeightAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) whose parameters are the float32 masters of a bfloat16 model.

    Gradients are taken from the model as soon as they are complete, summed over micro-batches in float32, and clipped
    there, so neither accumulation nor the norm loses bits. The masters are not part of `state_dict()`: they are the
    weights of the checkpoint beside it.

    Args:
        params: the model's parameters (or groups of them), as for every torch optimizer.
        masters: parameter → its float32 master.
        max_grad_norm: the L2 norm that gradients are clipped to; None leaves them.
        kwargs: those of `torch.optim.AdamW`.

    Attributes:
        last_grad_norm: the L2 norm of the last step's gradient before clipping.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> optimizer = MasterWeightAdamW(model.parameters(), masters=split_off_masters(model), lr=1e-3)
        >>> model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.last_grad_norm > 0
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        masters: Mapping[nn.Parameter, Tensor],
        max_grad_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        groups = [dict(entry) if isinstance(entry, dict) else {"params": [entry]} for entry in params]
        # A shared head and embedding are one parameter, with one master.
        parameters = [parameter for group in groups for parameter in group["params"]]
        self._pairs = [(parameter, masters[parameter].to(parameter.device)) for parameter in parameters]
        self.masters = dict(self._pairs)
        self.max_grad_norm = max_grad_norm
        self.last_grad_norm = 0.0
        for group in groups:
            group["params"] = [self.masters[parameter] for parameter in group["params"]]
        super().__init__(groups, fused=True, **kwargs)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take_gradient)

    def _take_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        master = self.masters[parameter]  # type: ignore[index]
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Clip, update the masters, round them into the model, and forget the gradients."""
        gradients = [master.grad for _, master in self._pairs if master.grad is not None]
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = nn.utils.get_total_norm(gradients)
        self.last_grad_norm = float(norm)
        if self.last_grad_norm > limit:
            nn.utils.clip_grads_with_norm_([master for _, master in self._pairs], limit, norm)
        result = super().step(closure)
        for parameter, master in self._pairs:
            parameter.copy_(master)
        self.zero_grad()
        return result
