"""Connect a model, of which a few blocks train at a time, to its DeepSpeed engine, and this folder's parts to both.

Once attached, `engine.forward`, `backward` and `step` are used as before. The active set is replaced at the start of
the first training forward of each interval.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Literal

import torch
from deepspeed import DeepSpeedEngine
from torch import nn

from trainer.engine.attach_checks import cannot_measure, check_registration, refuse_unfit_engine, refuse_unfit_probes
from trainer.engine.banks import Bank
from trainer.engine.banks.discard import redrawn_as_recorded
from trainer.engine.engine_state import engine_state, restore_engine_state
from trainer.engine.experts import gather_experts_together, reduce_experts_together
from trainer.engine.fetch_order import FetchOrder
from trainer.engine.guard import Guard
from trainer.engine.input_gradients import let_backward_end
from trainer.engine.inspection import inspecting
from trainer.engine.local_gradients import LocalGradients
from trainer.engine.probe import LossFunction, Prober
from trainer.engine.slots import PLACEHOLDER, Slots, trained_by_rule
from trainer.engine.suppression import refuse_unsuppressed, suppressed_adapters, suppressed_residuals
from trainer.engine.switching import StateSource, Switcher
from trainer.engine.zero.register import register
from trainer.engine.zero.registration import Registration
from trainer.engine.zero.slices import Slice
from trainer.model import blocks as structure_of
from trainer.model.adapters import has_adapters
from trainer.model.blocks import Block
from trainer.selectors import Selector
from trainer.updates import UpdateRule


@dataclass(frozen=True)
class _Attached:
    """Hold what exists once an engine is attached."""

    engine: DeepSpeedEngine
    registration: Registration
    switcher: Switcher
    local: LocalGradients
    guard: Guard
    fetch_order: FetchOrder
    prober: Prober | None


class Sparse:
    """A model of which a few blocks train at a time."""

    def __init__(
        self,
        model: nn.Module,
        *,
        selector: Selector,
        update: UpdateRule,
        bank: Bank,
        always_on: Iterable[str] | None,
        substrate: Literal["full", "adapter"],
        blocks: str | None,
        on_attach: Callable[[Sparse, DeepSpeedEngine], None] = lambda sparse, engine: None,
    ) -> None:
        """See `trainer.api.prepare`. `on_attach` is called at the end of `attach`."""
        if substrate == "full" and has_adapters(model):
            raise ValueError("this model has adapters: pass substrate='adapter', or the model without them")
        self.structure = structure_of.find(model, path=blocks, substrate=substrate)
        self.blocks: tuple[Block, ...] = self.structure.blocks
        self.substrate = substrate
        self.model = model
        if always_on is None:
            self.always_on = {part: found for part, found in self.structure.outside.items() if found}
        else:
            self.always_on = structure_of.always_on(self.structure, always_on)
        if selector.measures and substrate == "adapter":
            refuse_unsuppressed(self.blocks)
        self.selector = selector
        self.update = update
        self.bank = bank
        self._on_attach = on_attach
        num_blocks = len(self.blocks)
        outside = partial(trained_by_rule, self.blocks, self.always_on, update)
        update.bind(outside(range(num_blocks)), reachable=outside(selector.reachable(num_blocks)).keys())
        selector.num_active(num_blocks)  # raises for too few blocks, before anything is frozen
        self._slots = Slots(self.blocks, self.always_on, update, selector.select(0, num_blocks))
        self._sparse_rule = bool(self._slots.of_rule(range(num_blocks)))
        self.interval = 0
        self.times_active = [0] * num_blocks
        self._parts: _Attached | None = None  # read it through `_attached`
        self._observed_at = -1
        self._applied = True  # whether the update rule applied its part of the last optimizer step
        self._before_change: list[Callable[[], object]] = []
        # What happens to the state of a block drawn twice in a row. A checkpoint may override the bank's setting.
        self.redrawn = bank.redrawn
        # Ratio of the blocks' learning rate to that of group 0. Not 1 only if no group belongs to a block, and the
        # always-on parts have a rate of their own.
        self._rate_of_blocks = 1.0
        let_backward_end(model)
        gather_experts_together(model)
        model.requires_grad_(False)
        for parameter in self.trainable_parameters():
            parameter.requires_grad_(True)

    @property
    def active(self) -> tuple[int, ...]:
        """Return the indices of the blocks that train now, in ascending order."""
        return self._slots.active

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps applied so far. Steps skipped for overflow do not count."""
        engine = self._attached().engine
        return engine.global_steps - engine.skipped_steps

    @property
    def rounded_away(self) -> float | None:
        """Return the share (0 to 1) of the last interval's update that the last switch lost to the precision of the
        weights, sampled on this rank.

        None if nothing can be lost (fp32 weights, or a bank that keeps masters), and before the first switch that could
        lose something.
        """
        return None if self._parts is None else self._parts.switcher.rounded_away

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return what trains now: the active blocks' parameters and the always-on ones."""
        return self._slots.trainable()

    def ever_in_optimizer(self) -> list[nn.Parameter]:
        """Return all parameters that DeepSpeed's optimizer may ever contain."""
        return self._slots.ever_in_optimizer()

    def trained_by_rule(self, indices: Iterable[int]) -> dict[str, nn.Parameter]:
        """Return what the update rule trains outside DeepSpeed's optimizer if the blocks `indices` are active."""
        return self._slots.trained_by_rule(indices)

    def groups(self) -> list[dict[str, nn.Parameter]]:
        """Return what the optimizer contains now, by group, in the order of `param_groups`."""
        return self._slots.groups()

    def held(self) -> dict[str, list[torch.Tensor]]:
        """Return the live tensors of the model's state on this rank, by kind: weights, gradients, masters, moments, and
        the indices of a sparse update rule."""
        attached = self._attached()
        held: dict[str, list[torch.Tensor]] = {"indices": []} | attached.registration.held()
        held["gradients"] = [*held["gradients"], *attached.local.held()]
        return {kind: [*tensors, *self.update.held().get(kind, [])] for kind, tensors in held.items()}

    @property
    def state_names(self) -> frozenset[str]:
        """Return the names of the optimizer state that has one value for each weight, such as `exp_avg`."""
        return frozenset(self._attached().registration.layout.per_weight)

    @property
    def device(self) -> torch.device:
        """Return the device on which the engine computes."""
        return self._attached().engine.device

    def inspecting(self) -> AbstractContextManager[None]:
        """While inside, the engine's module can be run forward and backward without any effect on training.

        Compute gradients with `torch.autograd.grad`, which does not write to parameters.
        """
        return inspecting(self._attached().registration)

    # --- for checkpoints ---------------------------------------------------------------------------------------

    def owned(self, parameter: nn.Parameter) -> tuple[int, torch.Tensor]:
        """Return this rank's share of a parameter: its start in the flat parameter, and its live values (1-D).

        The shares of all ranks make up the parameter. After writing to a share, call `publish`.
        """
        shares = self._attached().registration.shares
        return shares.owned_start(parameter), shares.owned_range(parameter)

    def entries(self, name: str, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Return what a sparse update rule stores for this rank's share of a parameter: `indices` into the flat
        parameter, and under `weight` and every other key one value for each. Empty if it stores nothing."""
        start, weights = self.owned(parameter)
        kept = self.update.slices(name)
        if not kept:
            return {}
        return {**kept, "weight": weights[(kept["indices"] - start).to(weights.device)]}

    def publish(self, parameter: nn.Parameter) -> None:
        """Copy each rank's share of `parameter` to the other ranks that store it. Collective."""
        self._attached().registration.shares.publish(parameter)

    def optimizer_slices(self, names: Collection[str]) -> Iterator[Slice]:
        """Yield this rank's masters and moments of the parameters `names`, live and banked. They are valid until the
        next change (`before_change`)."""
        registration = self._attached().registration
        self.bank.wait()
        for number, group in enumerate(self.groups()):
            if any(name in names for name in group):
                with registration.resident(number) as reused:
                    pieces = [registration.own_part(p) for p in registration.slices(number) if p.name in names]
                    yield from (piece.cloned() if reused else piece for piece in pieces)
        yield from (registration.own_part(piece) for piece in self.bank.slices(names))

    def before_change(self, action: Callable[[], object]) -> None:
        """Register `action` to be called once, before weights or optimizer state change next (step, switch, load)."""
        self._before_change.append(action)

    def change(self) -> None:
        """Call this before you change weights or optimizer state. Runs what `before_change` registered."""
        while self._before_change:
            self._before_change.pop()()

    def state_dict(self) -> dict[str, Any]:
        """Return all state except tensors, as JSON-compatible values that are the same on every rank."""
        attached = self._attached()
        return {
            "rule": type(self.update).__name__,
            "slots": list(self._slots.members),
            "interval": self.interval,
            "times_active": list(self.times_active),
            "selector": self.selector.state_dict(),
            "update": self.update.state_dict(),
            "observed_at": self._observed_at,
            "probes": attached.prober.taken if attached.prober is not None else 0,
            **engine_state(attached.engine),
            "rounded_away": self.rounded_away,
            "redrawn": self.redrawn,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], source: StateSource) -> None:
        """Resume where `state_dict` was called. Weights are already in place; masters and moments are in `source`.

        Blocks return to the slots that they were in, because sums over groups depend on the blocks' order. Call
        `compare_ranks` afterwards.
        """
        attached = self._attached()
        switcher = attached.switcher
        self.change()
        attached.registration.drop_gradients()
        restore_engine_state(attached.engine, state)
        self.selector.load_state_dict(state["selector"])
        self.interval, self.times_active = state["interval"], list(state["times_active"])
        if self.redrawn is not None:
            self.redrawn = redrawn_as_recorded(state, self.bank, warn=self.selector.changes(len(self.blocks)))
        self._observed_at = state["observed_at"]
        if attached.prober is not None:
            attached.prober.skip(state["probes"])
        switcher.restore(state["slots"], source)
        self.update.load_state_dict(state.get("update", {}))
        active = self._slots.trained_by_rule()
        for name in self._slots.trained_by_rule(range(len(self.blocks))):
            stored = source.entries(name)
            if stored:
                # Parameters that were frozen after their file was written lost their state, unless a bank keeps it.
                keys = stored.keys() - {"weight"} if self.bank.keeps or name in active else {"indices"}
                self.update.restore(name, {key: value for key, value in stored.items() if key in keys})
        attached.local.replace(self._slots.trained_by_rule(), keep=self.bank.keeps)
        switcher.measure_rounding()
        switcher.rounded_away = state.get("rounded_away")

    def compare_ranks(self) -> None:
        """Raise `GuardError` on all ranks if their active sets differ, or if the optimizer of any does not contain
        exactly the active set. Collective."""
        guard = self._attached().guard
        guard.after_switch(interval=self.interval, step=self.steps, active=self.active, expected=self.groups())

    def param_groups(
        self, *, lr: float | None = None, weight_decay: float = 0.0, lr_always_on: float | None = None
    ) -> list[dict[str, Any]]:
        """Return the optimizer groups for the first active set, in an order that later sets keep.

        `weight_decay` applies to matrices, not to vectors (norms, biases). `lr` and `lr_always_on` (for the always-on
        parts) default to the optimizer's learning rate.
        """
        if lr and lr_always_on and not self._slots.hold_blocks:
            self._rate_of_blocks = lr / lr_always_on
        groups = self._slots.param_groups(lr=lr, weight_decay=weight_decay, lr_always_on=lr_always_on)
        if not groups:
            raise ValueError(
                "nothing is left for the optimizer: choose an always-on part, or an update rule that registers tensors"
            )
        if self._slots.placeholder is not None and self._parts is None:
            self.model.register_parameter(PLACEHOLDER, self._slots.placeholder)
        return groups

    def attach(
        self,
        engine: DeepSpeedEngine,
        *,
        guard_every: int = 50,
        probe_batches: Iterator[Any] | None = None,
        loss_function: LossFunction | None = None,
        saves: bool = True,
    ) -> None:
        """Take over `engine`: from now on the active set follows the selector.

        `guard_every` is the number of steps between sampled checks of which weights moved (0: none; ranks and
        registration are compared at every switch regardless). A selector that measures needs `probe_batches`, an
        endless iterator, and `loss_function(module, batch) -> (summed loss, target tokens)`. `saves` is False for a
        loop that never saves a checkpoint: its optimizer may have state that none can store, such as 8-bit moments.

        An engine that was built with more trainable parameters is shrunk; the log states the memory peak before that.
        `engine.save_checkpoint` and `load_checkpoint` keep their signatures and write and read Strata's format.
        Raises `trainer.engine.zero.errors.RegistrationError` for an engine that cannot be switched.
        """
        if self._parts is not None:
            raise RuntimeError("already attached: prepare the model once for each engine")
        refuse_unfit_probes(self.selector, probe_batches, loss_function)
        refuse_unfit_engine(engine, self.update, sparse_rule=self._sparse_rule)
        reduce_experts_together(engine, sparse_rule=self._sparse_rule)
        registration = register(engine, self.groups())
        trained = sum(structure_of.full_numel(p) for p in self.trainable_parameters())
        banks = self.bank.keeps and self.selector.changes(len(self.blocks))
        check_registration(registration, saves=saves, banks=banks, trained=trained)
        prober = None
        if probe_batches is not None and loss_function is not None:
            suppress = suppressed_adapters if self.substrate == "adapter" else suppressed_residuals
            prober = Prober(
                registration, self.blocks, suppress=suppress, batches=probe_batches, loss_function=loss_function
            )
        guard = Guard(
            registration,
            self.blocks,
            every=guard_every,
            expect_motion=not self._sparse_rule,
            adapters=self.substrate == "adapter",
            rare=[name for part in structure_of.TOWER_PARTS for name in self.always_on.get(part, ())],
        )
        local = LocalGradients(self.update, registration, is_last=partial(_is_last_micro_batch, engine))
        switcher = Switcher(registration, self.bank, self._slots, self.blocks)
        self._parts = _Attached(engine, registration, switcher, local, guard, FetchOrder(self.blocks), prober)
        if self._slots.placeholder is not None:
            delattr(self.model, PLACEHOLDER)  # nothing else should see it
        local.replace(self._slots.trained_by_rule(), keep=self.bank.keeps)
        guard.after_switch(interval=0, step=0, active=self.active, expected=self.groups())
        self._wrap_forward(engine)
        self._wrap_step(self._parts)
        self._on_attach(self, engine)

    # --- during training ---------------------------------------------------------------------------------------

    def _before_forward(self) -> None:
        attached = self._attached()
        # Ask the module: `engine.eval()` does not change the engine's own flag.
        if not (attached.engine.module.training and torch.is_grad_enabled()):
            return  # evaluation sees the set that has just trained
        if self._slots.placeholder is not None:
            attached.registration.expect_no_gradients()
        step = self.steps
        self._measure(step)
        if step // self.selector.interval != self.interval:
            self._switch(step // self.selector.interval, step)

    def _measure(self, step: int) -> None:
        if step == self._observed_at:
            return
        self._observed_at = step
        wanted = self.selector.needs(step)
        if wanted is None:
            return
        prober = self._attached().prober
        if prober is None:
            raise cannot_measure(self.selector)
        self.selector.observe(wanted, prober.measure(wanted))

    @torch.no_grad()
    def _switch(self, interval: int, step: int) -> None:
        """Replace the active set. A block that stays keeps its slot and, unless `redrawn` is "reset", its state."""
        attached = self._attached()
        registration, guard = attached.registration, attached.guard
        self.change()
        moved, problem = guard.before_switch()
        reset = self.redrawn == "reset" and self.selector.changes(len(self.blocks))
        staying = attached.switcher.switch(self.selector.select(interval, len(self.blocks)), reset=reset)
        reset_parameters = self._slots.of_rule(staying if reset else ()).keys()
        attached.local.replace(self._slots.trained_by_rule(), keep=self.bank.keeps, reset=reset_parameters)
        order = attached.fetch_order.after_switch(registration.fetch_order(), lowest=self.active[0])
        if order is not None:
            registration.expect_fetch_order(order)
        self.interval = interval
        if guard.due(step):
            self.bank.wait()  # the guard reads masters that may still be copied from the bank
        guard.after_switch(
            interval=interval, step=step, active=self.active, expected=self.groups(), moved=moved, problem=problem
        )

    def _wrap_forward(self, engine: DeepSpeedEngine) -> None:
        inner = engine.forward  # not a module hook, which a direct call of `engine.forward` would bypass

        @wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._before_forward()
            return inner(*args, **kwargs)

        engine.forward = forward

    def _wrap_step(self, attached: _Attached) -> None:
        engine, registration = attached.engine, attached.registration
        inner, was_applied = engine.step, engine.was_step_applied

        @wraps(inner)
        def step(*args: Any, **kwargs: Any) -> None:
            if self.steps // self.selector.interval != self.interval:
                raise RuntimeError(
                    f"step {self.steps} begins interval {self.steps // self.selector.interval}, but no switch has "
                    "happened: train through engine(...) or engine.forward(...), in training mode (engine.train())"
                )
            self.bank.wait()
            # A loop that manages accumulation itself calls `step` only at boundaries.
            boundary = not engine.managed_gradient_accumulation() or engine.is_gradient_accumulation_boundary()
            if boundary:
                self.change()
                registration.before_step()
            # Read before the step, which advances the schedule.
            learning_rate = engine.basic_optimizer.param_groups[0]["lr"] * self._rate_of_blocks
            inner(*args, **kwargs)
            registration.after_step()
            if boundary:
                by_deepspeed = was_applied()
                self._applied = attached.local.finish(applied=by_deepspeed, learning_rate=learning_rate)
                engine.skipped_steps += by_deepspeed and not self._applied
            if engine.was_step_applied():
                attached.guard.after_step(learning_rate)
                for index in self.active:
                    self.times_active[index] += 1

        engine.step = step
        # A step may also be skipped for gradients of a sparse update rule, which DeepSpeed does not see.
        engine.was_step_applied = lambda: was_applied() and self._applied

    def _attached(self) -> _Attached:
        if self._parts is None:
            raise RuntimeError("not attached to an engine yet: call attach(engine) after deepspeed.initialize")
        return self._parts


def _is_last_micro_batch(engine: DeepSpeedEngine) -> bool:
    # A loop that manages accumulation itself does not say which micro-batch is the last until it calls `step`.
    return engine.managed_gradient_accumulation() and engine.is_gradient_accumulation_boundary()
