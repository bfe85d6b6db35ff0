"""What methods learn from one base: full fine-tuning, LISA, BAdam, LoRA on all and on random blocks, IST, and ID3.

    python benchmarks/quality.py --data ../shared/data/gsm8k --json quality.json
    python benchmarks/quality.py --data ../shared/data/gsm8k --only id3 --json id3.json

A small Llama is first trained whole on the questions, as plain text, to have a base worth adapting; then the methods
learn to answer: each runs with every seed at every learning rate, through `launch/train.py` on one process,
`--parallel` of them at a time. A method's figure is the evaluation loss at the end, with the best of its learning
rates, by mean over the seeds. Steps and samples are the same for all.

`--only weights`: full fine-tuning, LISA with and without embeddings, and BAdam, which trains each block once.
`--only adapters`: LoRA and IST; a row of its own gives random draws the compute of IST's probes as further steps.
`--only id3`: 0.1 % and 1 % of the base's weights, and beside each LoRA with as many trained scalars, or the nearest to
it: of rank 1 on as few kinds of layers as come closest.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.provenance import command  # noqa: E402
from trainer.data.tokenizer import bytes_tokenizer  # noqa: E402

TRAIN = Path(__file__).resolve().parent.parent / "launch" / "train.py"
LORA = ["method=lora", "substrate.peft.r=8", "substrate.peft.lora_alpha=16", "substrate.peft.lora_dropout=0"]
# Learning rates to choose from, where none are given.
OF_WEIGHTS, OF_ADAPTERS, OF_SINGLE_WEIGHTS = (3e-4, 1e-3, 3e-3), (3e-3, 1e-2, 3e-2), (1e-2, 3e-2, 1e-1)
PROBES = {"probes": 3, "update_every": 10, "batch_size": 16}  # the defaults of selector importance

# Per block, of what LoRA of rank 1 trains in each kind of layer: its input and its output, in widths of the model.
WIDTHS = {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2, "gate_proj": 4, "up_proj": 4, "down_proj": 4}


class Method(NamedTuple):
    values: list[str]  # for `launch/train.py`
    rates: tuple[float, ...]


def weights_of_base(args: argparse.Namespace) -> int:
    """Four square matrices, three of the MLP and two norms in each block; embeddings and head of bytes; a norm."""
    vocabulary = len(bytes_tokenizer())
    block = 4 * args.hidden**2 + 3 * 3 * args.hidden**2 + 2 * args.hidden
    return args.blocks * block + 2 * vocabulary * args.hidden + args.hidden


def lora_of_size(scalars: int, args: argparse.Namespace) -> tuple[list[str], int]:
    """Values for LoRA on all blocks with as near as can be to so many trained scalars, and how many those are; of low
    rank where several are within 5 %."""
    kinds = ("q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    choices = []
    for number in range(1, len(kinds) + 1):
        of_rank_1 = args.blocks * args.hidden * sum(WIDTHS[kind] for kind in kinds[:number])
        rank = max(1, round(scalars / of_rank_1))
        off = max(0.05, abs(rank * of_rank_1 / scalars - 1))
        choices.append((off, rank, number, rank * of_rank_1))
    _, rank, number, trained = min(choices)
    values = ["method=lora", f"substrate.peft.r={rank}", f"substrate.peft.lora_alpha={2 * rank}"]
    values += [f"substrate.peft.target_modules=[{', '.join(kinds[:number])}]", "substrate.peft.lora_dropout=0"]
    return values, trained


def id3_methods(args: argparse.Namespace) -> dict[str, Method]:
    compared = {}
    for share in (0.001, 0.01):
        budget = round(share * weights_of_base(args))
        lora, trained = lora_of_size(budget, args)
        name = f"ID3, {share:.1%} of the weights ({budget})"
        compared[name] = Method(["method=id3", f"update.budget={budget}"], OF_SINGLE_WEIGHTS)
        compared[f"LoRA beside it ({trained} scalars)"] = Method(lora, OF_ADAPTERS)
    return compared


def weight_methods(args: argparse.Namespace) -> dict[str, Method]:
    frozen = [f"always_on.{part}=false" for part in ("embeddings", "head", "norm")]
    each_once = f"selector.interval={-(-args.steps // args.blocks)}"
    values = {
        "full fine-tuning": ["method=full"],
        "LISA, two blocks": ["method=lisa"],
        "LISA, two blocks, without embeddings": ["method=lisa", *frozen],
        "BAdam, one block": ["method=badam", each_once],
    }
    return {name: Method(chosen, OF_WEIGHTS) for name, chosen in values.items()}


def adapter_methods(args: argparse.Namespace) -> dict[str, Method]:
    quarter = max(1, args.blocks // 4)
    random = [*LORA, f"selector={{name: uniform, blocks: {quarter}, interval: 1}}"]
    # A probe is a forward, which is half of a step where the base is frozen: backward then has no weight gradients.
    extra = PROBES["probes"] * PROBES["batch_size"] / (PROBES["update_every"] * args.batch) / 2
    longer = round(args.steps * (1 + extra))
    share = f"selector.active_share={quarter / args.blocks}"
    values = {
        "LoRA, all blocks": LORA,
        "LoRA, a random quarter": random,
        "LoRA, a random quarter, with the steps that IST's probes cost": [*random, f"train.steps={longer}"],
        "IST": ["method=ist", *LORA[1:], share],
        f"IST, reward_rate={args.reward_rate:g}": [
            "method=ist",
            *LORA[1:],
            share,
            f"selector.reward_rate={args.reward_rate}",
        ],
    }
    return {name: Method(chosen, OF_ADAPTERS) for name, chosen in values.items()}


GROUPS = {"weights": weight_methods, "adapters": adapter_methods, "id3": id3_methods}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--base-steps", type=int, default=300, help="of full fine-tuning, for the base")
    parser.add_argument("--steps", type=int, default=300, help="of each method")
    parser.add_argument("--reward-rate", type=float, default=100.0, help="of the second row of IST; the paper has 10")
    parser.add_argument("--only", nargs="+", choices=tuple(GROUPS), help="parts of the table")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--rates", type=float, nargs="+", help="learning rates of all methods; each has its own by default"
    )
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--length", type=int, default=288, help="bytes; longer samples are left out")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--eval-samples", type=int, default=256)
    parser.add_argument("--parallel", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        common = [
            f"data.max_length={args.length}",
            "data.overflow=drop",
            f"data.cache={place / 'cache'}",
            f"train.global_batch_size={args.batch}",
            f"train.micro_batch_size={args.batch}",
            "eval.micro_batch_size=8",
            f"eval.max_samples={args.eval_samples}",
            # What the recipe has and does not go with these.
            "train.epochs=null",
            "model.activation_checkpointing=false",
            "model.dtype=fp32",
            "deepspeed=zero2",
        ]
        random = (
            f"model.random={{model_type: llama, hidden_size: {args.hidden}, intermediate_size: {3 * args.hidden}, "
            f"num_hidden_layers: {args.blocks}, num_attention_heads: 4, max_position_embeddings: {args.length}}}"
        )
        base = [
            "method=full",
            f"data.train={questions(args.data, place)}",
            random,
            f"train.steps={args.base_steps}",
            "optimizer.lr=1e-3",
        ]
        start = trained(place / "base", [*common, *base], threads=os.cpu_count() or 1)
        print(f"base: loss on questions {start['first']:.4f} -> {start['last']:.4f}", file=sys.stderr, flush=True)
        answering = [
            f"data.train={args.data.absolute() / 'train.jsonl'}",
            f"data.eval={args.data.absolute() / 'test.jsonl'}",
            "data.eval_fraction=0",
        ]
        adapting = [*common, *answering, f"model.path={place / 'base' / 'model'}", f"train.steps={args.steps}"]
        compared = {name: method for group in args.only or GROUPS for name, method in GROUPS[group](args).items()}
        if args.rates:
            compared = {name: method._replace(rates=tuple(args.rates)) for name, method in compared.items()}
        jobs = [(name, rate, seed) for name in compared for rate in compared[name].rates for seed in range(args.seeds)]

        def run(job: tuple[str, float, int]) -> dict[str, Any]:
            name, rate, seed = job
            output = place / f"{list(compared).index(name)}-{rate}-{seed}"
            values = [*adapting, *compared[name].values, f"optimizer.lr={rate}", f"seed={seed}"]
            figures = trained(output, values, threads=1)
            print(f"{name}, lr {rate}, seed {seed}: {figures['last']:.4f}", file=sys.stderr, flush=True)
            return figures

        summaries = []
        with ThreadPoolExecutor(args.parallel) as pool:
            done = zip(jobs, pool.map(run, jobs), strict=True)
            for name, runs in groupby(done, key=lambda run: run[0][0]):
                results = dict(runs)
                summaries.append(summary(name, compared[name].rates, args.seeds, results))
                # A run that fails ends all; what is there by then is not lost.
                write(args, next(iter(results.values()))["first"], summaries)
    print(json.dumps(summaries, indent=2))


def write(args: argparse.Namespace, base_loss: float, summaries: list[dict[str, Any]]) -> None:
    figures = {
        "base_eval_loss": base_loss,
        "methods": summaries,
        "settings": {key: value for key, value in vars(args).items() if key not in ("json", "data", "parallel")},
        "environment": {
            "command": command(),
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers", "peft")},
        },
    }
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def questions(data: Path, place: Path) -> Path:
    """A file of the questions alone, as text."""
    file = place / "questions.jsonl"
    with (data / "train.jsonl").open(encoding="utf-8") as lines, file.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": json.loads(line)["question"]}) + "\n" for line in lines)
    return file


def trained(output: Path, values: list[str], *, threads: int) -> dict[str, Any]:
    """Train as `values` say; the first and the last evaluation loss, in how many steps each block trained, and the
    importance that was learned."""
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, str(TRAIN), str(TRAIN.parent / "recipes" / "full.yaml"), *values, f"output={output}"]
    finished = subprocess.run(words, env=variables, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{' '.join(words)}\n{finished.stdout}\n{finished.stderr}")
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    steps = [record["active_blocks"] for record in records if "active_blocks" in record]
    learned = [record["importance"] for record in records if "importance" in record]
    return {
        "first": losses[0],
        "last": losses[-1],
        "drawn": [sum(block in active for active in steps) for block in range(1 + max(map(max, steps)))],
        "importance": learned[-1] if learned else None,
    }


def summary(name: str, rates: tuple[float, ...], seeds: int, results: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    losses = {rate: [results[name, rate, seed]["last"] for seed in range(seeds)] for rate in rates}
    best = min(rates, key=lambda rate: statistics.mean(losses[rate]))
    return {
        "name": name,
        "eval_loss": statistics.mean(losses[best]),
        "spread": max(losses[best]) - min(losses[best]),
        "learning_rate": best,
        "at_the_edge_of_the_rates": best in (min(rates), max(rates)),
        "drawn": [results[name, best, seed]["drawn"] for seed in range(seeds)],
        "importance": [results[name, best, seed]["importance"] for seed in range(seeds)],
        "all": {str(rate): values for rate, values in losses.items()},
    }


if __name__ == "__main__":
    main()
