"""ID3, step-by-step unmasking (arXiv 2408.14470, TACL 2025): train a growing set of single weights, up to a budget.

At each optimizer step the masked weights with the largest |gradient| / (eps + |weight|)^exp over all tensors join the
set, as many at every step, and what is in it trains with Adam. The authors' code keeps dense gradients and moments and
a mask for every weight. Here masters and moments exist for unmasked weights alone, each on the rank that owns the
weight; gradients are dense for one parameter at a time, as backward makes them, and what a rank remembers of those is
its best candidates. Once the budget is reached, ranks exchange the gradients of unmasked weights and no others.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from trainer.blocks import Block, decays, full_numel
from trainer.updates.adam import AdamSettings, adam_step_, zeros_like
from trainer.updates.base import UpdateError, UpdateRule
from trainer.updates.top_k import NOT_A_CANDIDATE, best, best_of_all

# Scores at a time: those of a large embedding would be gigabytes.
_CHUNK = 2**25


def target(step: int, *, budget: int, steps: int) -> int:
    """Weights that are unmasked after `step` of `steps` optimizer steps: equal increments of budget // steps, and one
    more at each of the first budget % steps (the authors' id3.py)."""
    step = min(step, steps)
    return step * (budget // steps) + min(step, budget % steps)


def scalar_updates(*, budget: int, steps: int, total_steps: int) -> int:
    """Updates of single weights in `total_steps` optimizer steps of which the mask grows in the first `steps`: about
    budget (steps + 1) / 2, half of what a mask that is whole from the start takes, and budget for each step after."""
    return sum(target(step, budget=budget, steps=steps) for step in range(1, total_steps + 1))


def d3_scores(gradient: Tensor, weights: Tensor, *, exp: float, eps: float) -> Tensor:
    """H = |gradient| / (eps + |weight|)^exp, fp32 and of the shape of both. What is no number (0 / 0) counts as
    infinite."""
    scores = gradient.float().abs()
    if exp:
        scores /= weights.to(scores).abs().add_(eps).pow_(exp)
        scores.masked_fill_(scores.isnan(), torch.inf)
    return scores


@dataclass
class _Parameter:
    """One parameter: where it lies among all, which of its weights are unmasked, and this rank's state of its own."""

    offset: int  # of its first weight among those of all parameters
    numel: int
    decays: bool
    indices: Tensor  # of all ranks' unmasked weights, flat in the parameter: int64, ascending
    own: slice = field(default_factory=lambda: slice(0, 0))  # which of them are this rank's
    state: dict[str, Tensor] | None = None  # of this rank's, in the same order; None before it is needed
    gradient: Tensor | None = None  # of this rank's, fp32
    accumulated: Tensor | None = None  # of all this rank's weights, while the mask grows

    def range(self) -> tuple[int, int]:
        """This rank's weights: [start, stop) of the flat parameter."""
        chunk = -(-self.numel // dist.get_world_size())
        start = min(self.numel, dist.get_rank() * chunk)
        return start, min(self.numel, start + chunk)

    def choose(self, indices: Tensor) -> None:
        """Unmasked are now `indices`."""
        self.indices, self.own = indices, _between(indices, *self.range())

    def places(self, device: torch.device) -> Tensor:
        """This rank's unmasked weights, flat in its range; offloaded weights lie elsewhere than everything else."""
        return (self.indices[self.own] - self.range()[0]).to(device)


class _Candidates:
    """A rank's best masked weights of a step so far, by ascending position among all parameters: `k`, and up to a
    quarter more that are not compared with these yet."""

    def __init__(self, k: int) -> None:
        device = get_accelerator().current_device_name()
        self.scores = torch.empty(0, dtype=torch.float32, device=device)
        self.positions = torch.empty(0, dtype=torch.int64, device=device)
        self.gradients = torch.empty(0, dtype=torch.float32, device=device)
        self._k = k
        self._least: Tensor | None = None  # of scores; None while there are fewer than k
        self._more: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, scores: Tensor, gradients: Tensor, *, first: int) -> None:
        """Consider weights at the positions from `first` on with these `scores` and `gradients`, both [n]."""
        if not self._k:
            return
        if self._least is None:
            chosen = best(scores, self._k)
            chosen = chosen[scores[chosen] != NOT_A_CANDIDATE]
        else:
            # Nearly all are below what is known: leaving these out takes a fraction of the time of ranking them. Of
            # equal scores the first position wins, and backward comes to first positions last.
            chosen = (scores >= self._least).nonzero().view(-1)
            if chosen.numel() > self._k:
                chosen = chosen[best(scores[chosen], self._k)]
        if chosen.numel():
            self._more.append((scores[chosen], chosen + first, gradients[chosen]))
            if self._least is None or sum(scores.numel() for scores, _, _ in self._more) > self._k // 4:
                self.compare()

    def compare(self) -> None:
        """From here on `scores`, `positions` and `gradients` are the best k."""
        parts = [(self.scores, self.positions, self.gradients), *self._more]
        self._more = []
        scores, positions, gradients = (torch.cat(kind) for kind in zip(*parts, strict=True))
        order = positions.argsort()
        order = order[best(scores[order], self._k)]
        self.scores, self.positions, self.gradients = scores[order], positions[order], gradients[order]
        self._least = self.scores.min() if self.scores.numel() == self._k else None

    def tensors(self) -> list[Tensor]:
        return [tensor for part in [(self.scores, self.positions, self.gradients), *self._more] for tensor in part]


@dataclass(eq=False)
class Unmask(UpdateRule):
    """Unmask `budget` weights over `growth_steps` optimizer steps, and train them with Adam.

    With several blocks in turn the mask grows among those that train; if they have too few masked weights left, what is
    missing is made up later, and so is what a skipped step would have unmasked, unless there is no step after it.
    `bias_correction` says from where Adam counts a weight's steps: `global`, from the start of training as in the
    paper, or `local`, from the weight's own first.
    """

    budget: int = 100_000
    growth_steps: int = 1000
    exp: float = 0.0
    eps: float = 1e-3
    bias_correction: Literal["global", "local"] = "global"
    adam: AdamSettings = AdamSettings()
    gradient_clipping: float = 0.0
    unmasked: int = field(default=0, init=False)  # weights so far, of all ranks
    updates: int = field(default=0, init=False)  # of single weights, on all ranks
    _taken: int = field(default=0, init=False)  # optimizer steps that were applied
    _skipped: int = field(default=0, init=False)  # and others, for infinite or NaN gradients
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

    @property
    def growing(self) -> bool:
        """Whether there are weights to unmask yet."""
        return self.unmasked < self.budget

    @property
    def increment(self) -> int:
        """Weights to unmask at the next step."""
        step = self._taken + self._skipped + 1
        return max(0, target(step, budget=self.budget, steps=self.growth_steps) - self.unmasked)

    def in_optimizer(self, block: Block) -> set[str]:
        return set()

    def prepare(self, parameters: Mapping[str, nn.Parameter], *, reachable: Collection[str]) -> None:
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
        entered = self._parameters[name]
        entered.indices = entered.indices.to(get_accelerator().current_device_name())
        if entered.state is None:
            entered.state = self._fresh_state(weights[entered.places(weights.device)])

    def wanted(self, name: str) -> Tensor | None:
        return None if self.growing else self._parameters[name].indices

    def moved(self, name: str) -> Tensor | None:
        return self._parameters[name].indices

    def receive(self, name: str, gradient: Tensor, weights: Tensor, *, last: bool) -> None:
        parameter = self._parameters[name]
        if not self.growing:
            parameter.gradient = gradient[parameter.own]
            return
        if parameter.gradient is not None:  # candidates were chosen by a part of it
            raise RuntimeError(
                f"{name} got gradients twice in the last backward of a step, as weights that several modules share do "
                "with reentrant checkpoints: use activation checkpointing with use_reentrant=False"
            )
        if parameter.accumulated is not None:
            gradient = parameter.accumulated.add_(gradient)
        parameter.accumulated = gradient
        if last:
            self._look_for_candidates(parameter, weights)

    def begin_step(self, weights: Mapping[str, Tensor]) -> None:
        for name, own in weights.items():
            if self._parameters[name].accumulated is not None:
                self._look_for_candidates(self._parameters[name], own)
        # None on a rank of whose weights none took part; of a step that unmasks nothing they are not the next one's.
        candidates, self._candidates = self._candidates, None
        if self.increment:
            self._unmask(weights, candidates or _Candidates(self.increment))
        self._taken += 1
        self._norm = self._clip(weights)

    def step(self, name: str, weights: Tensor, *, lr: float) -> None:
        parameter, state = self._parameters[name], self._parameters[name].state
        assert state is not None
        gradient, parameter.gradient = parameter.gradient, None
        self.updates += parameter.indices.numel()
        if not state["master"].numel():
            return
        if gradient is None:  # the parameter took no part, as an expert without tokens
            gradient = torch.zeros_like(state["master"])
        step: Tensor | int = self._taken
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
        weights[parameter.places(weights.device)] = state["master"].to(weights)

    def discard(self) -> None:
        for parameter in self._parameters.values():
            parameter.gradient = parameter.accumulated = None
        self._candidates = self._norm = None
        self._skipped += 1

    def leave(self, name: str, *, keep: bool) -> None:
        if not keep:
            self._parameters[name].state = None

    def _fresh_state(self, weights: Tensor) -> dict[str, Tensor]:
        """Of this rank's unmasked `weights` [n]."""
        master = weights.to(get_accelerator().current_device_name(), torch.float32, copy=True)
        state = {"master": master, **zeros_like(master)}
        if self.bias_correction == "local":
            state["steps"] = torch.zeros(master.shape, dtype=torch.int32, device=master.device)
        return state

    # --- growing -----------------------------------------------------------------------------------------------

    def _look_for_candidates(self, parameter: _Parameter, weights: Tensor) -> None:
        """All gradients of `parameter` are there: keep those of unmasked weights and of the best others."""
        gradient, parameter.accumulated = parameter.accumulated, None
        assert gradient is not None
        places = parameter.places(gradient.device)
        parameter.gradient = gradient[places]
        if self._candidates is None:
            self._candidates = _Candidates(self.increment)
        begins = range(0, gradient.numel(), _CHUNK)
        bounds = torch.searchsorted(places, places.new_tensor([*begins, gradient.numel()])).tolist()
        for begin, (first, last) in zip(begins, pairwise(bounds), strict=True):
            part = slice(begin, begin + _CHUNK)
            scores = d3_scores(gradient[part], weights[part], exp=self.exp, eps=self.eps)
            scores[places[first:last] - begin] = NOT_A_CANDIDATE
            self._candidates.add(scores, gradient[part], first=parameter.offset + parameter.range()[0] + begin)

    def _unmask(self, weights: Mapping[str, Tensor], mine: _Candidates) -> None:
        mine.compare()
        scores, positions = best_of_all(mine.scores, mine.positions, self.increment)
        if not torch.isfinite(scores).all():
            raise UpdateError(
                f"update.eps: got {self.eps} with update.exp {self.exp}, for which |gradient| / (eps + |weight|)^exp "
                "is infinite for some weights; raise update.eps, or lower update.exp"
            )
        parameters = [self._parameters[name] for name in weights]
        ends = positions.new_tensor([[p.offset, p.offset + p.numel] for p in parameters])
        found = torch.searchsorted(positions, ends).tolist()
        for parameter, own, (first, last) in zip(parameters, weights.values(), found, strict=True):
            if last > first:
                self._add(parameter, positions[first:last] - parameter.offset, own, mine)
        self.unmasked += positions.numel()

    def _add(self, parameter: _Parameter, new: Tensor, weights: Tensor, mine: _Candidates) -> None:
        """Unmask `new`, of all ranks, flat in the parameter and ascending."""
        start, stop = parameter.range()
        added = new[_between(new, start, stop)]
        gradients = mine.gradients[torch.searchsorted(mine.positions, added + parameter.offset)]
        order = torch.cat([parameter.indices[parameter.own], added]).argsort()
        assert parameter.state is not None
        fresh = self._fresh_state(weights[(added - start).to(weights.device)])
        parameter.state = {key: torch.cat([value, fresh[key]])[order] for key, value in parameter.state.items()}
        # Without one it took no part, and has no candidates either.
        assert parameter.gradient is not None or not added.numel()
        if parameter.gradient is not None:
            parameter.gradient = torch.cat([parameter.gradient, gradients])[order]
        parameter.choose(torch.cat([parameter.indices, new]).sort().values)

    def _clip(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The norm of the gradients of all unmasked weights, before it is clipped; a scalar, the same on all ranks."""
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

    # --- what is held, and checkpoints -------------------------------------------------------------------------

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
        parameter.choose(tensors["indices"][order].to(device))
        values = {key: value[order][parameter.own].to(device) for key, value in tensors.items() if key != "indices"}
        parameter.state = values or None

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._taken, "skipped": self._skipped, "unmasked": self.unmasked, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._taken = state["steps"]
        self._skipped = state.get("skipped", 0)  # older checkpoints have none
        self.unmasked, self.updates = state["unmasked"], state["updates"]


def _between(positions: Tensor, start: int, stop: int) -> slice:
    """Which of ascending `positions` are in [start, stop)."""
    first, last = torch.searchsorted(positions, positions.new_tensor([start, stop])).tolist()
    return slice(first, last)
