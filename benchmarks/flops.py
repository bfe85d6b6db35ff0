"""FLOPs that a step executes, and the least that it could, the sum of what passes through its parts.

    deepspeed --num_accelerators 2 benchmarks/flops.py --json flops.json

ZeRO-3 with eager attention, because the counter sees no FLOPs in fused kernels on a CPU. Two of the blocks train: the
top two, the bottom two or two at random; embeddings, head and norm train as well or not; with activation checkpointing
or without it. Then the same with the adapters of LoRA. Recomputation stops early, once it has what backward asked for,
so those ratios may lie below 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import finish, llama, random_batch, start_engine, start_process, train_step, with_lora
from torch.utils.flop_counter import FlopCounterMode

import trainer
from trainer.accounting import step_flops
from trainer.planner.passes import step_parts
from trainer.selectors import Fixed, Uniform


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=3, choices=(0, 1, 2, 3), help="ZeRO stage")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of the model")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences per rank and step")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--lora", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def case(
    args: argparse.Namespace, name: str, blocks: tuple[int, ...], *, outside: bool, checkpointing: bool, rank: int = 0
) -> Any:
    model = llama(
        blocks=args.blocks,
        hidden=args.hidden,
        vocabulary=args.vocabulary,
        length=args.length,
        checkpointing=checkpointing,
        attn_implementation="eager",
    )
    if rank:
        model = with_lora(model, rank=rank)
    always_on = ("embeddings", "head", "norm") if outside else ()
    substrate = "adapter" if rank else "full"
    sparse = trainer.prepare(model, selector=Fixed(blocks=blocks, interval=1), always_on=always_on, substrate=substrate)
    parts = step_parts(model, sparse.structure, sparse.blocks, batch=args.batch, length=args.length)
    minimum = step_flops(
        *parts,
        active=sparse.active,
        embeddings=outside,
        train_head=outside,
        checkpointing=checkpointing,
    )
    engine, _ = start_engine(model, sparse, stage=args.stage, batch=args.batch)
    for step in range(3):  # the last of them with ZeRO-3's prefetching
        ids = random_batch(engine, step, batch=args.batch, length=args.length, vocabulary=args.vocabulary)
        with FlopCounterMode(display=False) as counter:
            train_step(engine, ids)
    engine.destroy()
    executed = counter.get_total_flops()
    return {"name": name, "executed": executed, "minimum": minimum, "ratio": executed / minimum}


def main() -> None:
    args = arguments()
    start_process(args.local_rank)
    random = Uniform(blocks=2, interval=1, seed=1).select(0, args.blocks)
    chosen = {"top two": (args.blocks - 2, args.blocks - 1), "bottom two": (0, 1), f"random two {random}": random}
    cases = [
        case(
            args,
            f"{name}, {'embeddings and head trained' if outside else 'blocks alone'}"
            f"{', checkpointing' if checkpointing else ''}",
            blocks,
            outside=outside,
            checkpointing=checkpointing,
        )
        for name, blocks in chosen.items()
        for outside in (False, True)
        for checkpointing in (False, True)
    ]
    cases += [
        case(
            args,
            f"{name}, LoRA{', checkpointing' if checkpointing else ''}",
            blocks,
            outside=False,
            checkpointing=checkpointing,
            rank=args.lora,
        )
        for name, blocks in chosen.items()
        for checkpointing in (False, True)
    ]
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "local_rank")}
    finish({"cases": cases, "settings": settings}, args.json)


if __name__ == "__main__":
    main()
