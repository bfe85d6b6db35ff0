"""Bytes that ranks send each other in a step, as DeepSpeed's comms logger counts them, over the analytic volume of the
ZeRO stage (`trainer/accounting/communication.py`).

    deepspeed --num_accelerators 4 benchmarks/communication.py --json communication.json

LISA on a tiny Llama, under stages 1, 2 and 3, with a switch at every step. `sent` is what leaves a rank with ring
algorithms; `sent_by_formula_at` goes on to 1,024 ranks. Stage 3 lies below the formula where what forward has gathered
last is still there for backward.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import finish, llama, random_batch, start_engine, start_process, train_step
from deepspeed import comm as dist
from deepspeed.comm.comm import comms_logger

import trainer
from trainer.accounting import Volume, step_volume
from trainer.selectors import Uniform


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6, help="blocks of the model")
    parser.add_argument("--hidden", type=int, default=128, help="width of the model")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--length", type=int, default=16, help="tokens per sequence")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def logged(engine: Any, args: argparse.Namespace, *, steps: int = 2) -> dict[str, float]:
    """Bytes of the messages of one step, by collective, at full size."""
    for step in range(3):  # the trace of ZeRO-3's prefetching is recorded in the first two
        train_step(engine, random_batch(engine, step, batch=1, length=args.length, vocabulary=args.vocabulary))
    dist.configure(enabled=True, prof_all=True, verbose=False)
    comms_logger.reset_data()
    for step in range(3, 3 + steps):
        train_step(engine, random_batch(engine, step, batch=1, length=args.length, vocabulary=args.vocabulary))
    found = comms_logger.get_raw_data()
    dist.configure(enabled=False)
    sizes = {"all_gather": 0.0, "reduce_scatter": 0.0, "all_reduce": 0.0}
    for name, messages in found.items():
        kind = next((kind for kind in sizes if name.startswith(kind)), name)
        # The logger has what goes into a collective: of an all-gather one rank's part.
        scale = dist.get_world_size() if kind == "all_gather" else 1
        sizes[kind] = sizes.get(kind, 0.0) + scale * sum(size * entry[0] for size, entry in messages.items()) / steps
    return sizes


def case(args: argparse.Namespace, stage: int) -> dict[str, Any]:
    ranks = dist.get_world_size()
    model = llama(blocks=args.blocks, hidden=args.hidden, vocabulary=args.vocabulary, length=args.length)
    sparse = trainer.prepare(model, selector=Uniform(blocks=2, interval=1))
    total = sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for block in sparse.blocks for p in block.module.parameters())
    shape = {
        "stage": stage,
        "weight_bytes": 4,
        "gradient_bytes": 4,
        "trained": sum(p.numel() for p in sparse.trainable_parameters()),
        "forward": total,
        "backward": blocks + model.lm_head.weight.numel(),
    }
    volume = step_volume(ranks=ranks, **shape)
    engine, _ = start_engine(model, sparse, stage=stage, batch=1)
    messages = logged(engine, args)
    engine.destroy()
    formula = asdict(volume)
    measured = Volume(*(round(messages[kind]) for kind in ("all_gather", "reduce_scatter", "all_reduce")))
    return {
        "stage": stage,
        "parameters": total,
        "trained": shape["trained"],
        "messages": messages,
        "formula": formula,
        "sent": measured.sent(ranks),
        "sent_by_formula": volume.sent(ranks),
        "ratio": measured.sent(ranks) / volume.sent(ranks),
        "others": sum(size for kind, size in messages.items() if kind not in formula),
        "sent_by_formula_at": {str(2**n): step_volume(ranks=2**n, **shape).sent(2**n) for n in range(1, 11)},
    }


def main() -> None:
    args = arguments()
    start_process(args.local_rank)
    cases = [case(args, stage) for stage in (1, 2, 3)]
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "local_rank")}
    finish({"cases": cases, "largest_ratio": max(c["ratio"] for c in cases), "settings": settings}, args.json)


if __name__ == "__main__":
    main()
