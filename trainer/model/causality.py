"""Check what a model sees, by gradient: no token that comes later, and no token of another sample in a packed row.

A model that sees the token it is to predict trains without an error and learns nothing. Whether one does depends on its
code and its configuration, so it is tried: the derivative of a position's logits with respect to the embedding of a
token that it must not see is exactly zero, in every dtype, because a masked token is multiplied by a zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.model.loss import LossError
from trainer.model.towers import replace_special

_SEED = 7919
_LENGTH = 32
_ROWS = 2
# By these names the attention modules of transformers take what an encoder made.
_FROM_ENCODER = {"encoder_hidden_states", "encoder_outputs", "key_value_states", "cross_attention_states"}
_PROBLEMS = ("unseen", "future", "packed")


def check_causal(module: PreTrainedModel, *, packed: bool, key: str, device: torch.device | str) -> None:
    """Raise `LossError` on all ranks if `module` sees what it must not, or has no encoder for its cross-attention.

    Runs one forward and one backward on a few random tokens, called as in training, without computing any gradient of
    a parameter. With `packed` the tokens are three samples in one row. `key` is the configuration key that names the
    model. Collective under ZeRO-3, where it leaves traces that `Sparse.inspecting` removes.
    """
    name = type(_unwrapped(module)).__name__
    if packed and not _takes_position_ids(module):
        raise LossError(f"data.packing: true, but {name} takes no position ids; set data.packing=false")
    inputs, *masks = _tokens(module, packed=packed)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    chosen, later, others = (mask.to(device) for mask in masks)
    with torch.enable_grad(), _embeddings(module) as embedded, _idle_cross_attention(module) as idle:
        try:
            logits = module(**inputs).logits
        except LossError:
            raise
        except Exception as error:  # the model's own code raises many kinds
            raise LossError(f"{key}: {name} fails on a few tokens: {type(error).__name__}: {error}") from error
        if unused := idle():
            raise LossError(
                f"{key}: {name} attends to the output of an encoder ({unused[0]}), and there is none: the weights of "
                f"{len(unused)} such modules would never be used. Choose a decoder-only model"
            )
        gradients = _derivative(logits[chosen], embedded)
    unseen = not gradients or any(gradient.shape[:2] != later.shape for gradient in gradients)
    # Logits that are not finite say nothing; training stops at the first step and names them.
    conclusive = not unseen and bool(torch.isfinite(logits).all())
    seen = {
        "unseen": unseen,
        "future": conclusive and any(bool((gradient[later] != 0).any()) for gradient in gradients),
        "packed": conclusive and any(bool((gradient[others] != 0).any()) for gradient in gradients),
    }
    votes = torch.tensor([float(seen[problem]) for problem in _PROBLEMS], device=logits.device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
    problems = [problem for problem, any_rank in zip(_PROBLEMS, votes.tolist(), strict=True) if any_rank]
    if "unseen" in problems:
        raise LossError(
            f"{key}: whether {name} sees tokens that come later cannot be checked: its logits do not follow from the "
            "output of its input embeddings (get_input_embeddings). Choose another model"
        )
    if "future" in problems:
        raise LossError(
            f"{key}: {name} sees tokens that come later, so it cannot be trained to predict them: choose a causal "
            "decoder (encoders such as BERT become one with is_decoder: true in their config.json)"
        )
    if problems:
        raise LossError(f"data.packing: true, but {name} lets packed samples see each other; set data.packing=false")


def _unwrapped(module: PreTrainedModel) -> PreTrainedModel:
    """Return the model inside PEFT's wrapper, whose class users know."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def _takes_position_ids(module: PreTrainedModel) -> bool:
    accepted = signature(_unwrapped(module).forward).parameters.values()
    return any(p.name == "position_ids" or p.kind is Parameter.VAR_KEYWORD for p in accepted)


def _tokens(module: PreTrainedModel, *, packed: bool) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Return the model's inputs, and three masks [rows, length]: positions whose logits are looked at, later tokens of
    the same sample, and tokens of other samples. The same on every rank."""
    config = module.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    length = min(_LENGTH, positions) if positions and positions > 0 else _LENGTH  # -1: without a limit
    shape = (1 if packed else _ROWS, length)
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    ids = replace_special(ids, module.config, config.vocab_size)
    last = torch.zeros(shape, dtype=torch.bool)
    inside = torch.ones(shape, dtype=torch.bool)
    if packed:
        first, second = length // 3, length - length // 3
        positions = torch.cat([torch.arange(first), torch.arange(second - first), torch.arange(length - second)])
        places = {"position_ids": positions[None]}
        inside[:, :first] = inside[:, second:] = False
        last[:, second - 1] = True
    else:
        places = {"attention_mask": torch.ones(shape, dtype=torch.int64)}
        last[:, -1] = True
    return {"input_ids": ids, **places}, inside & ~last, last, ~inside


@contextmanager
def _embeddings(module: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect what the input embeddings return while inside; gradients can be taken with respect to it."""
    found: list[Tensor] = []

    def replace(embeddings: nn.Module, args: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1].clone()  # which may be changed in place, as a leaf may not

    handle = module.get_input_embeddings().register_forward_hook(replace)
    try:
        yield found
    finally:
        handle.remove()


def _derivative(logits: Tensor, embedded: list[Tensor]) -> list[Tensor]:
    """Return the gradients of a random combination of `logits` [positions, vocabulary] with respect to `embedded`, each
    [rows, length, hidden]; without those that take no part."""
    generator = torch.Generator().manual_seed(_SEED)
    entries = torch.randint(logits.shape[-1], (len(logits), 1), generator=generator).to(logits.device)
    weights = torch.randn(len(logits), 1, generator=generator).to(logits.device)
    value = (logits.gather(-1, entries).float() * weights).sum()
    if not embedded or not value.requires_grad:
        return []
    return [g for g in torch.autograd.grad(value, embedded, allow_unused=True) if g is not None]


@contextmanager
def _idle_cross_attention(module: nn.Module) -> Iterator[Any]:
    """Watch the modules that take the output of an encoder while inside. Yields a function that names those with
    weights that were not called though the module around them was."""
    around = {f"{path}.{name}".lstrip("."): (path, child) for path, name, child in _children(module)}
    called: set[str] = set()
    kinds = {type(child) for _, child in around.values()}
    attending = {kind for kind in kinds if _takes_encoder_output(kind)}
    watched = {
        path
        for path, (_, child) in around.items()
        if type(child) in attending and next(child.parameters(), None) is not None
    }
    parents = {around[path][0] for path in watched}
    modules = dict(module.named_modules())
    handles = [
        modules[path].register_forward_pre_hook(lambda *_, path=path: called.add(path)) for path in watched | parents
    ]
    try:
        yield lambda: sorted(path for path in watched if path not in called and around[path][0] in called)
    finally:
        for handle in handles:
            handle.remove()


def _takes_encoder_output(kind: type[nn.Module]) -> bool:
    return bool(_FROM_ENCODER & signature(kind.forward).parameters.keys())


def _children(module: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield each inner module after the path of the nearest module around it that is called (lists are not) and its
    name from there."""
    lists = (nn.ModuleList, nn.ModuleDict)
    for path, owner in module.named_modules():
        if isinstance(owner, lists):
            continue
        waiting = [(name, child) for name, child in owner.named_children()]
        while waiting:
            name, child = waiting.pop()
            if isinstance(child, lists):
                waiting += [(f"{name}.{inner}", grandchild) for inner, grandchild in child.named_children()]
            else:
                yield path, name, child
