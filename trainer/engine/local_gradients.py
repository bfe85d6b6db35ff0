"""Drive an update rule whose parameters are not in DeepSpeed's optimizer.

The parameters keep requiring gradients, so autograd computes them; a hook reduces each one to the ranks' flat ranges,
hands this rank's to the rule and frees the dense gradient at once, block by block during backward.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from trainer.engine.registration import Registration
from trainer.updates import UpdateRule


class LocalGradients:
    """The parameters that `rule` trains now, and the way of their gradients to it."""

    def __init__(self, rule: UpdateRule, registration: Registration) -> None:
        self._rule = rule
        self._registration = registration
        self._active: dict[str, nn.Parameter] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._infinite: Tensor | None = None

    def replace(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Freeze what is not in `parameters` and train what is; what is in both is left alone."""
        for name in self._active.keys() - parameters.keys():
            self._active[name].requires_grad_(False)
            self._rule.leave(name)
        entering = [name for name in parameters if name not in self._active]
        for handle in self._handles:
            handle.remove()
        for name in entering:
            parameters[name].requires_grad_(True)
        self._active = dict(parameters)
        self._handles = [
            p.register_post_accumulate_grad_hook(lambda p, name=name: self._receive(name, p))
            for name, p in self._active.items()
        ]
        for name in entering:
            self._rule.enter(name, self._registration.owned_range(parameters[name]))

    def finish(self, *, applied: bool, learning_rate: float) -> None:
        """At the end of an optimizer step: update, or forget if DeepSpeed or any rank's gradients forbid it."""
        if not self._active:
            return
        if applied and self._finite_everywhere():
            self._step(learning_rate)
        else:
            for name in self._active:
                self._rule.discard(name)
        self._infinite = None

    def _finite_everywhere(self) -> bool:
        device = get_accelerator().current_device_name()
        votes = torch.zeros((), device=device) if self._infinite is None else self._infinite.float()
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return not bool(votes)

    def _step(self, learning_rate: float) -> None:
        with torch.no_grad():
            for name, parameter in self._active.items():
                self._rule.step(name, self._registration.owned_range(parameter), lr=learning_rate)
                self._registration.publish(parameter)

    def _receive(self, name: str, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        mine = _reduce_to_owner(gradient, self._registration.owned_range(parameter).numel())
        infinite = ~torch.isfinite(mine).all()
        self._infinite = infinite if self._infinite is None else self._infinite | infinite
        self._rule.receive(name, mine)


def _reduce_to_owner(gradient: Tensor, length: int) -> Tensor:
    """The mean over ranks of this rank's range of `gradient`: [shape] on every rank -> [length], fp32."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    chunk = -(-gradient.numel() // ranks)
    flat = torch.zeros(chunk * ranks, dtype=torch.float32, device=gradient.device)
    flat[: gradient.numel()] = gradient.reshape(-1)
    mine = torch.empty(chunk, dtype=torch.float32, device=gradient.device)
    dist.reduce_scatter_tensor(mine, flat)
    assert length == max(0, min(chunk, gradient.numel() - rank * chunk))
    return mine[:length].div_(ranks)
