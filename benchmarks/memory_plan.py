"""The planner's bytes against measured ones: the highest moment of a step on rank 0, case by case.

    deepspeed --num_accelerators 2 benchmarks/memory_plan.py --json memory_plan.json

Every case is a configuration, planned by `trainer/planner` and then trained for three steps on random tokens by the
parts that training is made of. On a CPU the largest sum of live storages counts, device and host together; on a GPU
`max_memory_allocated`.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import Tracker, finish, live_bytes, start_process

import deepspeed  # isort: skip
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from trainer.config import RunConfig
from trainer.config.deepspeed.presets import PRESET_FOLDER
from trainer.config.deepspeed.resolve import resolve
from trainer.data.tokenizer import bytes_tokenizer
from trainer.model.loss import Objective
from trainer.planner import Plan, Planner
from trainer.run import setup
from trainer.run.step import train_step

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "intermediate_size": 688,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
    "gpt2": {"model_type": "gpt2", "n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    # Tied, with blocks of two kinds.
    "gemma3": {"model_type": "gemma3_text", "intermediate_size": 688, "num_key_value_heads": 2, "head_dim": 64},
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "intermediate_size": 688,
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "mixtral": {
        "model_type": "mixtral",
        "intermediate_size": 256,
        "num_local_experts": 4,
        "num_key_value_heads": 2,
        "output_router_logits": True,
    },
    "mamba": {"model_type": "mamba", "state_size": 8},
    # Attention and state-space layers beside each other.
    "falcon-h1": {
        "model_type": "falcon_h1",
        "intermediate_size": 688,
        "num_key_value_heads": 2,
        "mamba_d_ssm": 512,
        "mamba_n_heads": 8,
        "mamba_d_head": 64,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 64,
    },
    "lfm2": {
        "model_type": "lfm2",
        "intermediate_size": 688,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
    },
}
DEEPEST = {"name": "fixed", "blocks": [0, 3]}
# Each half of six blocks in turn: from the second step on the other one is banked.
HALVES = {"name": "cyclic", "blocks": 3, "interval": 1}
ALL_OFF = {"embeddings": False, "head": False, "norm": False}


@dataclass(frozen=True)
class Case:
    """A configuration, as keys laid over a small LISA."""

    name: str
    family: str = "llama"
    over: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("stage 0", over={"deepspeed": "zero0", "model": {"dtype": "fp32"}}),
    Case("stage 1", over={"deepspeed": "zero1"}),
    Case("stage 2", over={"deepspeed": "zero2"}),
    Case("stage 3", over={"deepspeed": "zero3"}),
    Case("stage 2, fp32", over={"deepspeed": "zero2", "model": {"dtype": "fp32"}}),
    Case("stage 3, fp32", over={"deepspeed": "zero3", "model": {"dtype": "fp32"}}),
    Case("stage 2, offload", over={"deepspeed": "zero2_offload"}),
    Case("stage 3, offload", over={"deepspeed": "zero3_offload"}),
    Case("stage 3, one block", over={"selector": {"name": "uniform", "blocks": 1}}),
    Case("stage 3, all blocks", over={"method": "full"}),
    # Planned for the deepest draw: block 0.
    Case("stage 2, embeddings frozen", over={"deepspeed": "zero2", "always_on": ALL_OFF, "selector": DEEPEST}),
    Case("stage 3, embeddings frozen", over={"always_on": ALL_OFF, "selector": DEEPEST}),
    Case("stage 2, checkpointing", over={"deepspeed": "zero2", "model": {"activation_checkpointing": True}}),
    Case("stage 3, checkpointing", over={"model": {"activation_checkpointing": True}}),
    Case("stage 2, LoRA", over={"method": "lora", "deepspeed": "zero2"}),
    Case("stage 2, LoRA in two blocks", over={"method": "lora", "deepspeed": "zero2", "selector": DEEPEST}),
    Case("stage 3, LoRA in two blocks", over={"method": "lora", "selector": DEEPEST}),
    Case("stage 3, fused loss", over={"train": {"fused_loss": True}}),
    Case("stage 2, gpt2", "gpt2", {"deepspeed": "zero2"}),
    Case("stage 3, gpt2", "gpt2"),
    Case("stage 3, gpt2, offload", "gpt2", {"deepspeed": "zero3_offload"}),
    *(
        Case(f"stage {stage}, {family}", family, {"deepspeed": f"zero{stage}", "model": {"attention": "auto"}})
        for family in ("gemma3", "qwen3-moe", "mixtral", "mamba", "falcon-h1", "lfm2")
        for stage in (2, 3)
    ),
    Case("stage 2, accumulation", over={"deepspeed": "zero2", "train": {"global_batch_size": 8}}),
    Case("stage 3, accumulation", over={"train": {"global_batch_size": 8}}),
    Case("stage 3, offload, accumulation", over={"deepspeed": "zero3_offload", "train": {"global_batch_size": 8}}),
    Case("stage 2, fixed blocks", over={"deepspeed": "zero2", "selector": DEEPEST}),
    Case("stage 2, bank device", over={"deepspeed": "zero2", "bank": {"name": "device"}, "selector": HALVES}),
    Case("stage 3, bank cpu", over={"bank": {"name": "cpu"}, "selector": HALVES}),
    Case("stage 3, weights offloaded", over={"deepspeed": "zero3_offload", "offload_param": "cpu"}),
    Case("stage 3, hpZ", over={"deepspeed": "zero3_hpz"}),
    Case("stage 2, ID3", over={"method": "id3", "update": {"budget": 20_000}, "deepspeed": "zero2"}),
    Case("stage 3, ID3", over={"method": "id3", "update": {"budget": 20_000}}),
)


@dataclass(frozen=True)
class Size:
    """Of the models and batches."""

    blocks: int = 6
    hidden: int = 256
    vocabulary: int = 2048
    length: int = 256
    batch: int = 2


def configuration(case: Case, size: Size, ranks: int) -> RunConfig:
    heads = max(4, size.hidden // 64)
    random = FAMILIES[case.family] | {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.blocks,
        "num_attention_heads": heads,
        "vocab_size": size.vocabulary,
    }
    if "layer_types" in random:
        random["layer_types"] = [kind for _ in range(size.blocks) for kind in random["layer_types"]][: size.blocks]
    values: dict[str, Any] = {
        "method": "lisa",
        "model": {"random": random, "tokenizer": "bytes", "dtype": "bf16", "attention": "sdpa"},
        "train": {"steps": 3, "global_batch_size": size.batch * ranks, "micro_batch_size": size.batch},
        "data": {"train": "random tokens", "max_length": size.length},
        "checkpoint": {"every": None},
    }
    if case.over.get("method") == "lora":
        values["substrate"] = {"name": "adapter", "peft": {"peft_type": "LORA", "r": 8, "target_modules": "all-linear"}}
    over = dict(case.over)
    if over.pop("offload_param", None):
        over["deepspeed"] = weights_offloaded(over["deepspeed"])
    for key, value in over.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return RunConfig.model_validate(values)


def weights_offloaded(preset: str) -> str:
    """A file like the preset, with the weights in host memory, too."""
    ds = json.loads((PRESET_FOLDER / f"{preset}.json").read_text())
    ds["zero_optimization"]["offload_param"] = {"device": "cpu"}
    file = Path(tempfile.gettempdir()) / f"strata-{preset}-weights.json"
    file.write_text(json.dumps(ds))
    return str(file)


def planned(config: RunConfig, ranks: int) -> Plan:
    return Planner(on_cpu=get_accelerator().device_name() == "cpu").plan(config, ranks)


def measured(config: RunConfig) -> int:
    """Bytes at the highest moment of the third step on this rank."""
    before = live_bytes()  # what DeepSpeed keeps of the cases before
    torch.nn.functional.linear = torch._C._nn.linear  # which stage 3 replaces for the whole process
    ds = resolve(config, dist.get_world_size())
    built = setup.build_model(config, ds, bytes_tokenizer(), num_steps=config.train.steps, empty=False)
    base, model, sparse, ds = built.base, built.model, built.sparse, built.ds
    objective = Objective(base, fused=built.loss.fused, deepspeed=ds)
    optimizer = setup.build_optimizer(config, sparse, offload=setup.offload_device(ds, "optimizer") != "none")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds)
    sparse.attach(engine, guard_every=0)
    engine.train()
    shape = (config.train.micro_batch_size, config.data.max_length)
    vocabulary = base.get_output_embeddings().out_features
    peak = 0
    for _ in range(3):  # the first allocates optimizer state, the second records what ZeRO-3 fetches
        ids = torch.randint(vocabulary, shape)
        with Tracker() as tracker:
            batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
            train_step(engine, objective, [batch] * engine.gradient_accumulation_steps())
        peak = tracker.peak
    engine.destroy()
    del engine, objective, sparse, optimizer, model, base
    gc.collect()
    return peak - before


def compare(case: Case, size: Size) -> dict[str, Any]:
    ranks = dist.get_world_size()
    config = configuration(case, size, ranks)
    plan = planned(config, ranks)
    on_cpu = get_accelerator().device_name() == "cpu"
    predicted = plan.memory.peak + (plan.memory.total_host if on_cpu else 0)
    found = measured(config)
    return {
        "name": case.name,
        "predicted": predicted,
        "measured": found,
        "ratio": predicted / found,
        "moment": plan.memory.highest,
        "parts": plan.memory.parts | ({f"host: {k}": v for k, v in plan.memory.host.items()} if on_cpu else {}),
        "moments": {name: sum(parts.values()) for name, parts in plan.memory.moments.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in Size().__dict__.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--case", help="only those whose name holds this")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    start_process(args.local_rank)
    size = Size(args.blocks, args.hidden, args.vocabulary, args.length, args.batch)
    cases = [compare(case, size) for case in CASES if args.case is None or args.case in case.name]
    worst = max(abs(case["ratio"] - 1) for case in cases)
    finish({"cases": cases, "worst_deviation": worst, "size": size.__dict__}, args.json)


if __name__ == "__main__":
    main()
