"""The optimizer groups of one engine: what all ZeRO stages share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Generic

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload
from torch import Tensor, nn

from trainer.engine.zero.parameters import P
from trainer.engine.zero.rebuild import check_names, check_settings, matches, rebuild
from trainer.engine.zero.shares import Shares
from trainer.engine.zero.slices import Slice, stored
from trainer.engine.zero.state_layout import forget_last_step, state_layout
from trainer.model.blocks import full_numel, full_shape


class Registration(ABC, Generic[P]):
    """The optimizer groups of one engine and what they contain now."""

    stage: str
    shares: Shares[P]

    def __init__(self, engine: DeepSpeedEngine, groups: Sequence[Mapping[str, P]]) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        self.groups: list[dict[str, P]] = [dict(group) for group in groups]
        check_names(engine, self.stage)
        check_settings(engine, self.stage)
        self._check_supported()
        self.numel_before = sum(full_numel(p) for group in self.registered() for p in group)
        self.rebuilt = not matches(self)
        if self.rebuilt:
            rebuild(self)
        self._stack_depth = len(parameter_offload.FWD_MODULE_STACK)
        # id of each parameter with a gradient since the last optimizer step -> the last micro-batch that gave it one.
        self._received: dict[int, int] = {}
        _call_before(self.optimizer, "zero_grad", self._received.clear)  # a loop may call it to drop micro-batches
        device = self.all_masters()[0].device if self.all_masters() else engine.device
        self.layout = state_layout(engine.basic_optimizer, flat=self.stage != "stage 0", device=device)

    # --- what a stage provides ---------------------------------------------------------------------------------

    @abstractmethod
    def registered(self) -> list[list[P]]:
        """Return the parameters that the optimizer steps, by group, read from its own structures."""

    @abstractmethod
    def _master(self, index: int) -> Tensor:
        """Return the flat fp32 tensor (1-D) of group `index` that the basic optimizer steps."""

    @abstractmethod
    def _exchange(self, index: int, leaving: list[P], entering: list[P]) -> None:
        """Give `leaving` storage of their own, move `entering` into the group's buffers, correct the bookkeeping."""

    @abstractmethod
    def _masters_from_weights(self, index: int) -> None:
        """Copy this rank's weights of group `index` into its flat fp32 master."""

    @abstractmethod
    def _ranges(self, index: int) -> list[tuple[int, int, int]]:
        """Return each parameter's offset in the group's flat master and its range [start, stop) of the full shape."""

    def own_part(self, piece: Slice) -> Slice:
        """Return the part of a slice that this rank is to save: all of it if ranks store different ranges."""
        return piece

    def expect_no_gradients(self) -> None:
        """Call before a forward after which no registered parameter gets a gradient."""

    def _check_supported(self) -> None:
        """Raise `RegistrationError` for settings of this stage that cannot be switched."""

    def held(self) -> dict[str, list[Tensor]]:
        """Return the live tensors of the model's state on this rank: weights, gradients, masters, moments."""
        weights = [stored(p) for p in self.engine.module.parameters()]
        state = self.engine.basic_optimizer.state.values()
        return {
            "weights": weights,
            "gradients": self._gradients(),
            "masters": self.all_masters(),
            "moments": [value for entry in state for key, value in entry.items() if key in self.layout.per_weight],
        }

    def fetch_order(self) -> list[nn.Module]:
        """Return the modules in the order in which a recorded step fetched them; empty without such a recording."""
        return []

    def expect_fetch_order(self, order: Sequence[nn.Module]) -> None:
        """Prefetch along `order` from the next step on."""

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.engine.module.parameters() if p.grad is not None]

    def all_masters(self) -> list[Tensor]:
        """Return the flat masters of all groups, and their gradients."""
        masters = [self._master(index) for index in range(len(self.groups))]
        return masters + [m.grad for m in masters if m.grad is not None]

    # --- the switch --------------------------------------------------------------------------------------------

    def refill(self, index: int, parameters: Mapping[str, P]) -> None:
        """Replace what group `index` trains. Masters come from the weights, moments and step counts start at zero."""
        leaving, entering = list(self.groups[index].values()), list(parameters.values())
        for parameter in leaving:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in entering:
            parameter.requires_grad_(True)
        self._exchange(index, leaving, entering)
        self.groups[index] = dict(parameters)
        self.forget_state(index)

    def reset(self, index: int) -> None:
        """Reset group `index`, keeping its parameters: copy masters from the weights, drop the optimizer state."""
        self._masters_from_weights(index)
        self.forget_state(index)

    @contextmanager
    def resident(self, index: int) -> Iterator[bool]:
        """Swap the master and state of group `index` into memory for a `with` block, and write changes back (NVMe
        offload). Yields True if other groups reuse that memory afterwards."""
        yield False

    def masters(self, index: int) -> list[Tensor]:
        """Return this rank's fp32 masters of group `index`, a flat one for each parameter."""
        flat = self._master(index).detach().view(-1)
        return [flat.narrow(0, offset, stop - start) for offset, start, stop in self._ranges(index)]

    def slices(self, index: int) -> list[Slice]:
        """Return this rank's live optimizer state of group `index`, a slice for each parameter."""
        flat = self._master(index)
        moments, scalars = self.layout.split(self.engine.basic_optimizer, flat)
        tensors = {"master": flat.detach()} | moments
        return [
            Slice(
                name=name,
                shape=full_shape(parameter),
                start=start,
                stop=stop,
                tensors={k: v.view(-1).narrow(0, offset, stop - start) for k, v in tensors.items()},
                scalars=scalars,
            )
            for (name, parameter), (offset, start, stop) in zip(
                self.groups[index].items(), self._ranges(index), strict=True
            )
        ]

    def materialise_state(self, index: int, moments: Iterable[str], scalars: Mapping[str, float]) -> None:
        """Make room for banked state: zero moments of the right size, and the given scalars."""
        flat = self._master(index)
        state = self.engine.basic_optimizer.state[flat]
        for key in moments:
            if state.get(key) is None:
                state[key] = self.layout.zeros(flat, key)
        for key, value in scalars.items():
            if torch.is_tensor(state.get(key)):
                state[key].fill_(value)
            else:
                state[key] = self.layout.scalar(key, value)

    def forget_state(self, index: int) -> None:
        """Return group `index` to its state before the first step."""
        self.layout.reset(self.engine.basic_optimizer, self._master(index))

    def check_state(self, what: str) -> None:
        """Raise `RegistrationError` if the optimizer keeps something that `what` cannot store weight by weight."""
        self.layout.refuse_other(what, self.engine.basic_optimizer)

    # --- missing gradients -------------------------------------------------------------------------------------

    def drop_gradients(self) -> None:
        """Drop the gradients of the micro-batches since the last step; no step follows them."""
        self.optimizer.zero_grad()

    def before_step(self) -> None:
        """Ensure that the optimizer step uses only gradients of this step. Call it before the step.

        DeepSpeed (0.19.8) keeps gradients in buffers that outlive a step, and reads all of them in every step. A
        parameter without a gradient would be stepped with that of an earlier step, or of the block that left the slot.
        """
        self._received.clear()

    # --- attaching ---------------------------------------------------------------------------------------------

    def dispose(self) -> None:
        self.optimizer.destroy()
        self.optimizer.__dict__.clear()

    def build(self) -> None:
        """Make a new ZeRO optimizer. The old object takes over its attributes, so references to the old one
        (accelerate's wrapper, the tuple that `deepspeed.initialize` returned) remain valid."""
        zero = self.engine._configure_zero_optimizer(self.engine.basic_optimizer)
        self.optimizer.__dict__ = zero.__dict__  # both names mean one optimizer from here on
        self.engine.optimizer = self.optimizer = zero
        zero.register_grad_acc_post_hook(self.engine._backward_post_hook)

    def own_storage(self, parameters: Iterable[P]) -> None:
        """Give parameters that are views of a flat buffer storage of their own, so that the buffer can be freed."""

    def forget_recomputation(self) -> None:
        """Drop what recomputation left on DeepSpeed's module stack.

        torch's checkpointing stops a recomputed block early, so its post-forward hooks do not run and its entries
        (`parameter_offload.FWD_MODULE_STACK`, 0.19.8) are never popped: the list would grow with every step.
        """
        del parameter_offload.FWD_MODULE_STACK[self._stack_depth :]

    @contextmanager
    def inspection(self) -> Iterator[None]:
        """Run a backward that reduces no gradients, and remove what it left in DeepSpeed's records."""
        try:
            yield
        finally:
            self.forget_recomputation()

    def after_step(self) -> None:
        """Drop what a step leaves in DeepSpeed's own records."""
        self.forget_recomputation()
        if isinstance(self.engine.basic_optimizer, DeepSpeedCPUAdam):
            forget_last_step(self.engine.basic_optimizer)


def _call_before(holder: Any, name: str, action: Callable[[], None]) -> None:
    """Let the method `name` of `holder` call `action` first."""
    inner = getattr(holder, name)

    @wraps(inner)
    def method(*args: Any, **kwargs: Any) -> Any:
        action()
        return inner(*args, **kwargs)

    setattr(holder, name, method)
