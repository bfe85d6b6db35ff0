"""A run of a small model on two ranks with three checkpoints, and helpers to compare and change its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import trainer.config
from tests.engine.parity import Cell, deepspeed_config, full_weights, make_engine, train_step
from tests.models import tiny_model
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.identity import identity_of
from trainer.checkpoint.store import sealed
from trainer.data.tokenizer import bytes_tokenizer
from trainer.export.from_engine import export
from trainer.model import load as models
from trainer.run import setup as build

SHARD = 40_000  # bytes; a block of the model below has 15 488 in bf16, the embeddings 16 896


SETTINGS = [
    "output=run",
    "model.path=base",
    "model.tokenizer=bytes",
    "model.dtype=bf16",
    "deepspeed=zero3",
    "selector={name: uniform, blocks: 1, interval: 2}",
    "bank.name=cpu",
    "always_on.norm=false",
    "train.global_batch_size=4",
    "train.steps=6",
    "data.train=owner/name",
]


def write_base(folder: Path, **fields: Any) -> None:
    """In fp32, so that it is not the dtype of training."""
    tiny_model("llama", vocab_size=len(bytes_tokenizer()), **fields).save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)


@dataclass(frozen=True)
class Trained:
    """The weights on rank 0 after 2, 4 and 6 steps."""

    weights: dict[int, dict[str, Tensor]]


def train(rank: int, workspace: Path) -> Trained:
    """Six steps with a checkpoint every two, and an export of the end in shards; runs in each rank."""
    cell = Cell(stage=3, ranks=2, dtype="bf16", steps=6)
    config = trainer.config.load(None, [setting.replace("=base", f"={workspace}/base") for setting in SETTINGS])
    model = models.load(config.model, bytes_tokenizer(), seed=0, deepspeed=deepspeed_config(cell, micro_batch=2))
    sparse = build.make_sparse(config, model.train(), 6)
    engine = make_engine(cell, model, sparse)
    sparse.attach(engine)
    identity = identity_of(model, bytes_tokenizer(), blocks=sparse.structure.path)
    checkpoints = Checkpoints(sparse, workspace / "run", keep=9, asynchronous=False, identity=identity)
    weights = {}
    for step in range(6):
        train_step(cell, engine, step, rank)
        if step % 2:
            checkpoints.is_best(step + 1, abs(step - 3.0))
            checkpoints.save(step + 1, {"config": config.model_dump(mode="json")})
            weights[step + 1] = full_weights(engine)
    checkpoints.finish()
    export(engine, bytes_tokenizer(), workspace / "live", shard_size=SHARD)
    engine.destroy()
    return Trained(weights)


def opened(folder: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    return {name: parameter.detach().float() for name, parameter in model.named_parameters()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def files(folder: Path, but: str = "") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != but}


def rewrite(path: Path, **fields: Any) -> None:
    """Give keys of a JSON file other values."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_manifest(run: Path, change: Callable[[dict[str, Any]], Any], step: int = 6) -> None:
    """As a program would that knows how to make the checksum."""
    path = run / "checkpoints" / f"step-{step:08d}.json"
    body = json.loads(path.read_text())
    del body["checksum"]
    change(body)
    path.write_bytes(sealed(body))


HEAD = "lm_head.weight"
