"""Optimizers that lose no update: float32 masters of a bfloat16 model, or bfloat16 weights rounded at random.

A bfloat16 number has 8 bits of mantissa: an update of less than 1/512 of a weight is lost in it, and at DAPT's learning
rates most updates are smaller. So the update is made in float32, on a master, and rounded into the model afterwards;
forward and backward keep bfloat16's speed. Where there is no memory for masters, rounding at random keeps the update in
expectation, and rounding to nearest counts what it loses. Schedules and data are not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor


def split_off_masters(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Turn a float32 model into bfloat16 in place, and return its float32 parameters as the masters.

    The masters are the model's old storage, so nothing is held twice; frozen parameters need none and get none. Buffers
    (rotary frequencies) stay float32.
    """
    masters = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            masters[parameter] = parameter.data
        parameter.data = parameter.data.to(torch.bfloat16)
    return masters


class _OnMasters:
    """Makes an optimizer work on the float32 masters of a bfloat16 model; mixed in before its class.

    Gradients are taken from the model as soon as they are complete, summed over micro-batches in float32, and clipped
    there, so neither accumulation nor the norm loses bits. The masters are not part of `state_dict()`: they are the
    weights of the checkpoint beside it.

    Args:
        params: the model's parameters (or groups of them), as for every torch optimizer.
        masters: parameter → its float32 master.
        max_grad_norm: the L2 norm that gradients are clipped to; None leaves them.
        kwargs: the optimizer's own.

    Attributes:
        last_grad_norm: the L2 norm of the last step's gradient before clipping.
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
        super().__init__(groups, **kwargs)  # type: ignore[call-arg]
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take_gradient)

    def _take_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        master = self.masters[parameter]
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Clip, update the masters, round them into the model, and forget the gradients."""
        gradients = [master.grad for _, master in self._pairs if master.grad is not None]
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = nn.utils.get_total_norm(gradients)
        self.last_grad_norm = float(norm)
        if self.last_grad_norm > limit:
            nn.utils.clip_grads_with_norm_([master for _, master in self._pairs], limit, norm)
        result = super().step(closure)  # type: ignore[misc]
        for parameter, master in self._pairs:
            parameter.copy_(master)
        self.zero_grad()  # type: ignore[attr-defined]
        return result


class MasterWeightAdamW(_OnMasters, torch.optim.AdamW):  # type: ignore[misc]
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) whose parameters are the float32 masters of a bfloat16 model.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> optimizer = MasterWeightAdamW(model.parameters(), masters=split_off_masters(model), fused=True, lr=1e-3)
        >>> model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.last_grad_norm > 0
        True
    """


class MasterWeightAdafactor(_OnMasters, Adafactor):
    """Adafactor (Shazeer and Stern, arXiv 1804.04235) on masters: a row and a column of state for every matrix."""


class Bf16AdamW(torch.optim.Optimizer):
    """AdamW on a model that is bfloat16 alone: weights, gradients and moments, 8 bytes a parameter.

    Every update is computed in float32. `stochastic` rounding takes one of the two neighbours at random, with the odds
    that keep the value in expectation (arXiv 2010.06192); its random bits are drawn from (seed, step, parameter), so a
    run that goes on draws the same. `nearest` is what a plain bfloat16 optimizer does, and counts what it loses.

    Attributes:
        updates_lost: with `nearest`, the share of the last step's updates that left their weight as it was.

    Example:
        >>> weight = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        >>> optimizer = Bf16AdamW([weight], lr=1e-4, weight_decay=0.0, rounding="nearest")
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> optimizer.updates_lost
        1.0
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._rounding, self._seed = rounding, seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self.updates_lost: float | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        moved, lost = 0, 0
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                generator = self._generator(parameter.device, int(state["step"]), index, len(group["params"]))
                before = parameter.clone() if self._rounding == "nearest" else None
                update = self._update(parameter, state, group, generator)
                if before is not None:
                    moved += int(torch.count_nonzero(update))
                    lost += int(torch.count_nonzero((update != 0) & (parameter == before)))
        if self._rounding == "nearest":
            self.updates_lost = lost / max(moved, 1)
        return None

    def _update(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], generator: Any) -> Tensor:
        """Update moments and weight; return the update that was wanted, float32."""
        beta1, beta2 = group["betas"]
        step = float(state["step"])
        gradient = parameter.grad.float()  # type: ignore[union-attr]
        mean = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].float().lerp_(gradient.square_(), 1 - beta2)
        state["exp_avg"].copy_(self._rounded(mean, generator))
        state["exp_avg_sq"].copy_(self._rounded(square, generator))
        scale = square.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        wanted = parameter.float()
        update = mean.div_(scale).mul_(-group["lr"] / (1 - beta1**step))
        update.add_(wanted, alpha=-group["lr"] * group["weight_decay"])
        parameter.copy_(self._rounded(wanted.add_(update), generator))
        return update

    def _generator(self, device: torch.device, step: int, index: int, count: int) -> torch.Generator:
        generator = self._generators.setdefault(device, torch.Generator(device))
        return generator.manual_seed((self._seed * 1_000_003 + step * count + index) % 2**63)

    def _rounded(self, values: Tensor, generator: torch.Generator) -> Tensor:
        if self._rounding == "nearest":
            return values.to(torch.bfloat16)
        return stochastically_rounded(values, generator)


def stochastically_rounded(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return float32 values as bfloat16, each rounded up or down with odds that keep it in expectation.

    Example:
        >>> noise = torch.Generator().manual_seed(0)
        >>> stochastically_rounded(torch.full((100_000,), 1 + 1 / 512), noise).float().mean().sub(1).mul(512).round()
        tensor(1.)
    """
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    # bfloat16 is float32 without its low 16 bits: random ones carry into the kept bits as often as they are large.
    return (values.contiguous().view(torch.int32) + noise).bitwise_and_(-65536).view(torch.float32).to(torch.bfloat16)


@torch.no_grad()
def pull_towards(optimizer: torch.optim.Optimizer, anchors: Mapping[Tensor, Tensor], strength: float) -> None:
    """Move each weight towards its anchor, before a step: θ ← θ − lr · strength · (θ − θ₀).

    L2-SP (arXiv 1802.01483), decoupled from the gradient as AdamW decouples weight decay. Unlike that, it holds for
    every weight, norms and biases too: where they were is as good a prior for them.

    Args:
        optimizer: any; its own weight decay should be 0.
        anchors: parameter as the optimizer holds it → θ₀, of the same shape, on the same device.
        strength: what weight decay would be called λ.

    Example:
        >>> weight = nn.Parameter(torch.tensor([3.0]))
        >>> pull_towards(torch.optim.SGD([weight], lr=0.5), {weight: torch.tensor([1.0])}, 0.5)
        >>> weight.data
        tensor([2.5000])
    """
    for group in optimizer.param_groups:
        share = group["lr"] * strength
        for parameter in group["params"]:
            parameter.mul_(1 - share).add_(anchors[parameter].to(parameter.dtype), alpha=share)
