"""Find out, before there are weights, whether the fused head and loss compute what a model's own head does.

Architectures scale, cap or transform their logits in ways that a fused head must know of. All of that is outside the
blocks, so a copy of the model without blocks and with a small vocabulary is enough, whatever the size of the model.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.model.loss import AGREEMENT, add_fused_head, summed_loss
from trainer.model.towers import towers_of

_VOCABULARY = 256


@torch.no_grad()
def obstacle(model: PreTrainedModel, blocks: str) -> str | None:
    """Return why the fused loss cannot be used for `model` (on the meta device), in words, or None if it can.

    `blocks` is the path of its list of blocks. Also returns None for a model that does not run without blocks: then
    `check_fused` compares the losses of the whole model at the start of the run.
    """
    name = type(model).__name__
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = _without_blocks(model, blocks)
        hidden = torch.randn(2, 16, model.get_input_embeddings().weight.shape[-1])
        ids = torch.randint(_VOCABULARY, (2, 16))
        try:
            plain = summed_loss(small(inputs_embeds=hidden, use_cache=False).logits, ids)
        except Exception:  # of many types
            return None
        try:
            add_fused_head(small)
            fused = -small(inputs_embeds=hidden, labels=ids, fused_lm_head=True).log_probs.sum()
        except Exception as error:  # AttributeError, TypeError, ...
            return f"the fused head does not fit {name} ({error})"
    if not torch.isclose(fused, plain, rtol=AGREEMENT):
        return f"{name} changes its logits in a way that the fused head does not know"
    return None


def _without_blocks(model: PreTrainedModel, blocks: str) -> PreTrainedModel:
    """Return a copy with random weights on the CPU, with no blocks and `_VOCABULARY` entries in the head."""
    parent, _, name = blocks.rpartition(".")
    owner, kept = model.get_submodule(parent), model.get_submodule(blocks)
    setattr(owner, name, nn.ModuleList())
    try:
        small = copy.deepcopy(model)
    finally:
        setattr(owner, name, kept)
    config = small.config.get_text_config()
    if getattr(config, "output_router_logits", False):  # of experts, which are in the blocks
        config.output_router_logits = False
    head = small.get_output_embeddings()
    towers = towers_of(small)  # of no use to text, and large
    unused = {id(p) for part in (towers.outside.values() if towers else ()) for p in part.values()}
    for module in small.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in unused:
                rows = _VOCABULARY if module is head else parameter.shape[0] if parameter.dim() else 0
                shape = (rows, *parameter.shape[1:]) if parameter.dim() else ()
                module._parameters[key] = nn.Parameter(_random(shape, table=isinstance(module, nn.Embedding)))
        for key, buffer in module._buffers.items():
            if buffer is not None:
                fill = torch.ones if buffer.is_floating_point() else torch.zeros
                module._buffers[key] = fill(buffer.shape, dtype=buffer.dtype)
    return small.eval()


def _random(shape: tuple[int, ...], *, table: bool) -> Tensor:
    """Return weights of a usual size, around one for norms. All rows of a table are one row, which takes no memory."""
    if table:
        return torch.randn(1, *shape[1:]).expand(shape)
    return 0.1 * torch.randn(shape) + (len(shape) < 2)
