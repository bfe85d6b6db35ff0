"""Trace what a model does: bytes of activations and FLOPs of a pass through a block, and through head and loss.

Nothing is allocated or computed (torch's `FakeTensorMode`): every operator reports the shape of its result, the largest
sum of live storages is recorded, and FLOPs are counted as torch counts them. No name of an architecture's configuration
is read.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel, masking_utils

from trainer.accounting.peak import Activations
from trainer.engine.zero.stage3 import zero3_linear_wrap
from trainer.model.blocks import Structure, full_shape
from trainer.model.loss import summed_loss


@dataclass(frozen=True)
class Pass:
    """Bytes and FLOPs of a forward pass and of the backward pass after it."""

    activations: Activations
    forward: int
    backward: int


class Recorder(TorchDispatchMode):
    """Record the largest sum of live storages of operators' results, in bytes, and the FLOPs of products, convolutions
    and attention, while this mode is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.flops = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def now(self) -> int:
        """Return the bytes that are alive now."""
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        return sum(size for _, size in self._live.values())

    def add(self, tensors: Iterable[Tensor]) -> bool:
        """Count the storages of `tensors`. Returns whether one of them is new."""
        new = [self._add(tensor) for tensor in tensors]
        return any(new)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        operator = getattr(function, "_overloadpacket", None)
        if operator in _FLOPS or operator in flop_registry:
            count = _FLOPS.get(operator) or flop_registry[operator]
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        if self.add(t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)):
            self.peak = max(self.peak, self.now)
        return result

    def _add(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        known = self._live.get(storage._cdata)
        if tensor.device.type == "meta" or (known is not None and not known[0].expired()):
            return False
        self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return True


class GroupedProducts(TorchDispatchMode):
    """Give `_grouped_mm` on fake tensors its shape. Its own rule (torch 2.13) demands bf16 and CUDA's alignment, which
    its kernel for CPUs does not."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.ops.aten._grouped_mm.default:
            return function(*args, **(kwargs or {}))
        return args[0].new_empty(_grouped_shape(args[0].shape, args[1].shape, args[2].shape))


def _grouped_shape(a: Sequence[int], b: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a product that is grouped by rows ([m, k] x [groups, k, n]), by columns, or by k."""
    if len(a) == len(b) == 2:
        return ends[0], a[0], b[1]
    return (a[0], b[-1]) if len(a) == 2 else (a[-2], b[-1])


def _grouped_flops(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Return the FLOPs of scores and of what they weigh; [batch, heads, tokens, width] each."""
    return 2 * query.shape[:-1].numel() * key.shape[2] * (query.shape[3] + value.shape[3])


def _attention_backward_flops(gradient: Tensor, *inputs: Any, **_: Any) -> int:
    return round(2.5 * _attention_flops(*inputs))  # the kernel computes the scores again


# Tensors of more elements share one number where they are run for real.
_SMALL = 2**20
# Of operators that torch 2.13 counts as nothing.
_FLOPS: dict[Any, Any] = {
    torch.ops.aten._grouped_mm: _grouped_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def kinds(blocks: Sequence[nn.Module]) -> list[int]:
    """Return for each block the index of the first one like it: of the same classes, shapes and settings."""
    first: dict[Any, int] = {}
    return [first.setdefault(_likeness(block), index) for index, block in enumerate(blocks)]


def _likeness(block: nn.Module) -> Any:
    """Return what two blocks of a kind have in common. Numbers are left out, most of all a block's own; whether there
    is one is not (a sliding window, the block whose keys are used)."""

    def settings(module: nn.Module) -> list[tuple[str, Any]]:
        plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        said = {name: value for name, value in plain.items() if isinstance(value, str | bool | None)}
        return sorted((name, str(value)) for name, value in said.items() if name != "training")

    modules = tuple((name, type(module), tuple(settings(module))) for name, module in block.named_modules())
    return modules, tuple((name, tuple(full_shape(p))) for name, p in block.named_parameters())


class Tracer:
    """Trace the parts of a model, which may be on the meta device, at `batch` sequences of `length` tokens.

    `zero3`: with the linear layers of DeepSpeed's stage 3, which keep their input for backward whether or not their
    weights train. `real`: run the parts instead of tracing them, with weights that share one number.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        structure: Structure,
        *,
        batch: int,
        length: int,
        zero3: bool = False,
        real: bool = False,
    ) -> None:
        self._model, self._structure = model, structure
        self._batch, self._length = batch, length
        # Stage 3 replaces the function for the rest of the process.
        self._linear = zero3_linear_wrap if zero3 else torch._C._nn.linear
        self._mode = None if real else FakeTensorMode(allow_non_fake_inputs=True)
        self._blocks = list(model.get_submodule(structure.path).children())
        self.kinds = kinds(self._blocks)

    def block(self, index: int, *, trains: Iterable[str], input_requires_grad: bool) -> Pass:
        """Trace the block of this index, of whose parameters those named in `trains` train."""
        kept, *call = self._calls[self.kinds[index]]
        args, kwargs = _own(call)
        names = set(trains)
        with self._running():
            for name, parameter in kept.named_parameters():
                parameter.requires_grad_(name in names)
            hidden = torch.empty_like(args[0]).requires_grad_(input_requires_grad)
            if self._mode is None:
                hidden.data.normal_()
            return _trace(kept, lambda: _first(kept(hidden, *args[1:], **kwargs)), hidden, [hidden, args, kwargs])

    def outside(self, *, head: bool) -> Pass:
        """Trace final norm, head, which trains or not, and an unfused loss. The input embeddings are left out, whose
        gradient is as large as they."""
        with self._running(), self._without(()) as model:
            model.get_output_embeddings().weight.requires_grad_(head)
            hidden = torch.zeros(self._batch, self._length, self._hidden, dtype=_dtype(model), requires_grad=True)
            ids = torch.zeros(self._batch, self._length, dtype=torch.long)
            model.get_input_embeddings().register_forward_hook(lambda *_: hidden)

            def loss() -> Tensor:
                return summed_loss(model(input_ids=ids, use_cache=False).logits, ids)

            return _trace(model, loss, hidden, [hidden, ids])

    @property
    def hidden_bytes(self) -> int:
        """Return the bytes of the largest input of a block."""
        return max(args[0].nbytes for _, args, _ in self._calls.values())

    @property
    def _hidden(self) -> int:
        return int(self._model.get_input_embeddings().weight.shape[-1])

    @cached_property
    def _calls(self) -> dict[int, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
        """Return a copy of each kind's first block, and the arguments with which the model calls it."""
        try:
            # One block of each kind, as often as it takes to come to the last kind.
            return self._capture([self._blocks[kind] for kind in self.kinds[: max(self.kinds) + 1]])
        except Exception:  # blocks that use what certain other ones have computed
            return self._capture(self._blocks)

    def _capture(self, blocks: Sequence[nn.Module]) -> dict[int, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
        found: dict[int, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}
        wanted = set(self.kinds)
        with self._running(), torch.no_grad(), self._without(blocks) as model:
            copies = list(model.get_submodule(self._structure.path).children())
            places = iter(range(len(copies)))

            def seen(module: nn.Module, args: Any, kwargs: Any) -> None:
                index = next(places)
                if index in wanted:
                    found[index] = (module, *_own(_hidden_first(args, kwargs, self._hidden)))
                if wanted == set(found):
                    raise _Reached

            handles = [block.register_forward_pre_hook(seen, with_kwargs=True) for block in set(copies)]
            try:
                model(input_ids=torch.zeros(self._batch, self._length, dtype=torch.long), use_cache=False)
            except _Reached:
                pass
            finally:
                for handle in handles:
                    handle.remove()
        if wanted != set(found):
            raise RuntimeError(f"the model calls {len(found)} of its {len(wanted)} kinds of blocks")
        return found

    @contextmanager
    def _without(self, blocks: Sequence[nn.Module]) -> Iterator[Any]:
        """Copy the model with `blocks` as its only ones; its tensors have no storage, or share one number."""
        parent, _, name = self._structure.path.rpartition(".")
        owner = self._model.get_submodule(parent)
        kept = getattr(owner, name)
        setattr(owner, name, nn.ModuleList(blocks))
        try:
            tensors = [*self._model.parameters(), *self._model.buffers()]
            model = copy.deepcopy(self._model, {id(tensor): self._stand_in(tensor) for tensor in tensors})
        finally:
            setattr(owner, name, kept)
        for config in (model.config, model.config.get_text_config()):
            if getattr(config, "output_router_logits", False):  # of no blocks there are none to make a loss of
                config.output_router_logits = bool(blocks)
        if model.config._attn_implementation not in ("eager", "sdpa"):  # kernels of GPUs, which cannot be traced
            model.set_attn_implementation("sdpa")
        for module in model.modules():
            # What has been put in the place of a forward, such as the fused head's, calls the original model.
            module.__dict__.pop("forward", None)
            if getattr(module, "gradient_checkpointing", False):  # a backward pass would contain a forward pass
                module.gradient_checkpointing = False
        yield model.train()

    def _stand_in(self, tensor: Tensor) -> Tensor:
        shape = full_shape(tensor) if isinstance(tensor, nn.Parameter) else tensor.shape
        if self._mode is not None:
            made = torch.empty(shape, dtype=tensor.dtype)
        else:
            made = torch.full((1,) * len(shape), 0.01).to(tensor.dtype).expand(shape)
            made = made.clone() if made.numel() <= _SMALL else made
        return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    @contextmanager
    def _running(self) -> Iterator[None]:
        with ExitStack() as stack:
            patch = stack.enter_context
            if self._mode is not None:
                stack.enter_context(self._mode)
                stack.enter_context(GroupedProducts())
                # It logs a traceback of its own besides the error that it raises.
                patch(mock.patch.object(logging.getLogger("torch._subclasses.fake_tensor"), "disabled", True))
                # This function reads values; rows without values would count as packed.
                patch(mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda *_, **__: None))
            patch(mock.patch.object(nn.functional, "linear", self._linear))
            yield


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _own(values: Any) -> Any:
    """Copy lists and mappings, into which blocks write what later ones use."""
    if type(values) in (tuple, list):
        return type(values)(_own(value) for value in values)
    if type(values) is dict:
        return {key: _own(value) for key, value in values.items()}
    return copy.copy(values) if isinstance(values, MutableMapping) else values


def _hidden_first(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a block with the hidden states first, which some models give by keyword."""
    if args:
        return args, kwargs
    is_hidden = [n for n, v in kwargs.items() if torch.is_tensor(v) and v.is_floating_point() and v.shape[-1] == hidden]
    name = "hidden_states" if "hidden_states" in kwargs else is_hidden[0]
    return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}


class _Reached(Exception):
    pass


def _trace(module: nn.Module, forward: Callable[[], Tensor], hidden: Tensor, given: Any) -> Pass:
    """Trace `forward` and the backward of its result. `given` exists before and is not counted."""

    def free(parameter: Tensor) -> None:  # as ZeRO's hooks do, once the gradient is in a bucket
        parameter.grad = None

    known = [*module.parameters(), *module.buffers(), *_tensors(given)]
    with torch.no_grad(), Recorder() as alone:
        alone.add(known)
        before = alone.now
        result = forward()
        del result
    handles = [p.register_post_accumulate_grad_hook(free) for p in module.parameters() if p.requires_grad]
    try:
        with Recorder() as both:
            both.add(known)
            result = forward()
            saved = both.now - before
            if result.requires_grad:
                edge, gradient = torch.autograd.graph.get_gradient_edge(result), torch.empty_like(result)
                del result  # the next block frees it before this one's backward
                torch.autograd.backward(edge, gradient)
    finally:
        for handle in handles:
            handle.remove()
    activations = Activations(saved=saved, peak=both.peak - before, forward=alone.peak - before)
    return Pass(activations, forward=alone.flops, backward=both.flops - alone.flops)


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, Tensor)]


def _first(result: Any) -> Tensor:
    return result if torch.is_tensor(result) else result[0]
