"""Find parameters that train by name only: they are in the optimizer, and no gradient ever reaches them.

A model may read the weights of a module past the adapter on it, or never call a module at all. The loss shows nothing.
The optimizer's state does: without a gradient the moments stay zero from the first step on.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from trainer.engine.zero.errors import RegistrationError
from trainer.engine.zero.registration import Registration
from trainer.model.blocks import NEW_ROWS

# Steps without a gradient after which one is no longer expected. At the first step of LoRA, one of its two matrices
# has none, because the other is zero.
_PATIENCE = 3
# In fp16 smaller steps leave that other matrix zero.
_LEAST_RATE_IN_FP16 = 1e-6
# These have a gradient only when their token occurs, which may be never.
_RARE = ("trainable_tokens_delta", NEW_ROWS)


class Silence:
    """Find registered parameters that have had no gradient yet, at growing intervals, on all ranks together."""

    def __init__(self, registration: Registration, rare: Collection[str] = ()) -> None:
        """Look at no parameter that `rare` names."""
        self._registration = registration
        self._least_rate = _LEAST_RATE_IN_FP16 if registration.engine.fp16_enabled() else 0.0
        self._heard = {_shared_name(name) for name in rare}
        self._silent: dict[str, int] = {}  # steps, by name
        self._steps = 0  # since the last look
        self._next = _PATIENCE

    def after_step(self, rate: float) -> list[str]:
        """Call after each applied step at learning rate `rate`. Returns what `look` does when it is due: every time
        after twice as many steps as before."""
        self._steps += rate > self._least_rate
        if self._steps < self._next:
            return []
        self._next *= 2
        return self.look()

    def look(self) -> list[str]:
        """Return the parameters that are found to have had no gradient, each once. Collective; call it before what is
        registered changes."""
        names = [
            name
            for group in self._registration.groups
            for name in group
            if _shared_name(name) not in self._heard and not any(rare in name for rare in _RARE)
        ]
        steps, self._steps = self._steps, 0
        if not names or not steps:
            return []
        device = get_accelerator().current_device_name()
        moving, judged = self._moments(names)
        flags = torch.stack([moving.get(name, torch.tensor(False)).to(device) for name in names])
        votes = torch.cat([flags, torch.tensor([judged], device=device)]).to(torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        *heard, any_judged = votes.tolist()
        if not any_judged:  # an optimizer without state that could tell
            return []
        self._heard |= {_shared_name(name) for name, vote in zip(names, heard, strict=True) if vote}
        found = []
        for name in names:
            if _shared_name(name) not in self._heard:
                self._silent[name] = self._silent.get(name, 0) + steps
                if self._silent[name] >= _PATIENCE:
                    found.append(name)
        self._heard |= {_shared_name(name) for name in found}
        return found

    def _moments(self, names: list[str]) -> tuple[dict[str, Tensor], bool]:
        """Return whether any moment on this rank is not zero, by name; and whether there are moments at all."""
        wanted, moving, judged = set(names), {}, False
        for number, group in enumerate(self._registration.groups):
            if not wanted & group.keys():
                continue
            with self._registration.resident(number):
                try:
                    pieces = self._registration.slices(number)
                except RegistrationError:  # state that is not one value for each weight
                    continue
                for piece in pieces:
                    moments = [tensor for key, tensor in piece.tensors.items() if key != "master"]
                    judged = judged or bool(moments)
                    if piece.name in wanted and moments:
                        moving[piece.name] = torch.stack([moment.any() for moment in moments]).any()
        return moving, judged


def _shared_name(name: str) -> str:
    """Return one name for all experts of a list: an expert may get no tokens for a long time."""
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", name)
