"""Trace the bytes of activations: forward and backward of one block, and of the loss, on tensors without storage.

Nothing is allocated or computed (torch's `FakeTensorMode`): every operator reports the shape of its result, and the
largest sum of live storages is recorded. This works for any architecture and size, and takes a tenth of a second.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, masking_utils

from trainer.accounting.peak import Activations
from trainer.engine.zero.stage3 import zero3_linear_wrap
from trainer.model.blocks import Structure
from trainer.model.loss import summed_loss


class LiveStorages(TorchDispatchMode):
    """Record the largest sum of live storages of operators' results, in bytes, while this mode is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
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


class Tracer:
    """Trace the parts of a model on the meta device, at `batch` sequences of `length` tokens.

    `outside` reads `requires_grad` of the parameters; `block` receives what trains. `zero3`: with the linear
    layers of DeepSpeed's stage 3, which keep their input for backward whether or not their weights train.
    """

    def __init__(
        self, model: PreTrainedModel, structure: Structure, *, batch: int, length: int, zero3: bool = False
    ) -> None:
        self._structure = structure
        # Stage 3 replaces the function for the rest of the process.
        self._linear = zero3_linear_wrap if zero3 else torch._C._nn.linear
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        kept = model.get_submodule(structure.path)
        parent, _, name = structure.path.rpartition(".")
        owner = model.get_submodule(parent)
        # Only one block is traced; copying all of them takes a second.
        setattr(owner, name, nn.ModuleList(list(kept.children())[:1]))
        try:
            self._model = copy.deepcopy(model)
        finally:
            setattr(owner, name, kept)
        with self._running():
            _give_storage(self._model)
            self._model.train()
            dtype = next(p.dtype for p in self._model.parameters() if p.is_floating_point())
            hidden = model.get_input_embeddings().weight.shape[-1]
            self._embedded = torch.empty(batch, length, hidden, dtype=dtype)
            self._labels = torch.empty(batch, length, dtype=torch.long)
            self._captured = self._capture()

    def block(self, module: nn.Module, *, trains: Iterable[str], input_requires_grad: bool) -> Activations:
        """Trace one block, of whose parameters those named in `trains` train."""
        block = copy.deepcopy(module)
        with self._running():
            _give_storage(block)
            block.train()
            names = set(trains)
            for name, parameter in block.named_parameters():
                parameter.requires_grad_(name in names)
            args, kwargs = self._captured
            hidden = torch.empty_like(args[0]).requires_grad_(input_requires_grad)
            return _trace(block, lambda: _first(block(hidden, *args[1:], **kwargs)), hidden, [hidden, args, kwargs])

    def outside(self) -> Activations:
        """Trace final norm, head and an unfused loss, without the embeddings, whose gradient is as large as they."""
        with self._running():
            hidden = torch.empty_like(self._embedded).requires_grad_()
            blocks = cast(nn.ModuleList, self._model.get_submodule(self._structure.path))
            kept = list(blocks.children())
            del blocks[:]

            def loss() -> Tensor:
                return summed_loss(self._model(inputs_embeds=hidden, use_cache=False).logits, self._labels)

            try:
                return _trace(self._model, loss, hidden, [hidden, self._labels])
            finally:
                blocks.extend(kept)

    def _capture(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with which the model calls its first block."""
        first = next(self._model.get_submodule(self._structure.path).children())
        seen: list[Any] = []

        def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append((args, kwargs))
            raise _Reached

        handle = first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._model(inputs_embeds=self._embedded, use_cache=False)
        except _Reached:
            pass
        finally:
            handle.remove()
        (args, kwargs) = seen[0]
        if not args:  # by keyword
            args = (kwargs.pop("hidden_states"),)
        return args, kwargs

    @contextmanager
    def _running(self) -> Iterator[None]:
        # This function reads values; rows without values would count as packed.
        rows = mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda *_, **__: None)
        with self._mode, rows, mock.patch.object(nn.functional, "linear", self._linear):
            yield


class _Reached(Exception):
    pass


def _give_storage(module: nn.Module) -> None:
    """Replace tensors on the meta device by fake ones on the CPU; tied parameters stay tied."""
    seen: dict[int, Tensor] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                seen.setdefault(id(parameter), nn.Parameter(fake, requires_grad=parameter.requires_grad))
                owner._parameters[name] = seen[id(parameter)]  # type: ignore[assignment]
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _trace(module: nn.Module, forward: Callable[[], Tensor], hidden: Tensor, given: Any) -> Activations:
    """Trace `forward` and the backward of its result. `given` exists before and is not counted."""

    def free(parameter: Tensor) -> None:  # as ZeRO's hooks do, once the gradient is in a bucket
        parameter.grad = None

    known = [*module.parameters(), *module.buffers(), *_tensors(given)]
    with torch.no_grad(), LiveStorages() as live:
        live.add(known)
        before = live.now
        result = forward()
        evaluated = live.peak - before
        del result
    handles = [p.register_post_accumulate_grad_hook(free) for p in module.parameters() if p.requires_grad]
    try:
        with LiveStorages() as live:
            live.add(known)
            result = forward()
            saved = live.now - before
            if result.requires_grad:
                edge, gradient = torch.autograd.graph.get_gradient_edge(result), torch.empty_like(result)
                del result  # the next block frees it before this one's backward
                torch.autograd.backward(edge, gradient)
            peak = live.peak - before
    finally:
        for handle in handles:
            handle.remove()
    return Activations(saved=saved, peak=peak, forward=evaluated)


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, Tensor)]


def _first(result: Any) -> Tensor:
    return result if torch.is_tensor(result) else result[0]
