"""Find the smallest changes of a configuration that make it fit, tried one by one, then up to four at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trainer.config import ConfigError, RunConfig
from trainer.model.loss import LossError
from trainer.planner.machine import Machine, needed, shortage
from trainer.planner.plan import Plan, Planner

_MOST_AT_ONCE = 4
_SHOWN = 5
# From the cheapest to the most expensive, each with its cost.
_PRESETS = {
    "zero1": "optimizer state partitioned over ranks",
    "zero2": "gradients partitioned over ranks",
    "zero3": "weights partitioned over ranks and gathered for every forward and backward",
    "zero1_offload": "optimizer state in host memory: a slower optimizer step",
    "zero2_offload": "optimizer state in host memory: a slower optimizer step",
    "zero3_offload": "weights partitioned over ranks, optimizer state in host memory",
    "zero3_nvme": "weights partitioned over ranks, optimizer state on NVMe: a much slower optimizer step",
}


@dataclass(frozen=True)
class Change:
    """Settings on the command line and their cost. Two changes of one `kind` are never tried together."""

    settings: tuple[str, ...]
    cost: str
    kind: str


@dataclass(frozen=True)
class Suggestion:
    """Changes that make a run fit, and the plan with them."""

    changes: tuple[Change, ...]
    plan: Plan

    @property
    def settings(self) -> str:
        return " ".join(setting for change in self.changes for setting in change.settings)

    @property
    def cost(self) -> str:
        return "; ".join(change.cost for change in self.changes)


Load = Callable[[Sequence[str]], RunConfig]  # with further settings


def suggest(planner: Planner, load: Load, config: RunConfig, machine: Machine) -> tuple[list[Suggestion], Plan | None]:
    """Return (the smallest sets of changes that fit, cheapest first; of all tried plans the one that needs least
    memory on a card). `load` reads the configuration again with additional settings."""
    changes = list(_changes(config, machine))
    tried: list[Plan] = []
    for count in range(1, _MOST_AT_ONCE + 1):
        found = []
        for chosen in itertools.combinations(changes, count):
            if len({change.kind for change in chosen}) < count:
                continue
            plan = _plan(planner, load, chosen, machine)
            if plan is not None:
                tried.append(plan)
                if not shortage(plan, machine):
                    found.append(Suggestion(chosen, plan))
        if found:
            return found[:_SHOWN], min(tried, key=needed)
    return [], min(tried, key=needed, default=None)


def _plan(planner: Planner, load: Load, chosen: Sequence[Change], machine: Machine) -> Plan | None:
    try:
        config = load([s for change in chosen for s in change.settings])
        return planner.plan(config, machine.ranks, local_ranks=machine.gpus)
    # Changes that contradict each other, an optimizer that is not installed, a head that cannot be fused.
    except (ConfigError, LossError):
        return None


def _changes(config: RunConfig, machine: Machine) -> Iterator[Change]:
    """Yield the changes to try, cheapest first."""
    if config.train.fused_loss != True:  # noqa: E712 ("auto")
        yield Change(("train.fused_loss=true",), "nothing", "loss")
    for size in sorted({config.train.micro_batch_size // 2, 1}, reverse=True):
        if 0 < size < config.train.micro_batch_size:
            yield Change((f"train.micro_batch_size={size}",), "more and smaller forward passes", "micro-batch")
    if not config.model.activation_checkpointing:
        yield Change(("model.activation_checkpointing=true",), "about a third more compute", "activations")
    names = list(_PRESETS)
    above = names[names.index(config.deepspeed) + 1 :] if config.deepspeed in names else names
    for name in above:
        if machine.ranks > 1 or "offload" in name or "nvme" in name:
            yield Change((f"deepspeed={name}",), _PRESETS[name], "stage")
    if config.bank.name == "device" and not config.selector.constant:
        yield Change(("bank.name=cpu",), "optimizer state is copied between host and device at a switch", "bank")
    if config.bank.name != "discard" and not config.selector.constant:
        yield Change(("bank.name=discard",), "blocks lose their optimizer state when they are frozen", "bank")
    blocks = getattr(config.selector, "blocks", None)
    for count in sorted({blocks // 2, 1}, reverse=True) if isinstance(blocks, int) and blocks > 1 else ():
        yield Change((f"selector.blocks={count}",), "fewer blocks train at a time", "selector")
    if config.always_on.embeddings or config.always_on.head:
        both = ("always_on.embeddings=false", "always_on.head=false")
        yield Change(both, "embeddings and head are not trained", "always on")
    if config.selector.name == "all" and config.substrate.name == "full":
        yield Change(("method=lisa",), "only two blocks train at a time", "selector")
