"""`prepare` a model and `attach` to its DeepSpeed engine: the wiring of everything in this folder.

    sparse = trainer.prepare(model, selector=Uniform(blocks=2, interval=20))
    engine, *_ = deepspeed.initialize(model=model, optimizer=AdamW(sparse.param_groups(...)), config=...)
    sparse.attach(engine)

From then on `engine.forward`, `backward` and `step` are used as ever; the active set is replaced at the start of the
first training forward of each interval.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, Literal, Protocol

import torch
from deepspeed import DeepSpeedEngine
from torch import nn

from trainer import blocks as structure_of
from trainer.blocks import Block
from trainer.engine import bank as banks
from trainer.engine.bank import Bank
from trainer.engine.depth import FetchOrder
from trainer.engine.experts import gather_experts_together, refuse_waiting_experts
from trainer.engine.guard import Guard
from trainer.engine.local_gradients import LocalGradients
from trainer.engine.probe import LossFunction, Prober
from trainer.engine.registration import Registration, Slice, register
from trainer.engine.rounding import RoundingLoss
from trainer.engine.suppression import (
    has_adapters,
    refuse_unsuppressed,
    suppressed_adapters,
    suppressed_residuals,
)
from trainer.selectors import Selector
from trainer.updates import Dense, UpdateRule

logger = logging.getLogger(__name__)

# A parameter of the model while DeepSpeed builds its optimizer, where an update rule leaves that nothing else.
_PLACEHOLDER = "strata_placeholder"
# By which DeepSpeed's engine counts.
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


class StateSource(Protocol):
    """Where masters and moments are read from, parameter by parameter."""

    def has_state(self, names: Sequence[str]) -> bool:
        """Whether there are masters of all of `names`."""

    def layout(self, names: Sequence[str]) -> tuple[set[str], dict[str, float]]:
        """Which moments there are of `names`, which form a group, and their common scalars."""

    def load(self, slices: Sequence[Slice]) -> None:
        """Write what there is of the slices' ranges into their tensors."""

    def entries(self, name: str) -> dict[str, torch.Tensor]:
        """All ranks' `indices` and values of a parameter that a sparse update rule trains; empty for any other."""


def prepare(
    model: nn.Module,
    *,
    selector: Selector,
    update: UpdateRule | None = None,
    bank: Bank | str = "discard",
    always_on: Iterable[str] | None = None,
    substrate: Literal["full", "adapter"] = "full",
    blocks: str | None = None,
) -> Sparse:
    """Freeze `model` to the first active set, so that DeepSpeed allocates state for that and nothing more.

    Call it before `deepspeed.initialize`. `always_on` names the parts outside the blocks that train in every interval
    (`embeddings`, `head`, `norm`; by default all of them, and with adapters what requires gradients there, as PEFT's
    `modules_to_save` do); `blocks` is the module path of the block list where it is ambiguous.

    Raises `trainer.blocks.BlockError` where the model's structure does not allow the choice, and `ValueError` from the
    selector, for instance for more blocks than there are, or for adapters that `substrate` does not expect.
    """
    return Sparse(
        model,
        selector=selector,
        update=update or Dense(),
        bank=banks.build(bank) if isinstance(bank, str) else bank,
        always_on=structure_of.PARTS if always_on is None and substrate == "full" else always_on,
        substrate=substrate,
        blocks=blocks,
    )


class Sparse:
    """A model of which a few blocks train at a time.

    Optimizer groups are slots: their number and order never change. Each active block has one group of decayed and
    one of other parameters, followed by the same for each always-on part.
    """

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
    ) -> None:
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
        reachable = selector.reachable(len(self.blocks))
        self.update.prepare(self._ever_outside_optimizer(), reachable=self._ever_outside_optimizer(reachable).keys())
        self.bank = bank
        self.interval = 0
        self.times_active = [0] * len(self.blocks)
        selector.num_active(len(self.blocks))  # refuse before anything is frozen
        self._slots: list[int] = list(selector.select(0, len(self.blocks)))
        self._classes = self._decay_classes()
        self._engine: DeepSpeedEngine | None = None
        self._registration: Registration | None = None
        self._placeholder = self._choose_placeholder()
        self._prober: Prober | None = None
        self._rounding: RoundingLoss | None = None
        self._observed_at = -1
        self._applied = True  # the last optimizer step, by the update rule
        self._before_change: list[Callable[[], object]] = []
        # Of the first group's learning rate; other than 1 where no block has a group and always-on parts differ.
        self._rate_of_blocks = 1.0
        _let_backward_end(model)
        gather_experts_together(model)
        model.requires_grad_(False)
        for parameter in self.trainable_parameters():
            parameter.requires_grad_(True)

    @property
    def active(self) -> tuple[int, ...]:
        """Indices of the blocks that train now, ascending."""
        return tuple(sorted(self._slots))

    @property
    def steps(self) -> int:
        """Optimizer steps applied so far; steps skipped for overflow do not count."""
        engine = self._attached()
        return engine.global_steps - engine.skipped_steps

    @property
    def rounded_away(self) -> float | None:
        """Share (0 to 1) of the last interval's update that the last switch lost to the weights' precision, sampled on
        this rank; None where nothing can be lost (fp32 weights, or a bank that keeps masters) or nothing was yet."""
        return self._rounding.share if self._rounding is not None else None

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What trains now: the active blocks' parameters and the always-on ones."""
        active = [p for index in self._slots for p in self.blocks[index].parameters.values()]
        return active + [p for part in self.always_on.values() for p in part.values()]

    def ever_in_optimizer(self) -> list[nn.Parameter]:
        """What DeepSpeed's optimizer may ever hold."""
        if self._placeholder is not None:
            return [self._placeholder]
        blocks = [p for block in self.blocks for p in self._registered_parameters(block.index).values()]
        return blocks + [p for part in self.always_on.values() for p in part.values()]

    def held(self) -> dict[str, list[torch.Tensor]]:
        """The live tensors of the model's state on this rank, by kind: weights, gradients, masters, moments, and of a
        sparse update rule indices."""
        held = {"indices": []} | self._registered().held()
        held["gradients"] = [*held["gradients"], *self._local.held()]
        return {kind: [*tensors, *self.update.held().get(kind, [])] for kind, tensors in held.items()}

    @property
    def device(self) -> torch.device:
        """Where the engine computes."""
        return self._attached().device

    # --- for checkpoints ---------------------------------------------------------------------------------------

    def owned(self, parameter: nn.Parameter) -> tuple[int, torch.Tensor]:
        """This rank's share of a parameter's weights: where it begins in the flat parameter, and the live range.
        Shares of all ranks make the whole; who writes into them calls `publish` afterwards."""
        registration = self._registered()
        return registration.owned_start(parameter), registration.owned_range(parameter)

    def entries(self, name: str, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """What a sparse update rule keeps of this rank's share of a parameter: flat `indices` in it, and as many values
        of `weight` and whatever else; empty where it keeps nothing."""
        kept = self.update.slices(name)
        if not kept:
            return {}
        start, weights = self.owned(parameter)
        return {**kept, "weight": weights[(kept["indices"] - start).to(weights.device)]}

    def publish(self, parameter: nn.Parameter) -> None:
        """Give every rank that stores `parameter` the shares of the others. Collective."""
        self._registered().publish(parameter)

    def optimizer_slices(self, names: Collection[str]) -> Iterator[Slice]:
        """This rank's masters and moments of the parameters `names`, live and banked; to be read until the next change
        (`before_change`)."""
        registration = self._registered()
        self.bank.wait()
        for number, group in enumerate(self.groups()):
            if any(name in names for name in group):
                with registration.resident(number) as passing:
                    pieces = [registration.own_part(p) for p in registration.slices(number) if p.name in names]
                    yield from (piece.cloned() if passing else piece for piece in pieces)
        yield from (registration.own_part(piece) for piece in self.bank.slices(names))

    def before_change(self, action: Callable[[], object]) -> None:
        """Call `action` once, before weights or optimizer state change next: by a step, a switch, or what is loaded."""
        self._before_change.append(action)

    def change(self) -> None:
        """Whoever is about to change weights or optimizer state says so by this, and then may."""
        while self._before_change:
            self._before_change.pop()()

    def state_dict(self) -> dict[str, Any]:
        """Everything but tensors, as JSON-compatible values, the same on every rank."""
        engine = self._attached()
        return {
            "rule": type(self.update).__name__,
            "slots": list(self._slots),
            "interval": self.interval,
            "times_active": list(self.times_active),
            "selector": self.selector.state_dict(),
            "update": self.update.state_dict(),
            "observed_at": self._observed_at,
            "probes": self._prober.taken if self._prober is not None else 0,
            "learning_rates": [float(group["lr"]) for group in engine.basic_optimizer.param_groups],
            "engine": {name: getattr(engine, name) for name in _COUNTERS},
            "loss_scale": self._registered().loss_scale_state(),
            "rounded_away": self.rounded_away,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], source: StateSource) -> None:
        """Go on where `state_dict` was taken, with weights already in place and masters and moments from `source`.

        Collective. Blocks return to the slots that they had, because sums over groups depend on their order.
        """
        engine, registration = self._attached(), self._registered()
        self.change()
        for name in _COUNTERS:
            setattr(engine, name, state["engine"][name])
        # Steps end where this is a multiple of the accumulation, which may be another one now.
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        for group, rate in zip(engine.basic_optimizer.param_groups, state["learning_rates"], strict=True):
            group["lr"] = rate
        registration.restore_loss_scale(state["loss_scale"])
        self.selector.load_state_dict(state["selector"])
        self.interval, self.times_active = state["interval"], list(state["times_active"])
        self._observed_at = state["observed_at"]
        if self._prober is not None:
            self._prober.skip(state["probes"])
        if self.bank.keeps:
            self.bank.clear()  # of a life that goes on in another way
            self._fill_bank(state["slots"], source)
        self._arrange(state["slots"])
        for number, group in enumerate(self.groups()):
            self._load_group(number, group, source)
        self.update.load_state_dict(state.get("update", {}))
        active = self._outside_optimizer()
        for name in self._ever_outside_optimizer():
            kept = source.entries(name)
            if kept:
                # What was frozen since a file was written has lost its state, unless a bank keeps it.
                wanted = kept.keys() - {"weight"} if self.bank.keeps or name in active else {"indices"}
                self.update.restore(name, {key: value for key, value in kept.items() if key in wanted})
        self._local.replace(self._outside_optimizer(), keep=self.bank.keeps)
        self._rounding = self._follow_rounding()
        if self._rounding is not None:
            self._rounding.share = state["rounded_away"]
        self._guard.after_switch(interval=self.interval, step=self.steps, active=self.active, expected=self._expected())

    def _fill_bank(self, slots: Sequence[int], source: StateSource) -> None:
        """By way of a slot each, which has the layout that the bank keeps slices of."""
        for block in self.blocks:
            names = [name for group in self._block_groups(block.index) for name in group]
            if block.index in slots or not source.has_state(names):
                continue
            slot = self._slots.index(block.index) if block.index in self._slots else 0
            self._move(slot, block.index)
            for number, group in zip(self._numbers(slot), self._block_groups(block.index), strict=True):
                self._load_group(number, group, source)
                with self._registered().resident(number):
                    self.bank.put(self._registered().slices(number))

    def _load_group(self, number: int, group: Mapping[str, nn.Parameter], source: StateSource) -> None:
        registration = self._registered()
        with registration.resident(number):
            registration.forget_state(number)  # of a life that goes on in another way
            registration.materialise_state(number, *source.layout(list(group)))
            source.load(registration.slices(number))

    def _arrange(self, slots: Sequence[int]) -> None:
        """Every block into its slot; one that stands in another's way moves through a block that does not train."""
        while self._slots != list(slots):
            free = [slot for slot, index in enumerate(slots) if index not in self._slots]
            if free:
                self._move(free[0], slots[free[0]])
            else:  # they stand in each other's slots
                wrong = next(slot for slot, index in enumerate(slots) if self._slots[slot] != index)
                self._move(wrong, next(i for i in range(len(self.blocks)) if i not in self._slots))

    def _move(self, slot: int, index: int) -> None:
        """Block `index` into a slot, with fresh state; what was there is frozen and its state forgotten."""
        if self._slots[slot] == index:
            return
        for number, parameters in zip(self._numbers(slot), self._block_groups(index), strict=True):
            with self._registered().resident(number):
                self._registered().refill(number, parameters)
        self._slots[slot] = index

    def _numbers(self, slot: int) -> range:
        """The optimizer's groups of a slot."""
        return range(slot * len(self._classes), (slot + 1) * len(self._classes))

    def param_groups(
        self, *, lr: float | None = None, weight_decay: float = 0.0, lr_always_on: float | None = None
    ) -> list[dict[str, Any]]:
        """Optimizer groups for the first active set, in the order that every later set keeps.

        Matrices decay by `weight_decay`, vectors (norms, biases) do not. `lr` and `lr_always_on` (for the always-on
        parts) default to the optimizer's.
        """
        if lr and lr_always_on and not any(label.startswith("slot") for label, _ in self._labels()):
            self._rate_of_blocks = lr / lr_always_on
        groups = []
        for (label, decayed), parameters in zip(self._labels(), self.groups(), strict=True):
            group: dict[str, Any] = {
                "params": list(parameters.values()),
                "weight_decay": weight_decay if decayed else 0.0,
            }
            rate = lr if label.startswith("slot") or lr_always_on is None else lr_always_on
            if rate is not None:
                group["lr"] = rate
            groups.append(group | {"name": label})
        if not groups:
            raise ValueError(
                "nothing is left for the optimizer: choose an always-on part, or an update rule that registers tensors"
            )
        if self._placeholder is not None and self._engine is None:
            self.model.register_parameter(_PLACEHOLDER, self._placeholder)
        return groups

    def attach(
        self,
        engine: DeepSpeedEngine,
        *,
        guard_every: int = 50,
        probe_batches: Iterator[Any] | None = None,
        loss_function: LossFunction | None = None,
    ) -> None:
        """Take `engine` over: from now on the active set follows the selector.

        `guard_every` is the number of steps between sampled checks of what moved (0: none; ranks and registration
        are compared at every switch regardless). A selector that measures needs `probe_batches`, an endless
        iterator, and `loss_function(module, batch) -> (summed loss, target tokens)`.

        An engine that was built with more trainable parameters is shrunk, and the log says what that peak was.
        `engine.save_checkpoint` and `load_checkpoint` keep their signatures and write and read Strata's format.
        Raises `trainer.engine.registration.RegistrationError` for an engine that cannot be switched.
        """
        if self._engine is not None:
            raise RuntimeError("already attached: prepare the model once for each engine")
        if (probe_batches is None) != (loss_function is None):
            raise ValueError("attach() got one of probe_batches and loss_function: it takes both or neither")
        if self.selector.measures and probe_batches is None:
            raise self._cannot_measure()
        if self._sparse_rule and engine.gradient_clipping() != self.update.gradient_clipping:
            raise ValueError(
                f"gradient_clipping is {engine.gradient_clipping()}, but {type(self.update).__name__} keeps gradients "
                f"that DeepSpeed's norm does not see: set gradient_clipping to {self.update.gradient_clipping}, which "
                "is the rule's"
            )
        if self._sparse_rule and engine.fp16_enabled():
            raise ValueError(f"fp16 gradients are scaled, which {type(self.update).__name__} does not see: use bf16")
        refuse_waiting_experts(engine, sparse_rule=self._sparse_rule)
        registration = register(engine, self.groups())
        if registration.rebuilt:
            logger.warning(
                "the engine was built with other trainable parameters than the first active set and has been shrunk. "
                "Call trainer.prepare before deepspeed.initialize to avoid that peak: masters and gradients of %d "
                "parameters instead of %d",
                registration.numel_before,
                sum(structure_of.full_numel(p) for p in self.trainable_parameters()),
            )
        self._engine, self._registration = engine, registration
        self._fetch_order = FetchOrder(self.blocks)
        self._rounding = self._follow_rounding()
        if self._placeholder is not None:
            delattr(self.model, _PLACEHOLDER)  # nothing else is to see it
        self._local = LocalGradients(self.update, registration, is_last=self._is_last_micro_batch)
        self._local.replace(self._outside_optimizer(), keep=self.bank.keeps)
        self._guard = Guard(registration, self.blocks, every=guard_every, expect_motion=not self._sparse_rule)
        if probe_batches is not None and loss_function is not None:
            self._prober = Prober(
                registration,
                self.blocks,
                suppress=suppressed_adapters if self.substrate == "adapter" else suppressed_residuals,
                batches=probe_batches,
                loss_function=loss_function,
            )
        self._guard.after_switch(interval=0, step=0, active=self.active, expected=self._expected())
        self._wrap_forward(engine)
        self._wrap_step(engine)
        self._replace_checkpoint_calls(engine)

    # --- during training ---------------------------------------------------------------------------------------

    def _before_forward(self) -> None:
        # Of the module: `engine.eval()` leaves the engine's own flag alone.
        if not (self._attached().module.training and torch.is_grad_enabled()):
            return  # evaluation sees the set that has just trained
        if self._placeholder is not None:
            self._registered().expect_no_gradients()
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
        if self._prober is None:
            raise self._cannot_measure()
        self.selector.observe(wanted, self._prober.measure(wanted))

    def _cannot_measure(self) -> ValueError:
        return ValueError(f"{type(self.selector).__name__} measures: give attach() probe_batches and loss_function")

    @torch.no_grad()
    def _switch(self, interval: int, step: int) -> None:
        """Replace the active set. Blocks that stay keep their slot and with it their state, under every bank."""
        registration = self._registered()
        self.change()
        moved, problem = self._guard.before_switch()
        drawn = self.selector.select(interval, len(self.blocks))
        entering = [index for index in drawn if index not in self._slots]
        for slot, index in enumerate(self._slots):
            if index not in drawn:
                self._refill(registration, slot, entering.pop(0))
        if self._rounding is not None:
            self._rounding.finish()
        self._local.replace(self._outside_optimizer(), keep=self.bank.keeps)
        order = self._fetch_order.after_switch(registration.fetch_order(), lowest=self.active[0])
        if order is not None:
            registration.expect_fetch_order(order)
        self.interval = interval
        if self._guard.due(step):
            self.bank.wait()  # the guard looks at masters that may still be on their way in
        self._guard.after_switch(
            interval=interval, step=step, active=self.active, expected=self._expected(), moved=moved, problem=problem
        )

    def _refill(self, registration: Registration, slot: int, index: int) -> None:
        self._slots[slot] = index
        for number, parameters in zip(self._numbers(slot), self._block_groups(index), strict=True):
            with registration.resident(number):
                self._replace(registration, number, parameters)

    def _replace(self, registration: Registration, number: int, parameters: dict[str, nn.Parameter]) -> None:
        if self.bank.keeps:
            self.bank.put(registration.slices(number))
        elif self._rounding is not None:
            self._rounding.leave(number, registration.masters(number))
        registration.refill(number, parameters)
        if self._rounding is not None:
            self._rounding.enter(number, registration.masters(number))
        if self.bank.holds(list(parameters)):
            registration.materialise_state(number, *self.bank.layout(list(parameters)))
            self.bank.take(registration.slices(number))

    def _wrap_forward(self, engine: DeepSpeedEngine) -> None:
        inner = engine.forward  # not a module hook: those are passed over by whoever calls `engine.forward` itself

        @wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._before_forward()
            return inner(*args, **kwargs)

        engine.forward = forward  # type: ignore[method-assign]

    def _wrap_step(self, engine: DeepSpeedEngine) -> None:
        inner, was_applied = engine.step, engine.was_step_applied

        @wraps(inner)
        def step(*args: Any, **kwargs: Any) -> None:
            if self.steps // self.selector.interval != self.interval:
                raise RuntimeError(
                    f"step {self.steps} begins interval {self.steps // self.selector.interval}, but no switch has "
                    "happened: train through engine(...) or engine.forward(...), in training mode (engine.train())"
                )
            self.bank.wait()
            # A loop that manages accumulation itself calls this at boundaries only.
            boundary = not engine.managed_gradient_accumulation() or engine.is_gradient_accumulation_boundary()
            if boundary:
                self.change()
            # Before the step, which moves the schedule on.
            learning_rate = engine.basic_optimizer.param_groups[0]["lr"] * self._rate_of_blocks
            inner(*args, **kwargs)
            self._registered().after_step()
            if boundary:
                by_deepspeed = was_applied()
                self._applied = self._local.finish(applied=by_deepspeed, learning_rate=learning_rate)
                engine.skipped_steps += by_deepspeed and not self._applied
            if engine.was_step_applied():
                self._guard.note_learning_rate(learning_rate)
                for index in self._slots:
                    self.times_active[index] += 1

        engine.step = step  # type: ignore[method-assign]
        # DeepSpeed does not see the gradients of a sparse update rule, for which a step may be skipped as well.
        engine.was_step_applied = lambda: was_applied() and self._applied  # type: ignore[method-assign]

    def _is_last_micro_batch(self) -> bool:
        engine = self._attached()
        # A loop that manages accumulation itself says so only when it steps.
        return engine.managed_gradient_accumulation() and engine.is_gradient_accumulation_boundary()

    def _replace_checkpoint_calls(self, engine: DeepSpeedEngine) -> None:
        from trainer.checkpoint.engine_calls import EngineCalls  # which knows this module

        calls = EngineCalls(self, engine)
        engine.save_checkpoint = calls.save_checkpoint  # type: ignore[method-assign]
        engine.load_checkpoint = calls.load_checkpoint  # type: ignore[method-assign]

    # --- groups ------------------------------------------------------------------------------------------------

    @property
    def _sparse_rule(self) -> bool:
        return any(self.update.in_optimizer(b) != set(b.parameters) for b in self.blocks)

    def _registered_parameters(self, index: int) -> dict[str, nn.Parameter]:
        block = self.blocks[index]
        kept = self.update.in_optimizer(block)
        return {name: p for name, p in block.parameters.items() if name in kept}

    def _decay_classes(self) -> tuple[bool, ...]:
        """The decay classes that every block has; groups are never empty, DeepSpeed drops those."""
        found = {
            tuple(sorted({structure_of.decays(p) for p in self._registered_parameters(b.index).values()}, reverse=True))
            for b in self.blocks
        }
        if len(found) != 1:
            raise structure_of.BlockError(
                "some blocks have only matrices or only vectors to train and others both; their groups cannot be slots"
            )
        return found.pop()

    def _block_groups(self, index: int) -> list[dict[str, nn.Parameter]]:
        parameters = self._registered_parameters(index)
        return [{n: p for n, p in parameters.items() if structure_of.decays(p) == c} for c in self._classes]

    def _always_on_groups(self) -> list[tuple[str, bool, dict[str, nn.Parameter]]]:
        if self._placeholder is not None:
            return [(_PLACEHOLDER, False, {_PLACEHOLDER: self._placeholder})]
        groups = []
        for part, parameters in self.always_on.items():
            for decayed in (True, False):
                chosen = {n: p for n, p in parameters.items() if structure_of.decays(p) == decayed}
                if chosen:
                    groups.append((part, decayed, chosen))
        return groups

    def groups(self) -> list[dict[str, nn.Parameter]]:
        """What the optimizer holds now, by group, in the order of `param_groups`."""
        slots = [group for index in self._slots for group in self._block_groups(index)]
        return slots + [group for _, _, group in self._always_on_groups()]

    def _labels(self) -> list[tuple[str, bool]]:
        slots = [(f"slot{slot}", decayed) for slot in range(len(self._slots)) for decayed in self._classes]
        return slots + [(part, decayed) for part, decayed, _ in self._always_on_groups()]

    def _expected(self) -> list[list[nn.Parameter]]:
        return [list(group.values()) for group in self.groups()]

    def _outside_optimizer(self) -> dict[str, nn.Parameter]:
        """What the update rule trains now."""
        return self._ever_outside_optimizer(self._slots)

    def _ever_outside_optimizer(self, indices: Iterable[int] | None = None) -> dict[str, nn.Parameter]:
        """The same with every block active, or with the blocks `indices`."""
        blocks = self.blocks if indices is None else [self.blocks[index] for index in indices]
        found = {n: p for b in blocks for n, p in b.parameters.items() if n not in self.update.in_optimizer(b)}
        if self.update.whole_model:
            found |= {name: p for part in self.always_on.values() for name, p in part.items()}
        return found

    def _choose_placeholder(self) -> nn.Parameter | None:
        """For DeepSpeed's optimizer, which must hold something, where the update rule trains everything itself. It
        takes no part in the model, so that it has no gradient and stays zero."""
        if not self.update.whole_model:
            return None
        like = next(iter(self.blocks[0].parameters.values()))
        return nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))

    def _follow_rounding(self) -> RoundingLoss | None:
        """Where switches drop masters that hold more than the weights do."""
        registration, dtype = self._registered(), next(iter(self.blocks[0].parameters.values())).dtype
        if self.bank.keeps or dtype is torch.float32:
            return None
        rounding = RoundingLoss(dtype)
        for number in range(len(self._slots) * len(self._classes)):
            with registration.resident(number):
                rounding.enter(number, registration.masters(number))
        return rounding

    def _attached(self) -> DeepSpeedEngine:
        if self._engine is None:
            raise RuntimeError("not attached to an engine yet: call attach(engine) after deepspeed.initialize")
        return self._engine

    def _registered(self) -> Registration:
        assert self._registration is not None
        return self._registration


def _let_backward_end(model: nn.Module) -> None:
    """Remove the hook that makes embeddings require gradients, for which backward would run down to the first block.

    transformers and PEFT install it with activation checkpointing, because reentrant checkpoints need it; those must
    keep it.
    """
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    settings = [getattr(function, "keywords", {}) for function in functions if function is not None]
    if settings and not any(keywords.get("use_reentrant", True) for keywords in settings):
        model.disable_input_require_grads()
