"""What ID3 holds and does (update rule `unmask`), by measurement and by formula: bytes, updates of single weights.

    deepspeed --num_accelerators 2 benchmarks/unmask.py --json unmask.json

The mask of a random Llama grows in half of the steps. In every step, whenever backward has made a gradient and at its
end, rank 0's live tensors of the model's state and all dense gradients are counted; `held` is the most of a step,
`allowed` is weights, the gradients of the largest block, 16 bytes for each weight of the budget, its index, and the
step's candidates. `largest_gradients` is the most that dense gradients came to.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import finish, llama, random_batch, start_engine, start_process
from deepspeed import comm as dist

import trainer
from trainer.accounting import measured_state, model_state
from trainer.model.blocks import full_numel
from trainer.selectors import All
from trainer.updates import Unmask
from trainer.updates.unmask import scalar_updates


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=3, choices=(0, 1, 2, 3), help="ZeRO stage")
    parser.add_argument("--blocks", type=int, default=12, help="blocks of the model")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences per rank and step")
    parser.add_argument("--share", type=float, default=0.01, help="of all weights that the budget is")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--frozen-embeddings", action="store_true", help="unmask weights of blocks alone")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


class Most:
    """The most bytes that the model's state with dense gradients, and these alone, come to while backward runs."""

    def __init__(self, model: torch.nn.Module, sparse: trainer.Sparse) -> None:
        self.bytes = self.gradients = 0
        self._sparse = sparse
        self._parameters = list(model.parameters())
        for parameter in self._parameters:
            if parameter.requires_grad:  # before the rule's own hook, which takes the gradient away
                parameter.register_post_accumulate_grad_hook(self.look)

    def look(self, _: torch.nn.Parameter | None = None) -> None:
        alive = sum(p.grad.numel() * p.grad.element_size() for p in self._parameters if p.grad is not None)
        self.gradients = max(self.gradients, alive)
        self.bytes = max(self.bytes, measured_state(self._sparse.held()).total + alive)


def main() -> None:
    args = arguments()
    start_process(args.local_rank)
    model = llama(
        blocks=args.blocks, hidden=args.hidden, vocabulary=args.vocabulary, length=args.length, dtype=args.dtype
    )
    numels = [p.numel() for p in model.parameters()]
    budget, growing = round(args.share * sum(numels)), args.steps // 2
    sparse = trainer.prepare(
        model,
        selector=All(interval=10**9),
        update=Unmask(budget=budget, growth_steps=growing, gradient_clipping=1.0),
        always_on=() if args.frozen_embeddings else ("embeddings", "head", "norm"),
    )
    most = Most(model, sparse)
    engine, _ = start_engine(model, sparse, stage=args.stage, batch=args.batch, dtype=args.dtype)
    rule: Any = sparse.update
    weight_bytes, ranks = 2 if args.dtype == "bf16" else 4, dist.get_world_size()
    state = model_state(numels, [], stage=args.stage, ranks=ranks, weight_bytes=weight_bytes)
    block = weight_bytes * max(block.numel for block in sparse.blocks)
    indices = 8 * budget
    trained = [full_numel(p) for p in sparse.trainable_parameters()]
    steps = []
    for number in range(args.steps):
        footprint = rule.footprint(trained, [], ranks=ranks, weight_bytes=weight_bytes, accumulation=1)
        candidates = next((part.size for part in footprint.backward if part.name == "candidates"), 0)
        ids = random_batch(engine, number, batch=args.batch, length=args.length, vocabulary=args.vocabulary)
        most.bytes = 0
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        most.look()
        held = most.bytes
        engine.step()
        allowed = state.weights + block + 16 * budget + indices + candidates
        steps.append({"held_bytes": held, "allowed_bytes": allowed, "ratio": held / allowed})
    figures: dict[str, Any] = {
        "weights": sum(numels),
        "budget": budget,
        "unmasked": rule.unmasked,
        "updates": rule.updates,
        "updates_by_formula": scalar_updates(budget=budget, steps=growing, total_steps=args.steps),
        "largest_ratio": max(step["ratio"] for step in steps),
        "weight_bytes": state.weights,
        "full_fine_tuning_bytes": (weight_bytes + 16) * sum(numels) // ranks,
        "block_gradient_bytes": block,
        "largest_gradients_bytes": most.gradients,
        "steps": steps,
        "settings": {key: value for key, value in vars(args).items() if key not in ("json", "local_rank")},
    }
    finish(figures, args.json)


if __name__ == "__main__":
    main()
