"""What one card trains of a model of full size: LISA, IST, LoRA and the rest on random weights of known shapes.

    python benchmarks/seventy_b.py --shape 13b 34b 70b --lengths 1024 4096 --seconds 500 --json seventy.json
    python benchmarks/seventy_b.py --shape 8b --method lora ist lisa --offload never --batch 4 --json eight.json

Runs unattended. Every shape and method has a process of its own; none is started with less of `--seconds` left than the
longest so far took, one that is not done by then is stopped, and what each length measured is kept. Weights are drawn
on the card, block by block and in bf16, so that the model is never in host memory. With `--offload always` masters,
moments and gradients of what trains are in host memory (ZeRO-2): a Llama-2-70B, whose weights are 137.9 GB, then trains
on one card of 141 GB. The loss is computed tile by tile, activations are checkpointed.

`plan` is by formula; `peak_bytes` is what torch's allocator gave out at most, or without a card the largest sum of live
storages. `--save` writes the blocks that trained, and nothing else of the model, as safetensors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.provenance import command  # noqa: E402
from trainer.cli.train import set_up_process  # noqa: E402

NOT_STARTED, STOPPED, FAILED = "not started", "stopped", "failed"


@dataclass(frozen=True)
class Shape:
    """Of a Llama; heads have `hidden / heads` dimensions."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    key_value_heads: int
    vocabulary: int

    @property
    def numel(self) -> int:
        head = self.hidden // self.heads
        block = self.hidden * head * 2 * (self.heads + self.key_value_heads)
        block += 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.blocks * block + 2 * self.vocabulary * self.hidden + self.hidden


SHAPES = {
    "tiny": Shape(64, 176, 4, 4, 2, 512),
    "8b": Shape(4096, 14336, 32, 32, 8, 128256),  # Llama 3
    "13b": Shape(5120, 13824, 40, 40, 40, 32000),  # Llama 2
    "34b": Shape(8192, 22016, 48, 64, 8, 32000),  # Code Llama
    "70b": Shape(8192, 28672, 80, 64, 8, 32000),  # Llama 2
}
METHODS = ("lisa", "badam", "ist", "id3", "lora", "full")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["70b"], choices=tuple(SHAPES), help="one after the other")
    parser.add_argument("--method", nargs="+", default=["lisa"], choices=METHODS, help="at their published points")
    parser.add_argument("--gamma", type=int, default=2, help="blocks of LISA that train at a time")
    parser.add_argument("--frozen-embeddings", action="store_true", help="LISA without its always-on parts")
    parser.add_argument("--budget", type=int, default=8_000_000, help="weights that ID3 unmasks, in all")
    parser.add_argument("--growth-steps", type=int, default=2, help="in which it does so; 2: before what is measured")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024], help="tokens per sequence, one by one")
    parser.add_argument("--batch", type=int, default=1, help="sequences per step")
    parser.add_argument("--steps", type=int, default=6, help="steps to measure at each length, after two others")
    parser.add_argument("--interval", type=int, default=3, help="steps between switches; IST has its own, one")
    parser.add_argument(
        "--offload", default="always", choices=("always", "never"), help="whether state of what trains is on the host"
    )
    parser.add_argument("--peak-flops", type=float, help="of the card, per second: adds the share that was reached")
    parser.add_argument("--seconds", type=float, default=1e9, help="for all of it")
    parser.add_argument("--save", type=Path, help="folder for the blocks that trained")
    parser.add_argument("--json", type=Path, help="write the figures there as well, after each length")
    return parser.parse_args()


def run_all(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 if every run was measured to its end."""
    set_up_process()  # of those that are started
    ends = time.monotonic() + args.seconds
    runs: list[dict[str, Any]] = []
    longest = 0.0
    for shape in args.shape:
        for method in args.method:
            left = ends - time.monotonic()
            if longest > left:
                reason = f"the longest so far took {longest:.0f} s, and {left:.0f} s of --seconds are left"
                runs.append({"shape": shape, "method": method, "outcome": f"{NOT_STARTED}: {reason}"})
            else:
                runs.append(run_one(args, shape, method, deadline=left))
                longest = max(longest, runs[-1]["seconds"])
            if args.json:
                args.json.write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
    print(table(runs), flush=True)
    return int(any(run["outcome"] != "measured" for run in runs))


def run_one(args: argparse.Namespace, shape: str, method: str, *, deadline: float) -> dict[str, Any]:
    """The figures of one shape and method, from a process of its own; what there is of them where it failed."""
    file = (args.json or Path("seventy_b.json")).with_suffix(f".{shape}-{method}.json")
    file.unlink(missing_ok=True)
    script = Path(__file__).with_name("one_shape.py")
    words = [sys.executable, str(script), "--shape", shape, "--method", method, "--json", str(file)]
    words += ["--lengths", *map(str, args.lengths), "--offload", args.offload]
    for name in ("gamma", "batch", "steps", "interval", "budget", "growth_steps", "peak_flops"):
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    words += ["--frozen-embeddings"] * args.frozen_embeddings
    words += ["--save", str(args.save / f"{shape}-{method}")] if args.save else []
    started = time.monotonic()
    try:
        code = subprocess.run(words, timeout=max(deadline, 1)).returncode
        outcome = "measured" if code == 0 else f"{FAILED}: exit code {code}"
    except subprocess.TimeoutExpired:
        outcome = f"{STOPPED} after {time.monotonic() - started:.0f} s, when --seconds were over"
    figures = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"shape": shape, "method": method}
    file.unlink(missing_ok=True)
    if "environment" in figures:
        figures["environment"] = {"command": command(), **figures["environment"]}
    return {**figures, "outcome": outcome, "seconds": time.monotonic() - started}


def table(runs: list[dict[str, Any]]) -> str:
    lines = ["shape method  tokens  peak GB  plan GB   tokens/s  TFLOP/s  of peak  switch s  outcome"]
    for run in runs:
        for length in run.get("lengths") or [{}]:
            tokens, shown = length.get("tokens", ""), ["", "", "", "", "", ""]
            if "tokens_per_second" in length:
                share = length.get("share_of_peak_flops")
                switch = length["switch_seconds_median"]
                shown = [
                    f"{length['peak_bytes'] / 1e9:.2f}",
                    f"{length['plan_bytes'] / 1e9:.2f}",
                    f"{length['tokens_per_second']:.1f}",
                    f"{length['flops_per_second'] / 1e12:.1f}",
                    f"{share:.3f}" if share else "",
                    f"{switch:.2f}" if switch is not None else "",
                ]
            widths = zip(shown, (8, 8, 10, 8, 8, 9), strict=True)
            cells = " ".join(f"{text:>{width}}" for text, width in widths)
            outcome = length.get("outcome", run["outcome"])
            lines.append(f"{run['shape']:<5} {run['method']:<6} {tokens:>7} {cells}  {outcome}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_all(arguments()))
