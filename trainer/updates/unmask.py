"""ID3, step-by-step unmasking (arXiv 2408.14470, TACL 2025): train a growing set of single weights, up to a budget.

At each optimizer step, the masked weights with the largest |gradient| / (eps + |weight|)^exp over all tensors join the
set, equally many at each step, and the set trains with Adam. The authors' code keeps dense gradients and moments and
a mask for every weight. Here fp32 master weights and moments exist for unmasked weights alone, each on the rank that
owns the weight. Dense gradients exist for one parameter at a time, as backward computes them; each rank keeps only its
best candidates from them. Once the budget is reached, ranks exchange only the gradients of unmasked weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from trainer.config import ConfigError, RunConfig
from trainer.model.blocks import Block, decays, full_numel
from trainer.model.ownership import own_bounds
from trainer.settings.updates import UnmaskSettings
from trainer.updates.adam import AdamSettings, adam_step_, zeros_like
from trainer.updates.base import Footprint, Transient, UpdateError, UpdateRule, dense_gradient
from trainer.updates.candidates import NOT_A_CANDIDATE, best, best_of_all

# Scores computed at a time: all scores of a large embedding would take gigabytes.
_CHUNK = 2**25
_DEFAULTS = UnmaskSettings()


def target(step: int, *, budget: int, steps: int) -> int:
    """Return the number of weights unmasked after `step` of `steps` optimizer steps: increments of budget // steps, one
    more at each of the first budget % steps (the authors' id3.py)."""
    step = min(step, steps)
    return step * (budget // steps) + min(step, budget % steps)


def d3_scores(gradient: Tensor, weights: Tensor, *, exp: float, eps: float) -> Tensor:
    """Return |gradient| / (eps + |weight|)^exp, fp32, of the same shape as both. NaN (0 / 0) counts as infinite."""
    scores = gradient.float().abs()
    if exp:
        scores /= weights.to(scores).abs().add_(eps).pow_(exp)
        scores.masked_fill_(scores.isnan(), torch.inf)
    return scores


@dataclass
class _Parameter:
    """One parameter's unmasked weights of all ranks, and the state of those that this rank owns."""

    offset: int  # position of its first weight among the weights of all parameters
    numel: int
    decays: bool
    indices: Tensor  # flat positions of all ranks' unmasked weights in the parameter: int64, ascending
    own: slice = field(default_factory=lambda: slice(0, 0))  # the part of `indices` that this rank owns
    state: dict[str, Tensor] | None = (
        None  # of this rank's unmasked weights, in the order of `indices`; None before it is needed
    )
    gradient: Tensor | None = None  # of this rank's unmasked weights, fp32
    accumulated: Tensor | None = None  # gradient sums of all weights in this rank's range, while the mask grows

    def own_range(self) -> tuple[int, int]:
        """Return the range [start, stop) of the flat parameter that this rank owns."""
        return own_bounds(self.numel)

    def set_indices(self, indices: Tensor) -> None:
        """Set the unmasked weights to `indices`."""
        self.indices, self.own = indices, _between(indices, *self.own_range())

    def own_positions(self, device: torch.device) -> Tensor:
        """Return the positions of this rank's unmasked weights in its flat range, on `device` (int64 [n])."""
        return (self.indices[self.own] - self.own_range()[0]).to(device)


class _Candidates:
    """A rank's `k` best masked weights of a step so far, by ascending position among all parameters.

    Up to k / 4 more wait until they are compared with these, all at once, because each comparison sorts all k.
    """

    def __init__(self, k: int) -> None:
        device = get_accelerator().current_device_name()
        self.scores = torch.empty(0, dtype=torch.float32, device=device)
        self.positions = torch.empty(0, dtype=torch.int64, device=device)
        self.gradients = torch.empty(0, dtype=torch.float32, device=device)
        self._k = k
        self._limit: Tensor | None = None  # the lowest of `scores`; None while there are fewer than k
        self._uncompared: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, scores: Tensor, gradients: Tensor, *, first: int) -> None:
        """Consider the n weights from position `first` on; `scores` and `gradients` are both [n]."""
        if not self._k:
            return
        if self._limit is None:
            chosen = best(scores, self._k)
            chosen = chosen[scores[chosen] != NOT_A_CANDIDATE]
        else:
            # Nearly all scores are below the limit: excluding those takes a fraction of the time of ranking them. Equal
            # ones are included: of these the lowest position wins, and backward reaches the lowest positions last.
            chosen = (scores >= self._limit).nonzero().view(-1)
            if chosen.numel() > self._k:
                chosen = chosen[best(scores[chosen], self._k)]
        if chosen.numel():
            self._uncompared.append((scores[chosen], chosen + first, gradients[chosen]))
            if self._limit is None or sum(part.numel() for part, _, _ in self._uncompared) > self._k // 4:
                self.compare()

    def compare(self) -> None:
        """Reduce `scores`, `positions` and `gradients` to the best k."""
        parts = [(self.scores, self.positions, self.gradients), *self._uncompared]
        self._uncompared = []
        scores, positions, gradients = (torch.cat(kind) for kind in zip(*parts, strict=True))
        order = positions.argsort()
        order = order[best(scores[order], self._k)]
        self.scores, self.positions, self.gradients = scores[order], positions[order], gradients[order]
        self._limit = self.scores.min() if self.scores.numel() == self._k else None

    def tensors(self) -> list[Tensor]:
        return [
            tensor for part in [(self.scores, self.positions, self.gradients), *self._uncompared] for tensor in part
        ]


@dataclass(eq=False)
class Unmask(UpdateRule):
    """Unmask `budget` weights over `growth_steps` optimizer steps, and train them with Adam.

    If blocks train in turn, the mask grows among those that train. If a step unmasks too few, because these
    have too few masked weights left or because it is skipped, later steps (if any) make up for it.
    `bias_correction`: Adam counts a weight's steps from the start of training as in the paper (`global`), or from its
    unmasking (`local`).
    """

    budget: int = _DEFAULTS.budget
    growth_steps: int = 1000
    exp: float = _DEFAULTS.exp
    eps: float = _DEFAULTS.eps
    bias_correction: Literal["global", "local"] = _DEFAULTS.bias_correction
    adam: AdamSettings = AdamSettings()
    gradient_clipping: float = 0.0
    unmasked: int = field(default=0, init=False)  # weights so far, of all ranks
    updates: int = field(default=0, init=False)  # of single weights, on all ranks
    _applied: int = field(default=0, init=False)  # optimizer steps that were applied
    _skipped: int = field(default=0, init=False)  # optimizer steps that were not, for infinite or NaN gradients
    _parameters: dict[str, _Parameter] = field(default_factory=dict, init=False)
    _candidates: _Candidates | None = field(default=None, init=False)
    _norm: Tensor | None = field(default=None, init=False)  # of the last step's gradients

    whole_model = True

    def __post_init__(self) -> None:
        for key, value, allowed, fits in (
            ("budget", self.budget, "1 or more", self.budget >= 1),
            ("growth_steps", self.growth_steps, "1 or more", self.growth_steps >= 1),
            ("exp", self.exp, "0 or more, finite", 0 <= self.exp < math.inf),
            ("eps", self.eps, "0 or more, finite", 0 <= self.eps < math.inf),
            ("bias_correction", self.bias_correction, "global, local", self.bias_correction in ("global", "local")),
        ):
            if not fits:
                raise ValueError(f"update.{key}: got {value}; allowed: {allowed}")

    @classmethod
    def from_config(cls, config: RunConfig, *, num_steps: int | None) -> Self:
        settings, optimizer = config.update, config.optimizer
        assert isinstance(settings, UnmaskSettings)
        growth_steps = settings.growth_steps or num_steps or 1
        if num_steps is not None and growth_steps > num_steps:  # the budget would never be reached
            allowed = f"allowed: null, or up to {num_steps}, the run's number of steps"
            raise ConfigError([f"update.growth_steps: {growth_steps}; {allowed}"])
        return cls(
            **settings.model_dump(exclude={"name", "growth_steps"}),
            growth_steps=growth_steps,
            adam=AdamSettings(optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.name == "adamw"),
            gradient_clipping=config.train.gradient_clipping,
        )

    @property
    def growing(self) -> bool:
        """Return whether there are weights left to unmask."""
        return self.unmasked < self.budget

    @property
    def increment(self) -> int:
        """Return the number of weights to unmask at the next step."""
        step = self._applied + self._skipped + 1
        return max(0, target(step, budget=self.budget, steps=self.growth_steps) - self.unmasked)

    def in_optimizer(self, block: Block) -> set[str]:
        return set()

    def bind(self, parameters: Mapping[str, nn.Parameter], *, reachable: Collection[str]) -> None:
        offset = 0
        for name, parameter in parameters.items():
            indices = torch.empty(0, dtype=torch.int64)
            self._parameters[name] = _Parameter(offset, full_numel(parameter), decays(parameter), indices)
            offset += full_numel(parameter)
        most = sum(full_numel(parameters[name]) for name in reachable)
        if self.budget > most:
            raise ValueError(
                f"update.budget: got {self.budget}, but only {most} weights may train; allowed: 1 to {most}"
            )

    def enter(self, name: str, weights: Tensor) -> None:
        parameter = self._parameters[name]
        parameter.indices = parameter.indices.to(get_accelerator().current_device_name())
        if parameter.state is None:
            parameter.state = self._fresh_state(weights[parameter.own_positions(weights.device)])

    def wanted(self, name: str) -> Tensor | None:
        return None if self.growing else self._parameters[name].indices

    def moved(self, name: str) -> Tensor | None:
        return self._parameters[name].indices

    def receive(self, name: str, gradient: Tensor, weights: Tensor, *, last: bool) -> None:
        parameter = self._parameters[name]
        if not self.growing:
            parameter.gradient = gradient[parameter.own]
            return
        if parameter.gradient is not None:  # candidates were chosen before the gradient was complete
            raise RuntimeError(
                f"{name} got gradients twice in the last backward of a step, as weights that several modules share do "
                "with reentrant checkpoints: use activation checkpointing with use_reentrant=False"
            )
        if parameter.accumulated is not None:
            gradient = parameter.accumulated.add_(gradient)
        parameter.accumulated = gradient
        if last:
            self._collect_candidates(parameter, weights)

    def begin_step(self, weights: Mapping[str, Tensor]) -> None:
        for name, own in weights.items():
            if self._parameters[name].accumulated is not None:
                self._collect_candidates(self._parameters[name], own)
        # None if this rank got no gradients. Reset even if this step unmasks nothing: the next one has its own.
        candidates, self._candidates = self._candidates, None
        if self.increment:
            self._unmask(weights, candidates or _Candidates(self.increment))
        self._applied += 1
        self._norm = self._clip(weights)

    def step(self, name: str, weights: Tensor, *, lr: float) -> None:
        parameter, state = self._parameters[name], self._parameters[name].state
        assert state is not None
        gradient, parameter.gradient = parameter.gradient, None
        self.updates += parameter.indices.numel()
        if not state["master"].numel():
            return
        if gradient is None:  # the forward did not use the parameter, like an expert without tokens
            gradient = torch.zeros_like(state["master"])
        step: Tensor | int = self._applied
        if self.bias_correction == "local":
            step = state["steps"].add_(1)
        adam_step_(
            state["master"],
            state["exp_avg"],
            state["exp_avg_sq"],
            gradient,
            step=step,
            lr=lr,
            settings=self.adam,
            weight_decay=self.adam.weight_decay if parameter.decays else 0.0,
        )
        # Offloaded weights are in host memory.
        weights[parameter.own_positions(weights.device)] = state["master"].to(weights)

    def discard(self) -> None:
        for parameter in self._parameters.values():
            parameter.gradient = parameter.accumulated = None
        self._candidates = self._norm = None
        self._skipped += 1

    def leave(self, name: str, *, keep: bool) -> None:
        if not keep:
            self._parameters[name].state = None

    def _fresh_state(self, weights: Tensor) -> dict[str, Tensor]:
        """Return new state of this rank's unmasked `weights` [n]."""
        master = weights.to(get_accelerator().current_device_name(), torch.float32, copy=True)
        state = {"master": master, **zeros_like(master)}
        if self.bias_correction == "local":
            state["steps"] = torch.zeros(master.shape, dtype=torch.int32, device=master.device)
        return state

    # --- growing -----------------------------------------------------------------------------------------------

    def _collect_candidates(self, parameter: _Parameter, weights: Tensor) -> None:
        """Reduce the complete gradient of `parameter` to its unmasked weights, and add its masked weights to the
        candidates."""
        gradient, parameter.accumulated = parameter.accumulated, None
        assert gradient is not None
        unmasked = parameter.own_positions(gradient.device)
        parameter.gradient = gradient[unmasked]
        if self._candidates is None:
            self._candidates = _Candidates(self.increment)
        begins = range(0, gradient.numel(), _CHUNK)
        bounds = torch.searchsorted(unmasked, unmasked.new_tensor([*begins, gradient.numel()])).tolist()
        for begin, (first, last) in zip(begins, pairwise(bounds), strict=True):
            part = slice(begin, begin + _CHUNK)
            scores = d3_scores(gradient[part], weights[part], exp=self.exp, eps=self.eps)
            scores[unmasked[first:last] - begin] = NOT_A_CANDIDATE
            self._candidates.add(scores, gradient[part], first=parameter.offset + parameter.own_range()[0] + begin)

    def _unmask(self, weights: Mapping[str, Tensor], mine: _Candidates) -> None:
        mine.compare()
        scores, positions = best_of_all(mine.scores, mine.positions, self.increment)
        if not torch.isfinite(scores).all():
            raise UpdateError(
                f"update.eps: got {self.eps} with update.exp {self.exp}, for which |gradient| / (eps + |weight|)^exp "
                "is infinite for some weights; raise update.eps, or lower update.exp"
            )
        parameters = [self._parameters[name] for name in weights]
        ranges = positions.new_tensor([[p.offset, p.offset + p.numel] for p in parameters])
        bounds = torch.searchsorted(positions, ranges).tolist()
        for parameter, own, (first, last) in zip(parameters, weights.values(), bounds, strict=True):
            if last > first:
                self._add(parameter, positions[first:last] - parameter.offset, own, mine)
        self.unmasked += positions.numel()

    def _add(self, parameter: _Parameter, new: Tensor, weights: Tensor, mine: _Candidates) -> None:
        """Unmask the weights at `new`: flat positions in the parameter, ascending, equal on all ranks."""
        start, stop = parameter.own_range()
        added = new[_between(new, start, stop)]
        gradients = mine.gradients[torch.searchsorted(mine.positions, added + parameter.offset)]
        order = torch.cat([parameter.indices[parameter.own], added]).argsort()
        assert parameter.state is not None
        fresh = self._fresh_state(weights[(added - start).to(weights.device)])
        parameter.state = {key: torch.cat([value, fresh[key]])[order] for key, value in parameter.state.items()}
        # A parameter without a gradient has no candidates either.
        assert parameter.gradient is not None or not added.numel()
        if parameter.gradient is not None:
            parameter.gradient = torch.cat([parameter.gradient, gradients])[order]
        parameter.set_indices(torch.cat([parameter.indices, new]).sort().values)

    def _clip(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Clip the gradients of all unmasked weights. Returns the norm before clipping (scalar, equal on all ranks)."""
        gradients = [g for g in (self._parameters[name].gradient for name in weights) if g is not None]
        total = torch.zeros((), dtype=torch.float32, device=get_accelerator().current_device_name())
        for gradient in gradients:
            total += gradient.square().sum()
        dist.all_reduce(total)
        norm = total.sqrt()
        if self.gradient_clipping:
            scale = (self.gradient_clipping / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(scale)
        return norm

    # --- memory and checkpoints --------------------------------------------------------------------------------

    def footprint(
        self, active: Sequence[int], inactive: Sequence[int], *, ranks: int, weight_bytes: int, accumulation: int
    ) -> Footprint:
        """Return the bytes of `budget` unmasked weights, assuming that each rank owns equally many. A rank also stores
        gradient and index (4 and 8 bytes) of all of them.

        While the mask grows, it also stores score, position and gradient (16 bytes) of as many candidates as a step
        unmasks and a quarter more; with several micro-batches per step, also the fp32 sums of its gradients.
        """
        step_bytes = 4 if self.bias_correction == "local" else 0
        own = -(-self.budget // ranks)
        growing = f" of the first {min(self.growth_steps, self.budget)} steps, in which the mask grows"
        sums = 4 * sum(-(-numel // ranks) for numel in active) if accumulation > 1 else 0
        transients = [
            dense_gradient(active, ranks=ranks, weight_bytes=weight_bytes),
            Transient("candidates", 20 * self.increment, growing),
            Transient("sums", sums, f"{growing}: all gradients, over micro-batches; none without accumulation"),
        ]
        return Footprint(
            trained=self.budget,
            gradients=4 * self.budget,
            masters=4 * own,
            moments=(8 + step_bytes) * own,
            indices=8 * self.budget,
            backward=tuple(part for part in transients if part.size),
            saved=(24 + step_bytes) * self.budget,  # position, weight, master, moments
        )

    def warnings(self, *, steps_for_all_blocks: int) -> list[str]:
        if self.growth_steps >= steps_for_all_blocks:
            return []
        return [
            f"WARNING: the mask is complete after {self.growth_steps} steps (update.growth_steps), but it takes "
            f"{steps_for_all_blocks} or more until every block has trained: blocks that are drawn later have no "
            "weights of their own to train. Raise update.growth_steps, or lower selector.interval"
        ]

    def report(self) -> list[str]:
        return [f"Unmasked {self.unmasked:,} weights of a budget of {self.budget:,}."]

    def figures(self) -> dict[str, float]:
        norm = {} if self._norm is None else {"grad_norm": float(self._norm)}
        return {"unmasked": self.unmasked, **norm}

    def held(self) -> dict[str, list[Tensor]]:
        kinds: dict[str, list[Tensor]] = {"gradients": [], "masters": [], "moments": [], "indices": []}
        for parameter in self._parameters.values():
            kinds["indices"].append(parameter.indices)
            kinds["gradients"] += [g for g in (parameter.gradient, parameter.accumulated) if g is not None]
            for key, value in (parameter.state or {}).items():
                kinds["masters" if key == "master" else "moments"].append(value)
        if self._candidates is not None:
            kinds["indices"] += self._candidates.tensors()
        return kinds

    def slices(self, name: str) -> dict[str, Tensor]:
        parameter = self._parameters[name]
        return {"indices": parameter.indices[parameter.own], **(parameter.state or {})}

    def restore(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        parameter = self._parameters[name]
        device = get_accelerator().current_device_name()
        order = tensors["indices"].argsort()
        parameter.set_indices(tensors["indices"][order].to(device))
        values = {key: value[order][parameter.own].to(device) for key, value in tensors.items() if key != "indices"}
        parameter.state = values or None

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._applied, "skipped": self._skipped, "unmasked": self.unmasked, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._applied = state["steps"]
        self._skipped = state.get("skipped", 0)  # older checkpoints have none
        self.unmasked, self.updates = state["unmasked"], state["updates"]


def _between(positions: Tensor, start: int, stop: int) -> slice:
    """Return the slice of ascending `positions` that are in [start, stop)."""
    first, last = torch.searchsorted(positions, positions.new_tensor([start, stop])).tolist()
    return slice(first, last)
