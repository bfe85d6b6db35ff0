"""Write the trained model as a Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

_HEARTBEAT_SECONDS = 10


class ExportError(RuntimeError):
    """What was written is not what the model holds."""


def export(engine: DeepSpeedEngine, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Gather the weights parameter by parameter and write `folder`, which `from_pretrained` opens.

    All ranks take part; rank 0 holds the whole model in host memory and writes. The folder appears complete or not at
    all, and only after it was read back and compared with the model.
    """
    model = engine.module
    engine.empty_partition_cache()  # an evaluation leaves prefetched parameters in flight
    speaks = dist.get_rank() == 0
    copies: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}  # tied names share one tensor, which is written once
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in copies:
            with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                copies[id(tensor)] = tensor.detach().cpu().clone() if speaks else tensor
        weights[name] = copies[id(tensor)]
    with ThreadPoolExecutor(max_workers=1) as background:
        written = background.submit(_write, model, weights, tokenizer, folder) if speaks else None
        _wait_together(written, engine.device)
    if written is not None:
        written.result()  # raises what writing raised


def _wait_together(written: Future[None] | None, device: torch.device) -> None:
    """Until rank 0 has `written`. In short collectives: a large model takes longer than one may last."""
    done = torch.zeros((), device=device)
    while not done:
        if written is not None:
            wait([written], timeout=_HEARTBEAT_SECONDS)
            done.fill_(written.done())
        dist.broadcast(done, src=0)


def _write(
    model: PreTrainedModel, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    was_caching, model.config.use_cache = model.config.use_cache, True  # training only switched it off
    model.save_pretrained(partial, state_dict=dict(weights))  # it empties what it is given
    model.config.use_cache = was_caching
    tokenizer.save_pretrained(partial)
    # On disk experts stand one by one, as in the checkpoints that other tools read.
    _verify(partial, revert_weight_conversion(model, dict(weights)))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _verify(folder: Path, weights: dict[str, Tensor]) -> None:
    """Reopen what was written. Of names that share a tensor one is enough."""
    owners = {name: id(tensor) for name, tensor in weights.items()}
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                tensor = opened.get_tensor(name)
                if name not in weights or not torch.equal(tensor, weights[name]) or tensor.dtype != weights[name].dtype:
                    raise ExportError(
                        f"{folder}: {name} ({tuple(tensor.shape)}, {tensor.dtype}) differs from the model's"
                    )
                found.add(owners[name])
    lost = [name for name in weights if owners[name] not in found]
    if lost:
        raise ExportError(f"{folder} lacks {len(lost)} of the model's tensors, for instance {lost[0]}")
