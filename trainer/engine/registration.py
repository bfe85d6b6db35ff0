"""Put another block's parameters into a slot of a running ZeRO optimizer, in place.

This is the only file that uses DeepSpeed's private names. All of them were read in DeepSpeed 0.19.8
(`runtime/zero/stage3.py`, `runtime/zero/stage_1_and_2.py`, `runtime/zero/parameter_offload.py`,
`runtime/zero/partitioned_param_coordinator.py`, `runtime/engine.py`); `PRIVATE_NAMES` lists them, `attach` refuses a
DeepSpeed in which one is missing, and `tests/engine/test_registration.py` fails when one moves.

How it works. ZeRO keeps, for each optimizer group, one flat buffer of weights and one flat fp32 master with its
Adam moments; everything else is bookkeeping that says which parameter lies where. Strata gives every active block
groups of its own (a *slot*). A switch copies the leaving block's weights out of the slot's flat buffer into storage
of their own, the entering block's weights in, and corrects the bookkeeping. Nothing is rebuilt: the optimizer, its
groups, the always-on state, ZeRO-3's module hooks and its fetch trace stay the objects that they were, no collective
runs, and at most one parameter more than before is alive at any moment (where blocks differ in shape: one group).
"""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import count_used_parameters_in_backward
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.linear import zero3_linear_wrap  # noqa: F401 - for `trainer.activations`
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, ZeRoTraceMode
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import get_z3_leaf_modules, link_hp_params
from torch import Tensor, nn

logger = logging.getLogger(__name__)

READ_IN_VERSION = "0.19.8"
# Attributes that the switch reads or writes, by stage.
PRIVATE_NAMES: dict[str, tuple[str, ...]] = {
    "stage 3": tuple(
        """
        _DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition _grad_acc_hooks _leaf_module_hooks
        _max_expected_hooks_seen _optimizer_states_and_gradient_swap_in _optimizer_states_and_gradient_swap_out
        _partition_all_parameters _swappable_optimizer_subgroup fp16_groups fp16_partitioned_groups
        fp16_partitioned_groups_flat fp16_partitioned_groups_flat_id fp16_partitioned_groups_flat_numel
        fp32_partitioned_groups_flat get_param_id grad_partitions_flat_buffer grad_position groups_padding
        initialize_ds_offload ipg_buckets offload_optimizer optimizer param_dict
        param_groups_fp16_flat_cpu_memory parameter_offload params_already_reduced params_in_nvme_and_cpu
        reduce_ready_partitions_and_remove_grads reenter_backward_if_needed should_refresh_expected_hook_count
        sub_group_to_group_id swap_optimizer update_hook_state_and_maybe_run_epilogue
        """.split()
    ),
    "stage 1 or 2": tuple(
        """
        _get_offload_gradient_dict _grad_acc_hooks _hp_optimizer_states_linked _max_expected_hooks_seen
        _param_slice_mappings _update_model_bit16_weights averaged_gradients bit16_groups bit16_groups_flat
        cpu_offload first_offset flatten_dense_tensors_aligned get_data_parallel_partitions get_grad_position
        get_param_id get_partition_info groups_padding has_moe_layers initialize_gradient_partitioning_data_structures
        is_param_in_current_partition nccl_start_alignment_factor offload_gradient_dict optimizer
        parallel_partitioned_bit16_groups param_dict param_id param_names parameter_alignment params_already_reduced
        params_in_partition params_not_in_partition partition_size process_gradients real_dp_process_group
        reenter_backward_if_needed reset_partition_gradient_structures round_robin_bit16_groups
        round_robin_bit16_indices round_robin_bit16_meta round_robin_bit16_offsets round_robin_bit16_padding
        round_robin_gradients setup_buckets should_refresh_expected_hook_count single_partition_of_fp32_groups
        update_hook_state_and_maybe_run_epilogue
        """.split()
    ),
    "stage 3 without offload_param": ("lp_param_buffer",),
    # Of stages 1 and 2 with offload_optimizer.
    "offload": tuple(
        """
        accumulated_grads_in_cpu grad_position param_buffer_of_bit16_for_cpu_offload_groups
        temp_grad_buffer_for_cpu_offload temp_grad_buffer_for_gpu_offload
        """.split()
    ),
    "engine": ("_backward_post_hook", "_configure_zero_optimizer"),
    # Of stage 3, by which it prefetches.
    "coordinator": tuple(
        """
        _PartitionedParameterCoordinator__params_to_release _PartitionedParameterCoordinator__step_id
        _PartitionedParameterCoordinator__submodule_order _PartitionedParameterCoordinator__trace_mode
        _invalidate_trace is_invalid_trace record_module
        """.split()
    ),
}
# Through which ranks on one machine reduce on the CPU (`csrc/cpu/comm/shm.cpp`); DeepSpeed never removes it.
SHARED_MEMORY = "/dev/shm/deepspeed_allreduce_buffer_{user}_{address}_{port}_{rank}"
# Optimizer state with one value per weight. It is zeroed in place and banked; anything else is not understood.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

# Of DeepSpeed's DynamicLossScaler, what moves; the rest is configuration.
_OF_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

Parameters = Mapping[str, nn.Parameter]


class RegistrationError(RuntimeError):
    """This DeepSpeed engine cannot be switched; the message says what to change."""


@dataclass(frozen=True)
class Slice:
    """This rank's part of one registered parameter: the flat range [start, stop) of its full shape.

    `tensors` holds 1-D views of stop - start elements into the live optimizer state: `master` (fp32) and the
    moments. `scalars` holds the values that are not per element (Adam's step count). `shape` is the full shape.
    `settled`: nobody writes to these tensors any more, whatever happens to the parameter.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    tensors: dict[str, Tensor]
    scalars: dict[str, float] = field(default_factory=dict)
    settled: bool = False

    def cloned(self) -> Slice:
        """The same in memory of its own."""
        return replace(self, tensors={key: tensor.clone() for key, tensor in self.tensors.items()}, settled=True)


def missing_names(engine: DeepSpeedEngine, stage: str) -> list[str]:
    """The private names of a stage that this engine's objects do not have."""
    optimizer = engine.optimizer
    holders: dict[str, Any] = {"engine": engine, stage: optimizer}
    if getattr(optimizer, "cpu_offload", False):
        holders["offload"] = optimizer
    if hasattr(optimizer, "parameter_offload"):
        holders["coordinator"] = optimizer.parameter_offload.get_param_coordinator()
        if not optimizer.offload_param:
            holders["stage 3 without offload_param"] = optimizer
    return [
        name for kind, holder in holders.items() for name in PRIVATE_NAMES.get(kind, ()) if not hasattr(holder, name)
    ]


def stored(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: its partition under ZeRO-3, all of it otherwise."""
    return getattr(parameter, "ds_tensor", parameter.data)


def register(engine: DeepSpeedEngine, groups: Sequence[Parameters]) -> Registration:
    """Take over the optimizer of `engine`, so that `groups[i]` can be refilled later.

    An engine that was built with other groups (more trainable, for instance) is rebuilt once, in place: every
    holder of its optimizer stays valid. Raises `RegistrationError` for an engine that cannot be switched.
    """
    optimizer = engine.optimizer
    if type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        return _Stage3(engine, groups)
    if type(optimizer) is DeepSpeedZeroOptimizer:
        return _Stage1And2(engine, groups)
    if optimizer is engine.basic_optimizer and engine.zero_optimization_stage() == 0:
        return _Stage0(engine, groups)
    raise RegistrationError(
        f"cannot switch layers under {type(optimizer).__name__} (ZeRO stage {engine.zero_optimization_stage()}): "
        "use ZeRO stage 1, 2 or 3, or stage 0 in fp32. For stage 1 in bf16 set data_types.grad_accum_dtype to bf16 "
        "in the DeepSpeed configuration"
    )


class Registration(ABC):
    """The optimizer groups of one engine and what they hold now."""

    stage: str

    def __init__(self, engine: DeepSpeedEngine, groups: Sequence[Parameters]) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        self.groups: list[dict[str, nn.Parameter]] = [dict(group) for group in groups]
        self._check_names()
        self._check_common()
        self._check_supported()
        self.numel_before = sum(_full_numel(p) for group in self._live_groups() for p in group)
        self.rebuilt = not self._matches(self.groups)
        if self.rebuilt:
            self._rebuild()
        self._stack_depth = len(parameter_offload.FWD_MODULE_STACK)

    # --- what a stage provides ---------------------------------------------------------------------------------

    @abstractmethod
    def _live_groups(self) -> list[list[nn.Parameter]]:
        """The parameters that the optimizer steps, by group, read from its own structures."""

    @abstractmethod
    def _master(self, index: int) -> Tensor:
        """The flat fp32 tensor (1-D) of group `index` that the basic optimizer steps."""

    @abstractmethod
    def _exchange(self, index: int, leaving: list[nn.Parameter], entering: list[nn.Parameter]) -> None:
        """Give `leaving` storage of their own, lay `entering` into the group's buffers, correct the bookkeeping."""

    @abstractmethod
    def _ranges(self, index: int) -> list[tuple[int, int, int]]:
        """For each parameter of the group: offset in the flat master, and the range [start, stop) of its full shape."""

    @abstractmethod
    def local_shard(self, parameter: nn.Parameter) -> Tensor:
        """The weights of a parameter that this rank stores, flat: all of them below stage 3, else its partition."""

    def own_part(self, piece: Slice) -> Slice:
        """What of a slice this rank is to save: all of it, where ranks hold different ranges."""
        return piece

    def owned_start(self, parameter: nn.Parameter) -> int:
        """Where `owned_range` begins in the flat parameter."""
        return min(_full_numel(parameter), dist.get_rank() * -(-_full_numel(parameter) // dist.get_world_size()))

    def loss_scale_state(self) -> dict[str, float]:
        """Where the dynamic loss scaler (fp16) is; empty without one."""
        scaler = getattr(self.optimizer, "loss_scaler", None)
        return {k: v for k, v in vars(scaler).items() if k in _OF_LOSS_SCALE} if scaler is not None else {}

    def restore_loss_scale(self, state: Mapping[str, float]) -> None:
        """Take back what `loss_scale_state` returned."""
        scaler = getattr(self.optimizer, "loss_scaler", None)
        if scaler is not None:
            vars(scaler).update(state)

    def owned_range(self, parameter: nn.Parameter) -> Tensor:
        """The part of a parameter outside the optimizer that this rank updates: rank r has elements [r c, (r + 1) c)
        of the flat parameter, c = ceil(numel / ranks), which in stage 3 is its partition."""
        chunk = -(-parameter.numel() // dist.get_world_size())
        return parameter.data.view(-1)[dist.get_rank() * chunk : (dist.get_rank() + 1) * chunk]

    def publish(self, parameter: nn.Parameter) -> None:
        """After `owned_range` was written: give every rank that stores this parameter the other ranks' parts."""
        ranks, numel = dist.get_world_size(), parameter.numel()
        chunk = -(-numel // ranks)
        mine = parameter.data.new_zeros(chunk)
        owned = self.owned_range(parameter)
        mine[: owned.numel()] = owned
        whole = parameter.data.new_empty(chunk * ranks)
        dist.all_gather_into_tensor(whole, mine)
        parameter.data.view(-1).copy_(whole[:numel])

    def publish_entries(self, entries: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """As `publish`, for all parameters in one exchange; of each only these flat positions (int64, the same on every
        rank) can have been written to. Sends 4 bytes for each."""
        if dist.get_world_size() == 1 or not entries:
            return
        flat = torch.cat([self._owned_entries(parameter, positions) for parameter, positions in entries])
        dist.all_reduce(flat)  # of a value and zeros: exact
        values = flat.split([positions.numel() for _, positions in entries])
        for (parameter, positions), value in zip(entries, values, strict=True):
            parameter.data.view(-1)[positions] = value.to(parameter.dtype)

    @staticmethod
    def _owned_entries(parameter: nn.Parameter, positions: Tensor) -> Tensor:
        """The weights at `positions` (fp32), zero where another rank owns them."""
        chunk = -(-parameter.numel() // dist.get_world_size())
        return parameter.data.view(-1)[positions].float().where(positions // chunk == dist.get_rank(), 0.0)

    def expect_no_gradients(self) -> None:
        """Before a forward after which nothing that is registered gets a gradient."""

    def _check_supported(self) -> None:
        """Raise `RegistrationError` for settings of this stage that cannot be switched."""

    def held(self) -> dict[str, list[Tensor]]:
        """The live tensors of the model's state on this rank: weights, gradients, masters, moments."""
        weights = [stored(p) for p in self.engine.module.parameters()]
        state = self.engine.basic_optimizer.state.values()
        return {
            "weights": weights,
            "gradients": self._gradients(),
            "masters": self._masters(),
            "moments": [value for entry in state for key, value in entry.items() if key in MOMENTS],
        }

    def fetch_order(self) -> list[nn.Module]:
        """Modules in the order in which a recorded step fetched them; empty without such a recording."""
        return []

    def expect_fetch_order(self, order: Sequence[nn.Module]) -> None:
        """Prefetch along `order` from the next step on."""

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.engine.module.parameters() if p.grad is not None]

    def _masters(self) -> list[Tensor]:
        masters = [self._master(index) for index in range(len(self.groups))]
        return masters + [m.grad for m in masters if m.grad is not None]

    # --- the switch --------------------------------------------------------------------------------------------

    def refill(self, index: int, parameters: Parameters) -> None:
        """Replace what group `index` trains. Masters come from the weights, moments and step counts start at zero."""
        leaving, entering = list(self.groups[index].values()), list(parameters.values())
        for parameter in leaving:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in entering:
            parameter.requires_grad_(True)
        self._exchange(index, leaving, entering)
        self.groups[index] = dict(parameters)
        self._reset_state(index)

    @contextmanager
    def resident(self, index: int) -> Iterator[bool]:
        """While inside, the master and state of group `index` are in memory and what is written to them stays; True
        where that memory serves another group afterwards."""
        yield False

    def masters(self, index: int) -> list[Tensor]:
        """This rank's fp32 masters of group `index`, parameter by parameter, flat."""
        flat = self._master(index).detach().view(-1)
        return [flat.narrow(0, offset, stop - start) for offset, start, stop in self._ranges(index)]

    def slices(self, index: int) -> list[Slice]:
        """This rank's live optimizer state of group `index`, parameter by parameter."""
        flat = self._master(index)
        state = self.optimizer_state(index)
        tensors = {"master": flat.detach()} | {k: v for k, v in state.items() if k in MOMENTS}
        scalars = {k: float(v) for k, v in state.items() if k not in MOMENTS}
        return [
            Slice(
                name=name,
                shape=_full_shape(parameter),
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
            if key not in state:
                state[key] = torch.zeros_like(flat, requires_grad=False)
        for key, value in scalars.items():
            if torch.is_tensor(state.get(key)):
                state[key].fill_(value)
            else:
                state[key] = self._scalar(value, index)

    def forget_state(self, index: int) -> None:
        """Group `index` is as before its first step."""
        self._reset_state(index)

    def optimizer_state(self, index: int) -> dict[str, Any]:
        """The basic optimizer's state of group `index`; empty before its first step."""
        state = dict(self.engine.basic_optimizer.state.get(self._master(index), {}))
        unknown = [k for k, v in state.items() if k not in MOMENTS and torch.is_tensor(v) and v.numel() != 1]
        if unknown:
            raise RegistrationError(
                f"the optimizer {type(self.engine.basic_optimizer).__name__} keeps {', '.join(unknown)}, which no "
                f"bank understands: use bank.name=discard, or an optimizer whose state is {', '.join(MOMENTS)}"
            )
        return state

    def _reset_state(self, index: int) -> None:
        basic = self.engine.basic_optimizer
        flat = self._master(index)
        state = basic.state.get(flat)
        if not state:
            return
        if all(key in MOMENTS or key == "step" for key in state):
            for key, value in state.items():  # in place: no allocation, and memory stays where it is
                if torch.is_tensor(value):
                    value.zero_()
                else:
                    state[key] = type(value)(0)
        else:
            basic.state.pop(flat)

    def _scalar(self, value: float, index: int) -> Any:
        """A step count as the optimizer keeps it: torch in a tensor, on the device if fused; DeepSpeed in an int."""
        basic = self.engine.basic_optimizer
        if not type(basic).__module__.startswith("torch."):
            return int(value)
        group = basic.param_groups[index]
        on_device = group.get("fused") or group.get("capturable")
        return torch.tensor(value, dtype=torch.float32, device=self.engine.device if on_device else "cpu")

    # --- attaching ---------------------------------------------------------------------------------------------

    def registered(self) -> list[list[nn.Parameter]]:
        """What the optimizer steps now, by group, as its own structures have it (the guard compares this)."""
        return self._live_groups()

    def _matches(self, groups: Sequence[Parameters]) -> bool:
        live = [[id(p) for p in group] for group in self._live_groups()]
        return live == [[id(p) for p in group.values()] for group in groups]

    def _check_common(self) -> None:
        """Refuse what every ZeRO stage of DeepSpeed has and no switch understands."""
        zero, basic = self.optimizer, self.engine.basic_optimizer
        if getattr(zero, "optimizer", basic) is not basic:
            raise RegistrationError(
                f"DeepSpeed steps a {type(zero.optimizer).__name__} of its own in place of the {type(basic).__name__} "
                "that it was given: use torch.optim.AdamW or DeepSpeedCPUAdam"
            )
        for name, harmless, key in (
            ("zenflow", False, "zero_optimization.zenflow"),
            ("use_muon", False, "optimizer Muon"),
            ("partial_offload", 1.0, "zero_optimization.offload_optimizer.ratio below 1"),
            ("zero_quantized_nontrainable_weights", False, "zero_optimization.zero_quantized_nontrainable_weights"),
            ("low_precision_master_weights_and_grads", False, "bf16_master_weights_and_grads"),
            ("bf16_master_weights_and_gradients", False, "bf16_master_weights_and_grads"),
            ("fp16_master_weights_and_gradients", False, "fp16_master_weights_and_grads"),
        ):
            value = getattr(zero, name, harmless)
            # Without offload the ratio stands at 0 and means nothing.
            if value and value != harmless and not (name == "partial_offload" and not zero.offload_optimizer):
                raise RegistrationError(f"{key} (here {value}) cannot be switched: leave it out")

    def _check_names(self) -> None:
        missing = missing_names(self.engine, self.stage)
        if missing:
            raise RegistrationError(
                f"DeepSpeed {deepspeed.__version__} has no {', '.join(missing)}; Strata's switch was read in "
                f"{READ_IN_VERSION}: install deepspeed=={READ_IN_VERSION}"
            )

    def _rebuild(self) -> None:
        """Replace the optimizer's groups by ours, which are others, around the same basic optimizer."""
        basic = self.engine.basic_optimizer
        if self.engine.global_steps:
            raise RegistrationError(
                f"this engine has trained {self.engine.global_steps} steps with other groups, and their optimizer "
                "state would be lost: attach before the first step"
            )
        scheduled = self.engine.lr_scheduler is not None or hasattr(basic.step, "_wrapped_by_lr_sched")
        if len(basic.param_groups) != len(self.groups) and scheduled:
            raise RegistrationError(
                f"this engine's optimizer has {len(basic.param_groups)} groups and a learning-rate scheduler that "
                f"counts them, switching needs {len(self.groups)}: build the optimizer from sparse.param_groups(), "
                "or the scheduler after attach"
            )
        settings = [self._settings_of(group) for group in self.groups]
        self._set_requires_grad()
        held = [parameter for group in self._live_groups() for parameter in group]
        self._dispose()
        basic.state.clear()
        self._own_storage(held)  # after masters and moments are gone: what is cloned here must not raise the peak
        basic.param_groups[:] = [
            {**chosen, "params": list(group.values())} for chosen, group in zip(settings, self.groups, strict=True)
        ]
        self._build()
        if not self._matches(self.groups):
            raise RegistrationError(
                "DeepSpeed split an optimizer group: set zero_optimization.sub_group_size to at least "
                f"{max(sum(_full_numel(p) for p in g.values()) for g in self.groups)} elements"
            )

    def _dispose(self) -> None:
        self.optimizer.destroy()
        self.optimizer.__dict__.clear()

    def _build(self) -> None:
        """A new ZeRO optimizer. The old object takes over its attributes, so whoever holds the old one (accelerate's
        wrapper, the tuple that `deepspeed.initialize` returned) goes on holding a working optimizer."""
        new = self.engine._configure_zero_optimizer(self.engine.basic_optimizer)
        self.optimizer.__dict__ = new.__dict__  # both names mean one optimizer from here on
        self.engine.optimizer = self.optimizer = new
        new.register_grad_acc_post_hook(self.engine._backward_post_hook)

    def _settings_of(self, group: Parameters) -> dict[str, Any]:
        """The hyper-parameters that the old groups gave to the first parameter of `group`, else the defaults."""
        first = next(iter(group.values()))
        basic = self.engine.basic_optimizer
        owner = next((i for i, live in enumerate(self._live_groups()) if any(p is first for p in live)), None)
        if owner is None:
            return dict(basic.defaults)
        source = getattr(self.optimizer, "sub_group_to_group_id", {}).get(owner, owner)  # stage 3 may split groups
        return {key: value for key, value in basic.param_groups[source].items() if key != "params"}

    def _set_requires_grad(self) -> None:
        wanted = {id(p) for group in self.groups for p in group.values()}
        for live in self._live_groups():
            for parameter in live:
                parameter.requires_grad_(id(parameter) in wanted)
        for group in self.groups:
            for parameter in group.values():
                parameter.requires_grad_(True)

    def _own_storage(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give parameters that lie in a flat buffer storage of their own, so that the buffer can be freed."""

    def after_step(self) -> None:
        """Drop what recomputation left on DeepSpeed's module stack.

        torch's checkpointing stops a recomputed block early, so its post-forward hooks do not run and its entries
        (`parameter_offload.FWD_MODULE_STACK`, 0.19.8) are never popped: the list would grow for ever.
        """
        del parameter_offload.FWD_MODULE_STACK[self._stack_depth :]
        if isinstance(self.engine.basic_optimizer, DeepSpeedCPUAdam):
            _forget_last_step(self.engine.basic_optimizer)


class _Stage0(Registration):
    """No ZeRO, fp32: the basic optimizer steps the parameters themselves. The reference for the other stages."""

    stage = "stage 0"

    def _live_groups(self) -> list[list[nn.Parameter]]:
        return [list(group["params"]) for group in self.engine.basic_optimizer.param_groups]

    def _dispose(self) -> None:
        return None

    def _build(self) -> None:
        return None

    def _master(self, index: int) -> Tensor:
        raise AssertionError("stage 0 has one state per parameter, not one per group")

    def _masters(self) -> list[Tensor]:
        return []  # fp32 weights are their own masters

    def _exchange(self, index: int, leaving: list[nn.Parameter], entering: list[nn.Parameter]) -> None:
        self.engine.basic_optimizer.param_groups[index]["params"] = list(entering)
        for parameter in leaving:
            self.engine.basic_optimizer.state.pop(parameter, None)

    def masters(self, index: int) -> list[Tensor]:
        return [p.detach().view(-1) for p in self.groups[index].values()]

    def _reset_state(self, index: int) -> None:
        return None  # the state of what left is gone, what entered has none

    def _ranges(self, index: int) -> list[tuple[int, int, int]]:
        return [(0, 0, p.numel()) for p in self.groups[index].values()]

    def slices(self, index: int) -> list[Slice]:
        slices = []
        for name, parameter in self.groups[index].items():
            state = self.engine.basic_optimizer.state.get(parameter, {})
            tensors = {"master": parameter.detach()} | {k: v for k, v in state.items() if k in MOMENTS}
            scalars = {k: float(v) for k, v in state.items() if k not in MOMENTS}
            flat = {k: v.view(-1) for k, v in tensors.items()}
            slices.append(Slice(name, tuple(parameter.shape), 0, parameter.numel(), flat, scalars))
        return slices

    def materialise_state(self, index: int, moments: Iterable[str], scalars: Mapping[str, float]) -> None:
        for parameter in self.groups[index].values():
            state = self.engine.basic_optimizer.state[parameter]
            state.update({key: torch.zeros_like(parameter, requires_grad=False) for key in moments})
            state.update({key: self._scalar(value, index) for key, value in scalars.items()})

    def local_shard(self, parameter: nn.Parameter) -> Tensor:
        return parameter.data.view(-1)

    def own_part(self, piece: Slice) -> Slice:
        chunk = -(-piece.stop // dist.get_world_size())
        start = min(piece.stop, dist.get_rank() * chunk)
        stop = min(piece.stop, start + chunk)
        return replace(piece, start=start, stop=stop, tensors={k: v[start:stop] for k, v in piece.tensors.items()})


class _Stage3(Registration):
    """ZeRO-3: each parameter is partitioned by itself; a group's flat buffer strings the partitions together."""

    stage = "stage 3"

    def __init__(self, engine: DeepSpeedEngine, groups: Sequence[Parameters]) -> None:
        super().__init__(engine, groups)
        self._own_storage_per_group()
        self._hooks: list[list[Any]] = [[] for _ in self.groups]
        self._take_over_hooks()

    def _check_supported(self) -> None:
        if self.optimizer.params_in_nvme_and_cpu:
            raise RegistrationError("offload_param.device=nvme cannot be switched: use cpu or none")
        self._release_cache = self._find_release_cache()
        if self._release_cache is None:
            raise RegistrationError(
                f"DeepSpeed {deepspeed.__version__} keeps its release cache elsewhere: "
                f"install deepspeed=={READ_IN_VERSION}"
            )

    def _live_groups(self) -> list[list[nn.Parameter]]:
        return self.optimizer.fp16_groups

    @contextmanager
    def resident(self, index: int) -> Iterator[bool]:
        swapped = self.optimizer._swappable_optimizer_subgroup(index)  # to NVMe
        if swapped:
            self.optimizer._optimizer_states_and_gradient_swap_in(index)
        yield swapped
        if swapped:
            self.optimizer._optimizer_states_and_gradient_swap_out(index)

    def _master(self, index: int) -> Tensor:
        return self.optimizer.fp32_partitioned_groups_flat[index]

    def _gradients(self) -> list[Tensor]:
        return [self.optimizer.grad_partitions_flat_buffer]

    def local_shard(self, parameter: nn.Parameter) -> Tensor:
        rank = dist.get_rank(group=parameter.ds_process_group)
        size = parameter.partition_numel()
        held = min(size, max(0, parameter.ds_numel - rank * size))  # the last ranks hold padding
        return parameter.ds_tensor.data.view(-1)[:held]

    def owned_range(self, parameter: nn.Parameter) -> Tensor:
        return self.local_shard(parameter)

    def publish(self, parameter: nn.Parameter) -> None:
        parameter.ds_secondary_tensor = None  # hpZ's copy on this machine is out of date now
        if parameter.ds_status is ZeroParamStatus.AVAILABLE:
            parameter.partition()  # and so is a gathered one

    def publish_entries(self, entries: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        for parameter, _ in entries:
            self.publish(parameter)

    def _ranges(self, index: int) -> list[tuple[int, int, int]]:
        ranges, offset = [], 0
        for parameter in self.groups[index].values():
            size = parameter.partition_numel()
            start = min(parameter.ds_numel, dist.get_rank(group=parameter.ds_process_group) * size)
            ranges.append((offset, start, min(parameter.ds_numel, start + size)))
            offset += size
        return ranges

    def _own_storage_per_group(self) -> None:
        """Groups must be replaceable one by one, but DeepSpeed lays all of them into one buffer.

        fp32 weights also become their own masters here, where DeepSpeed keeps an equal copy: its test for that
        compares a torch.device with a string and never holds (stage3.py 0.19.8, `_create_fp32_partitions`).
        """
        zero = self.optimizer
        for index, flat in enumerate(zero.fp16_partitioned_groups_flat):
            own, master = _copy(flat.detach()), self._master(index)
            if (own.dtype, own.device) == (master.dtype, master.device) and not zero.offload_optimizer:
                own.requires_grad_(True)
                own.ds_id = master.ds_id
                if master in zero.optimizer.state:
                    zero.optimizer.state[own] = zero.optimizer.state.pop(master)
                zero.fp32_partitioned_groups_flat[index] = own
            zero.fp16_partitioned_groups_flat[index] = own
            self._view_into(own, zero.fp16_groups[index])
        zero.lp_param_buffer = None
        zero.param_groups_fp16_flat_cpu_memory.clear()  # of offload_param

    @staticmethod
    def _view_into(flat: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        offset = 0
        for parameter in parameters:
            size = parameter.partition_numel()
            parameter.ds_tensor.data = flat.detach().narrow(0, offset, size)
            offset += size

    def _exchange(self, index: int, leaving: list[nn.Parameter], entering: list[nn.Parameter]) -> None:
        zero = self.optimizer
        if any(p.ds_status is ZeroParamStatus.INFLIGHT for p in (*leaving, *entering)):
            zero._partition_all_parameters()  # an evaluation's last prefetch still reads the partitions
        # On one rank a gathered parameter is a view of its partition, and must follow it to its new storage.
        views = [
            p
            for p in (*leaving, *entering)
            if p.ds_status is ZeroParamStatus.AVAILABLE and p.data_ptr() == p.ds_tensor.data_ptr()
        ]
        sizes = [p.partition_numel() for p in entering]
        if sizes == [p.partition_numel() for p in leaving]:
            flat, offset = zero.fp16_partitioned_groups_flat[index].detach(), 0
            for out, into, size in zip(leaving, entering, sizes, strict=True):
                _exchange_storage(out.ds_tensor, into.ds_tensor, flat.narrow(0, offset, size))
                offset += size
        else:
            self._replace_buffers(index, leaving, entering)
        for parameter in views:
            parameter.data = parameter.ds_tensor.data.view(parameter.ds_shape)
        zero.fp16_groups[index][:] = entering
        zero.fp16_partitioned_groups[index][:] = [p.ds_tensor for p in entering]
        zero.fp16_partitioned_groups_flat_numel[index] = sum(sizes)
        zero.fp16_partitioned_groups_flat_id[index] = [p.ds_id for p in entering]
        last = (
            dist.get_rank(group=entering[0].ds_process_group)
            == dist.get_world_size(group=entering[0].ds_process_group) - 1
        )
        zero.groups_padding[index] = [p.padding_size() if last else 0 for p in entering]
        master = self._master(index)
        if master is not zero.fp16_partitioned_groups_flat[index]:
            master.data.copy_(zero.fp16_partitioned_groups_flat[index].data)
        if not zero.swap_optimizer:  # which finds the group's files by it
            master.ds_id = f"{entering[0].ds_id}_{entering[-1].ds_id}"
        self._track_gradients(index, leaving, entering)
        self._hook_group(index)

    def _replace_buffers(self, index: int, leaving: list[nn.Parameter], entering: list[nn.Parameter]) -> None:
        """Blocks of different sizes: the slot's buffers are allocated anew."""
        zero = self.optimizer
        if zero.swap_optimizer:
            raise RegistrationError(
                "offload_optimizer.device=nvme holds one file for each slot, and this model's blocks differ in shape: "
                "use cpu or none"
            )
        for parameter in leaving:
            parameter.ds_tensor.data = _copy(parameter.ds_tensor.data)
        old_flat, old_master = zero.fp16_partitioned_groups_flat[index], self._master(index)
        zero.optimizer.state.pop(old_master, None)
        flat = torch.cat([p.ds_tensor.data.view(-1) for p in entering])
        flat = flat.pin_memory() if old_flat.is_pinned() else flat
        self._view_into(flat, entering)
        zero.fp16_partitioned_groups_flat[index] = flat
        if old_master is old_flat:
            master = flat
        else:
            master = torch.empty(flat.numel(), dtype=old_master.dtype, device=old_master.device)
            if old_master.is_pinned():
                master = master.pin_memory()
        master.requires_grad_(True)
        if zero.offload_optimizer:  # DeepSpeed accumulates into this gradient
            master.grad = torch.zeros_like(master, requires_grad=False)
        zero.fp32_partitioned_groups_flat[index] = master

    def _track_gradients(self, index: int, leaving: list[nn.Parameter], entering: list[nn.Parameter]) -> None:
        zero = self.optimizer
        partitions = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        old_views = [partitions.pop(p.ds_id) for p in leaving]
        for parameter in leaving:
            for table in (zero.param_dict, zero.params_already_reduced, zero.grad_position):
                table.pop(zero.get_param_id(parameter))
        offset = 0
        for parameter in entering:
            key, size = zero.get_param_id(parameter), parameter.partition_numel()
            zero.param_dict[key] = parameter
            zero.params_already_reduced[key] = False
            zero.grad_position[key] = [index, offset, size]
            offset += size
        if [v.numel() for v in old_views] == [p.partition_numel() for p in entering]:
            for parameter, view in zip(entering, old_views, strict=True):
                partitions[parameter.ds_id] = view.zero_()
            return
        del old_views
        # Nothing of the old buffer may be alive when the new one is allocated: it holds all groups' gradients.
        everything = [p for group in zero.fp16_groups for p in group]
        old = zero.grad_partitions_flat_buffer
        dtype, device, pinned = old.dtype, old.device, old.is_pinned()
        partitions.clear()
        del old
        zero.grad_partitions_flat_buffer = None
        buffer = torch.zeros(sum(p.partition_numel() for p in everything), dtype=dtype, device=device)
        zero.grad_partitions_flat_buffer = buffer.pin_memory() if pinned else buffer
        offset = 0
        for parameter in everything:
            partitions[parameter.ds_id] = zero.grad_partitions_flat_buffer.narrow(
                0, offset, parameter.partition_numel()
            )
            offset += parameter.partition_numel()

    # DeepSpeed's own gradient hooks close over the list of parameters that it saw at start-up. These do the same
    # work for whatever is registered now (`create_reduce_and_remove_grad_hooks`, stage3.py 0.19.8).

    def _take_over_hooks(self) -> None:
        zero = self.optimizer
        for handle in (*zero._grad_acc_hooks, *zero._leaf_module_hooks):
            handle.remove()
        zero._leaf_module_hooks.clear()
        for module in get_z3_leaf_modules(self.engine.module):
            zero._leaf_module_hooks.append(module.register_full_backward_hook(self._reduce_leaf))
        for index in range(len(self.groups)):
            self._hook_group(index)

    def _hook_group(self, index: int) -> None:
        for handle in self._hooks[index]:
            handle.remove()
        # Leaf modules (experts) reduce all their parameters at once, when the module's backward is done.
        self._hooks[index] = [
            p.register_post_accumulate_grad_hook(self._reduce)
            for p in self.optimizer.fp16_groups[index]
            if not hasattr(p, "ds_z3_leaf_module")
        ]
        self.optimizer._grad_acc_hooks[:] = [handle for handles in self._hooks for handle in handles]

    def _reduce(self, parameter: nn.Parameter) -> None:
        self._reduce_all([parameter])

    def _reduce_leaf(self, module: nn.Module, grad_input: object, grad_output: object) -> None:
        active = [p for g in self.optimizer.fp16_groups for p in g if getattr(p, "ds_z3_leaf_module", None) is module]
        for parameter in active:
            if parameter.grad is None:  # an expert without tokens in this micro-batch
                parameter.grad = torch.zeros_like(parameter)
        if active:
            self._reduce_all(active)

    def _reduce_all(self, parameters: list[nn.Parameter]) -> None:
        zero = self.optimizer
        refresh = zero.should_refresh_expected_hook_count()
        zero.reenter_backward_if_needed()
        for parameter in parameters:
            zero.reduce_ready_partitions_and_remove_grads(parameter)
        zero.update_hook_state_and_maybe_run_epilogue(
            self._num_expected() if refresh else zero._max_expected_hooks_seen
        )

    def _num_expected(self) -> int:
        registered = [p for group in self.optimizer.fp16_groups for p in group]
        plain = [p for p in registered if not hasattr(p, "ds_z3_leaf_module")]
        leaves = {id(p.ds_z3_leaf_module) for p in registered if hasattr(p, "ds_z3_leaf_module")}
        return count_used_parameters_in_backward(plain) + len(leaves)

    # The trace by which ZeRO-3 prefetches (`PartitionedParameterCoordinator`, partitioned_param_coordinator.py 0.19.8).

    def fetch_order(self) -> list[nn.Module]:
        return list(self._coordinator._PartitionedParameterCoordinator__submodule_order)

    def expect_fetch_order(self, order: Sequence[nn.Module]) -> None:
        """As if `order` had just been recorded; the next forward compares it between ranks and completes it."""
        coordinator = self._coordinator
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        self._release_cache.cache_clear()  # it remembers what each position of the old order released
        coordinator._PartitionedParameterCoordinator__trace_mode = ZeRoTraceMode.RECORD
        for position, module in enumerate(order):
            coordinator._PartitionedParameterCoordinator__step_id = position
            coordinator.record_module(module)

    def _find_release_cache(self) -> Any:
        """The lru_cache around what the coordinator releases at a position of the trace, inside another decorator."""
        decorated = type(self._coordinator)._PartitionedParameterCoordinator__params_to_release
        inside = [decorated, *inspect.getclosurevars(decorated).nonlocals.values()]
        return next((function for function in inside if hasattr(function, "cache_clear")), None)

    @property
    def _coordinator(self) -> PartitionedParameterCoordinator:
        return self.optimizer.parameter_offload.get_param_coordinator()

    # A rebuild keeps ZeRO-3's parameter_offload: its module hooks and its fetch trace know nothing of groups, and a
    # second set of hooks breaks recomputation under activation checkpointing (0.19.8).

    def _dispose(self) -> None:
        zero = self.optimizer
        self._offload = zero.parameter_offload
        for handle in (*zero._grad_acc_hooks, *zero._leaf_module_hooks):
            handle.remove()
        zero.ipg_buckets.clear()
        zero.__dict__.clear()

    def _build(self) -> None:
        with mock.patch.object(DeepSpeedZeroOptimizer_Stage3, "initialize_ds_offload", lambda *_, **__: self._offload):
            super()._build()
        del self._offload

    def _own_storage(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.ds_tensor.data = _copy(parameter.ds_tensor.data)


class _Stage1And2(Registration):
    """ZeRO-1 and 2: a group's weights are one replicated flat buffer, cut into one range per rank."""

    stage = "stage 1 or 2"

    def __init__(self, engine: DeepSpeedEngine, groups: Sequence[Parameters]) -> None:
        super().__init__(engine, groups)
        self._hooks: list[list[Any]] = [[] for _ in self.groups]
        # Ids of parameters that a slot has had and has not now, where blocks differ in their number.
        self._spare_ids: list[list[int]] = [[] for _ in self.groups]
        # DeepSpeed installs gradient hooks only for some settings; without them it reduces at the boundary.
        self._uses_hooks = bool(self.optimizer._grad_acc_hooks)
        for handle in self.optimizer._grad_acc_hooks:
            handle.remove()
        for index in range(len(self.groups)):
            self._hook_group(index)

    def _check_supported(self) -> None:
        if self.optimizer.round_robin_gradients:
            raise RegistrationError("zero_optimization.round_robin_gradients=true cannot be switched: set it to false")
        if self.optimizer.has_moe_layers:
            raise RegistrationError(
                "DeepSpeed's own MoE layers cannot be switched: use a transformers mixture-of-experts model"
            )

    def expect_no_gradients(self) -> None:
        # The end of backward takes for granted that the first gradient allocated the bucket (0.19.8).
        self.optimizer.setup_buckets()

    def _live_groups(self) -> list[list[nn.Parameter]]:
        return self.optimizer.bit16_groups

    def _master(self, index: int) -> Tensor:
        return self.optimizer.single_partition_of_fp32_groups[index]

    def local_shard(self, parameter: nn.Parameter) -> Tensor:
        return parameter.data.view(-1)

    def _rank(self, index: int) -> int:
        return dist.get_rank(group=self.optimizer.real_dp_process_group[index])

    def _ranges(self, index: int) -> list[tuple[int, int, int]]:
        zero = self.optimizer
        size = int(zero.partition_size[index])
        left = self._rank(index) * size
        ranges = []
        for parameter, offset in zip(zero.bit16_groups[index], zero.round_robin_bit16_offsets[index], strict=True):
            start = min(max(left - offset, 0), parameter.numel())
            stop = max(start, min(left + size - offset, parameter.numel()))
            ranges.append((min(max(offset + start - left, 0), size), start, stop))
        return ranges

    def _exchange(self, index: int, leaving: list[nn.Parameter], entering: list[nn.Parameter]) -> None:
        zero = self.optimizer
        same = [p.shape for p in leaving] == [p.shape for p in entering]
        ids = [zero.param_id.pop(id(p)) for p in leaving] + self._spare_ids[index]
        ids += range(len(zero.params_already_reduced), len(zero.params_already_reduced) + len(entering) - len(ids))
        zero.params_already_reduced += [False] * (max(ids) + 1 - len(zero.params_already_reduced))
        self._spare_ids[index] = ids[len(entering) :]
        for position, (parameter, key) in enumerate(zip(entering, ids, strict=False)):
            zero.param_id[id(parameter)] = key
            zero.param_dict[key] = parameter
            parameter.param_idx_in_group = position
            parameter.grad_accum = None
        zero.bit16_groups[index] = list(entering)
        zero.round_robin_bit16_groups[index] = zero.bit16_groups[index]
        if same:
            flat = zero.bit16_groups_flat[index].detach()
            for out, into, offset in zip(leaving, entering, zero.round_robin_bit16_offsets[index], strict=True):
                _exchange_storage(out, into, flat.narrow(0, offset, into.numel()).view(into.shape))
        else:
            self._replace_buffers(index, leaving, entering, ids)
        size, rank = int(zero.partition_size[index]), self._rank(index)
        inside, outside, zero.first_offset[index] = zero.get_partition_info(
            zero.round_robin_bit16_groups[index], size, rank, zero.round_robin_bit16_padding[index]
        )
        zero.params_in_partition[index], zero.params_not_in_partition[index] = inside, outside
        for parameters, flag in ((inside, True), (outside, False)):
            for parameter in parameters:
                zero.is_param_in_current_partition[zero.get_param_id(parameter)] = flag
        if not same:
            self._replan_gradients(index, ids)
        self._master(index).data.copy_(zero.parallel_partitioned_bit16_groups[index][rank].data)
        self._link(index, leaving)
        self._hook_group(index)

    def _replace_buffers(
        self, index: int, leaving: list[nn.Parameter], entering: list[nn.Parameter], ids: list[int]
    ) -> None:
        """Blocks of different shapes: new buffers and a new layout for the slot, as in DeepSpeed's __init__."""
        zero = self.optimizer
        for parameter in leaving:
            parameter.data = parameter.data.clone()
        ranks = dist.get_world_size(group=zero.real_dp_process_group[index])
        multiple = _param_alignment(zero, entering[0])
        padding, offsets, end = [], [], 0
        for position, parameter in enumerate(entering):
            offsets.append(end)
            end += parameter.numel()
            pad = 0 if position == len(entering) - 1 else -end % multiple
            padding.append(pad)
            end += pad
        zero.round_robin_bit16_indices[index] = list(range(len(entering)))
        zero.round_robin_bit16_meta[index] = [torch.zeros_like(p.data, device="meta") for p in entering]
        zero.round_robin_bit16_padding[index] = padding
        zero.round_robin_bit16_offsets[index] = offsets
        old = self._master(index)
        zero.optimizer.state.pop(old, None)
        flat = zero.flatten_dense_tensors_aligned(
            entering, zero.nccl_start_alignment_factor * ranks, use_cpu_data=False, param_padding=padding
        ).detach()
        zero.bit16_groups_flat[index] = flat
        zero._update_model_bit16_weights(index)
        partitions = zero.get_data_parallel_partitions(flat, index)
        zero.parallel_partitioned_bit16_groups[index] = partitions
        size = flat.numel() // ranks
        zero.partition_size[index] = size
        left = self._rank(index) * size
        zero.groups_padding[index] = min(size, max(0, left + size - end))
        master = torch.empty(size, dtype=old.dtype, device=old.device)
        master = master.pin_memory() if old.is_pinned() else master
        zero.single_partition_of_fp32_groups[index] = master.requires_grad_(True)
        zero.optimizer.param_groups[index]["params"] = [master]
        if zero.cpu_offload:
            master.grad = torch.zeros_like(master, requires_grad=False)
            zero.param_buffer_of_bit16_for_cpu_offload_groups[index] = torch.zeros(
                size, dtype=flat.dtype, device=old.device
            )

    def _replan_gradients(self, index: int, ids: list[int]) -> None:
        zero = self.optimizer
        zero.initialize_gradient_partitioning_data_structures()
        zero.reset_partition_gradient_structures()
        if not zero.cpu_offload:
            return
        for key in ids:
            zero.accumulated_grads_in_cpu.pop(key, None)
            zero.grad_position.pop(key, None)
        zero.get_grad_position(
            index, zero.params_in_partition[index], zero.first_offset[index], zero.partition_size[index]
        )
        largest = max(p.numel() for p in zero.bit16_groups[index])
        for name in ("temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload"):
            buffer = getattr(zero, name)
            if buffer.numel() < largest:
                setattr(zero, name, torch.zeros(largest, dtype=buffer.dtype, device=buffer.device))
        zero._get_offload_gradient_dict()

    def _link(self, index: int, leaving: list[nn.Parameter]) -> None:
        """Keep DeepSpeed's public `safe_get_full_*` functions right for what is registered."""
        zero = self.optimizer
        for parameter in leaving:
            parameter._hp_mapping = None
        size = int(zero.partition_size[index])
        padded = any(zero.round_robin_bit16_padding[index])
        link_hp_params(
            lp_param_list=zero.bit16_groups[index],
            flat_hp_partition=self._master(index),
            gradient_dict=zero.averaged_gradients,
            offload_gradient_dict=zero.offload_gradient_dict,
            use_offload=zero.cpu_offload,
            param_group_index=index,
            partition_start=self._rank(index) * size,
            partition_size=size,
            dp_group=zero.real_dp_process_group[index],
            param_offsets=list(zero.round_robin_bit16_offsets[index]) if padded else None,
        )
        linked = [p for p in zero.bit16_groups[index] if p._hp_mapping is not None]
        zero._param_slice_mappings[index] = {
            zero.param_names[p]: p._hp_mapping.get_hp_fragment_address() for p in linked
        }
        zero._hp_optimizer_states_linked = False
        if zero.cpu_offload:
            for parameter in linked:
                parameter._zero_optimizer = zero

    # As in stage 3: DeepSpeed's hooks close over what it saw at start-up (`create_gradient_handling_hooks`, 0.19.8).

    def _hook_group(self, index: int) -> None:
        for handle in self._hooks[index]:
            handle.remove()
        if self._uses_hooks:
            self._hooks[index] = [
                p.register_post_accumulate_grad_hook(lambda p, i=index: self._reduce(p, i))
                for p in self.optimizer.bit16_groups[index]
            ]
        self.optimizer._grad_acc_hooks[:] = [handle for handles in self._hooks for handle in handles]

    def _reduce(self, parameter: nn.Parameter, index: int) -> None:
        zero = self.optimizer
        refresh = zero.should_refresh_expected_hook_count()
        zero.reenter_backward_if_needed()
        zero.process_gradients(parameter, index)
        registered = [p for group in zero.bit16_groups for p in group] if refresh else []
        expected = count_used_parameters_in_backward(registered) if refresh else zero._max_expected_hooks_seen
        zero.update_hook_state_and_maybe_run_epilogue(expected)

    def _own_storage(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.clone()


def _forget_last_step(adam: DeepSpeedCPUAdam) -> None:
    """Let the next step's bias correction follow from step counts alone, as it must if a run is to be resumed exactly.

    Its C++ part multiplies the last correction by beta where the count is one more than in the last call, and takes a
    power otherwise (`Adam_Optimizer::IncrementStep`, 0.19.8); the two differ in the last bit. A step of nothing with
    a count that never comes makes it take the power.
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


def _exchange_storage(leaving: Tensor, entering: Tensor, place: Tensor) -> None:
    """`leaving` moves from `place` to storage of its own, `entering` moves into `place` and gives its own up.

    One tensor at a time, so that a switch needs no more than one parameter's worth of extra memory.
    """
    leaving.data = _copy(place)
    place.copy_(entering.data)
    entering.data = place


def _copy(tensor: Tensor) -> Tensor:
    """With storage of its own, pinned where the original is: offloaded weights go to the device again and again."""
    return tensor.clone().pin_memory() if tensor.is_pinned() else tensor.clone()


def _param_alignment(zero: DeepSpeedZeroOptimizer, parameter: nn.Parameter) -> int:
    return 16 // parameter.element_size() if zero.parameter_alignment else 1


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _full_numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())
