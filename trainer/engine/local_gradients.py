"""Drive an update rule whose parameters are not in DeepSpeed's optimizer.

The parameters keep requiring gradients, so autograd computes them; a hook takes each dense gradient and frees it at
once, block by block during backward. It reduces the gradient to the ranks' flat ranges and passes this rank's to the
rule. If the rule names the few entries that it wants, the hook sets those aside, and ranks exchange them once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from trainer.engine.zero.registration import Registration
from trainer.model.ownership import own_bounds, share_size
from trainer.updates import UpdateRule


class LocalGradients:
    """Pass the gradients of the parameters that `rule` trains now to it.

    `is_last` says in a backward whether its micro-batch is known to be the last one of its step.
    """

    def __init__(self, rule: UpdateRule, registration: Registration, *, is_last: Callable[[], bool]) -> None:
        self._rule = rule
        self._registration = registration
        self._is_last = is_last
        self._active: dict[str, nn.Parameter] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._infinite: Tensor | None = None
        # This rank's sums over micro-batches, of the entries that the rule wants (fp32).
        self._entries: dict[str, Tensor] = {}

    def replace(
        self, parameters: Mapping[str, nn.Parameter], *, keep: bool, reset: Collection[str] = frozenset()
    ) -> None:
        """Train `parameters`, and freeze those trained before that are not among them. The others keep their state,
        except `reset`, which start with fresh state. `keep` says that the state of frozen ones is needed again."""
        for name in self._active.keys() - parameters.keys():
            self._active[name].requires_grad_(False)
            self._rule.leave(name, keep=keep)
        for name in self._active.keys() & reset:
            self._rule.leave(name, keep=False)
        entering = [name for name in parameters if name not in self._active or name in reset]
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
            self._rule.enter(name, self._registration.shares.owned_range(parameters[name]))

    def held(self) -> list[Tensor]:
        """Return the gradients that the rule has not received yet."""
        return list(self._entries.values())

    @torch.no_grad()
    def finish(self, *, applied: bool, learning_rate: float) -> bool:
        """Update at the end of an optimizer step and return whether that was done. If DeepSpeed did not step (`applied`
        is False), or a gradient on any rank is not finite, gradients are discarded instead."""
        if not self._active:
            return applied
        applied = applied and self._hand_over_entries() and self._finite_everywhere()
        if applied:
            self._step(learning_rate)
        else:
            self._rule.discard()
        self._infinite = None
        self._entries.clear()
        return applied

    def _hand_over_entries(self) -> bool:
        """Exchange the wanted entries once and pass their means to the rule. If any is not finite, return False
        instead, on all ranks alike."""
        chosen = {name: positions for name in self._active if (positions := self._rule.wanted(name)) is not None}
        if not chosen:
            return True
        wanted = [positions.numel() for positions in chosen.values()]
        mean = torch.zeros(sum(wanted), dtype=torch.float32, device=get_accelerator().current_device_name())
        for name, part in zip(chosen, mean.split(wanted), strict=True):
            if name in self._entries:  # otherwise it took no part, as an expert without tokens
                part.copy_(self._entries.pop(name))
        dist.all_reduce(mean)
        mean.div_(dist.get_world_size())
        if not torch.isfinite(mean).all():
            return False
        for name, part in zip(chosen, mean.split(wanted), strict=True):
            self._rule.receive(name, part, self._registration.shares.owned_range(self._active[name]), last=True)
        return True

    def _finite_everywhere(self) -> bool:
        if self._infinite is None:  # nothing was reduced parameter by parameter, on any rank
            return True
        votes = self._infinite.float()
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return not bool(votes)

    def _step(self, learning_rate: float) -> None:
        weights = {name: self._registration.shares.owned_range(p) for name, p in self._active.items()}
        self._rule.begin_step(weights)
        sparse: dict[str, Tensor] = {}
        for name, parameter in self._active.items():
            self._rule.step(name, weights[name], lr=learning_rate)
            moved = self._rule.moved(name)
            if moved is None:
                self._registration.shares.publish(parameter)
            elif moved.numel():
                sparse[name] = moved
        self._registration.shares.publish_entries([(self._active[name], moved) for name, moved in sparse.items()])

    def _receive(self, name: str, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None  # accumulated just now
        wanted = self._rule.wanted(name)
        if wanted is not None:
            chosen = gradient.reshape(-1)[wanted].float()
            self._entries[name] = self._entries[name].add_(chosen) if name in self._entries else chosen
            return
        weights = self._registration.shares.owned_range(parameter)
        mine = _reduce_to_owner(gradient, weights.numel())
        del gradient  # with its fp32 copy it would be the peak of backward
        infinite = ~_largest(mine).isfinite()
        self._infinite = infinite if self._infinite is None else self._infinite | infinite
        self._rule.receive(name, mine, weights, last=self._is_last())


def _reduce_to_owner(gradient: Tensor, length: int) -> Tensor:
    """Return the mean over ranks of this rank's range of `gradient`: [shape] on every rank -> [length], fp32."""
    ranks = dist.get_world_size()
    chunk = share_size(gradient.numel(), ranks)
    start, stop = own_bounds(gradient.numel())
    assert length == stop - start
    if ranks == 1:
        return gradient.reshape(-1).float()
    flat = torch.zeros(chunk * ranks, dtype=torch.float32, device=gradient.device)
    flat[: gradient.numel()] = gradient.reshape(-1)
    mine = torch.empty(chunk, dtype=torch.float32, device=gradient.device)
    dist.reduce_scatter_tensor(mine, flat)
    return mine[:length].div_(ranks)


def _largest(values: Tensor) -> Tensor:
    """Return the largest of |values| [n], a scalar: infinite or NaN if any is, 0 if there are none. torch.isfinite
    would make several tensors as large as `values`."""
    return torch.linalg.vector_norm(values, float("inf")) if values.numel() else values.new_zeros(())
