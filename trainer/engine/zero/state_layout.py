"""The state that an optimizer keeps for the tensors that it steps."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor

from trainer.engine.zero.errors import RegistrationError

# Shape of the tensor that shows what an optimizer keeps. Quantised optimizers do not quantise smaller ones.
_TRIAL_SHAPE = (128, 128)
# Adam's state. It begins at zero, so that it can be reset in place; other optimizers' state is dropped instead.
_BEGINS_AT_ZERO = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"}


@dataclass(frozen=True)
class StateLayout:
    """The state that an optimizer keeps for each tensor that it steps.

    `per_weight` maps names to dtypes of state with one value for each weight, such as Adam's moments. `scalars` maps
    names to an example of state with one value for the tensor, such as a step count. `other` names everything else:
    quantised or factored state, which cannot be cut into parameters.
    """

    per_weight: dict[str, torch.dtype]
    scalars: dict[str, Any]
    other: tuple[str, ...] = ()

    def refuse_other(self, what: str, optimizer: torch.optim.Optimizer) -> None:
        """Raise `RegistrationError` if the optimizer keeps something that `what` cannot store weight by weight."""
        if self.other:
            raise RegistrationError(
                f"{what} can store one value for each weight, but {type(optimizer).__name__} keeps "
                f"{', '.join(self.other)}: use an optimizer without quantised or factored state, such as "
                "torch.optim.AdamW. With bank 'discard', a loop that never saves may call attach(engine, saves=False)"
            )

    def split(self, optimizer: torch.optim.Optimizer, stepped: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the state of a tensor that the optimizer steps, by name: values for each weight, and scalars."""
        state = optimizer.state.get(stepped, {})
        if state:
            self.refuse_other("banks and checkpoints", optimizer)
        known = {key: value for key, value in state.items() if value is not None}
        moments = {key: value for key, value in known.items() if key in self.per_weight}
        return moments, {key: float(value) for key, value in known.items() if key not in moments}

    def zeros(self, like: Tensor, key: str) -> Tensor:
        """Return state `key` of the tensor `like` before the first step."""
        return torch.zeros_like(like, dtype=self.per_weight.get(key, like.dtype), requires_grad=False)

    def scalar(self, key: str, value: float) -> Any:
        """Return `value` as the optimizer keeps it: in a tensor, on the device or not, or as a number of some type."""
        example = self.scalars.get(key, 0)
        return torch.full_like(example, value) if torch.is_tensor(example) else type(example)(value)

    def reset(self, optimizer: torch.optim.Optimizer, stepped: Tensor) -> None:
        """Return the state of a tensor that the optimizer steps to what it was before the first step."""
        state = optimizer.state.get(stepped)
        if not state:
            return
        if state.keys() <= _BEGINS_AT_ZERO:
            for key, value in state.items():  # in place: no allocation, and memory stays where it is
                if torch.is_tensor(value):
                    value.zero_()
                else:
                    state[key] = type(value)(0)
        else:
            optimizer.state.pop(stepped)


def state_layout(optimizer: torch.optim.Optimizer, *, flat: bool, device: torch.device) -> StateLayout:
    """Find out what `optimizer` keeps, by a step of a copy of it on a tensor of zeros: there is no state before the
    first step. `flat` says that it steps flat buffers, as under ZeRO, rather than whole parameters."""
    if isinstance(optimizer, DeepSpeedCPUAdam):  # its C++ part knows the optimizer by a number, which a copy shares
        return StateLayout(dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.float32), {"step": 0})
    weights = torch.zeros(_TRIAL_SHAPE, device=device)
    weights = (weights.view(-1) if flat else weights).requires_grad_(True)
    weights.grad = torch.zeros_like(weights)
    trial = object.__new__(type(optimizer))
    trial.__dict__.update(vars(optimizer))
    trial.__dict__.pop("step", None)  # wrapped by a scheduler, which would count it
    trial._optimizer_step_pre_hooks, trial._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    trial.state = defaultdict(dict)
    trial.param_groups = [{**optimizer.param_groups[0], "params": [weights]}]
    before = dict(trial.param_groups[0])
    try:
        trial.step()
    except Exception as error:  # optimizers raise what they like
        return StateLayout({}, {}, (f"something unknown (a step on zeros fails: {type(error).__name__}: {error})",))
    state = {key: value for key, value in trial.state[weights].items() if value is not None}
    per_weight = {
        key: value.dtype
        for key, value in state.items()
        if torch.is_tensor(value) and value.shape == weights.shape and value.is_floating_point()
    }
    scalars = {
        key: value
        for key, value in state.items()
        if isinstance(value, int | float) or (torch.is_tensor(value) and value.numel() == 1)
    }
    other = [key for key in state if key not in per_weight | scalars]
    # As Prodigy and schedule-free optimizers do; of groups only the learning rate is saved.
    other += [f"'{key}' in its groups" for key, value in trial.param_groups[0].items() if before.get(key) is not value]
    return StateLayout(per_weight, scalars, tuple(other))


def forget_last_step(adam: DeepSpeedCPUAdam) -> None:
    """Let the next step's bias correction follow from step counts alone, as it must if a run is to be resumed exactly.

    Its C++ part multiplies the last correction by beta if the count is one more than in the last call, and takes a
    power otherwise (`Adam_Optimizer::IncrementStep`, 0.19.8); the two differ in the last bit. A step on zeros with a
    count that is never reached makes it take the power.
    """
    group, nothing = adam.param_groups[0], torch.zeros(1)
    beta1, beta2 = group["betas"]
    adam.ds_opt_adam.adam_update(
        adam.opt_id,
        2**31,
        0.0,
        beta1,
        beta2,
        group["eps"],
        0.0,
        True,
        nothing,
        nothing,
        nothing.clone(),
        nothing.clone(),
    )
