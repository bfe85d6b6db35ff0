"""Compare two versions of Strata to the bit: losses and final weights of ten configurations on two ranks.

    python benchmarks/same_numbers.py BEFORE

trains each configuration with the `launch/train.py` of a checkout of another commit in the folder BEFORE and with this
one, on the CPU from the same seed, and prints which differ. Exits with 1 if any does. Takes about six minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
BASE = {
    "model.random.model_type": "llama",
    "model.random.hidden_size": 32,
    "model.random.intermediate_size": 64,
    "model.random.num_hidden_layers": 4,
    "model.random.num_attention_heads": 4,
    "model.random.num_key_value_heads": 2,
    "model.random.max_position_embeddings": 64,
    "model.tokenizer": "bytes",
    "model.dtype": "fp32",
    "data.train": "train.jsonl",
    "data.eval_fraction": 0.2,
    "data.max_length": 48,
    "train.steps": 12,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 1,
    "optimizer.lr": 5.0e-3,
    "schedule.warmup_steps": 1,
    "eval.every": 6,
}
LISA = {"method": "lisa", "selector.blocks": 2, "selector.interval": 2}
ADAPTER = {"substrate.peft": "{peft_type: LORA, r: 4, lora_alpha: 8, target_modules: [q_proj, v_proj, down_proj]}"}
CONFIGURATIONS = {
    "LISA, stage 0": {**LISA, "deepspeed": "zero0"},
    "LISA, stage 1, bank cpu": {**LISA, "deepspeed": "zero1", "bank.name": "cpu"},
    "LISA, stage 2, clipping": {**LISA, "deepspeed": "zero2", "train.gradient_clipping": 0.3},
    "LISA, stage 3": {**LISA, "deepspeed": "zero3"},
    "LISA, stage 3, bf16, bank device": {**LISA, "deepspeed": "zero3", "model.dtype": "bf16", "bank.name": "device"},
    "BAdam, stage 2, bf16": {"method": "badam", "selector.interval": 3, "deepspeed": "zero2", "model.dtype": "bf16"},
    "LISA, stage 3, offload, bank cpu": {**LISA, "deepspeed": "zero3_offload", "bank.name": "cpu"},
    "IST, stage 3": {"method": "ist", "deepspeed": "zero3", **ADAPTER},
    "LoRA, stage 2": {"method": "lora", "deepspeed": "zero2", **ADAPTER},
    "ID3, stage 3": {"method": "id3", "update.budget": 500, "update.growth_steps": 8, "deepspeed": "zero3"},
}


def numbers(tree: Path, place: Path, values: dict[str, object]) -> tuple[list[object], dict[str, str]]:
    """Return all losses and gradient norms of a run, and the SHA-256 of what it wrote."""
    place.mkdir(parents=True)
    rows = [{"question": f"{i} plus {i % 7}?" + "?" * (i % 5), "answer": str(i + i % 7)} for i in range(40)]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "empty.yaml").write_text("")
    arguments = [f"{key}={value}" for key, value in {**BASE, **values}.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(tree)}
    done = subprocess.run(
        [*launcher, tree / "launch" / "train.py", "empty.yaml", *arguments, "output=run"],
        cwd=place, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{tree}: {arguments}\n{done.stdout}")
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line[key] for line in lines for key in ("loss", "eval_loss", "grad_norm") if key in line]
    files = sorted(file for name in ("model", "adapter") for file in (place / "run" / name).glob("*.safetensors"))
    return losses, {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the commit to compare with")
    before = parser.parse_args().before.resolve()
    different = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, values) in enumerate(CONFIGURATIONS.items()):
            first = numbers(before, Path(folder) / f"{number}-before", values)
            second = numbers(HERE, Path(folder) / f"{number}-now", values)
            if first != second:
                different.append(name)
            verdict = "differ" if first != second else "the same"
            print(f"{name}: {len(second[0])} losses and norms, {len(second[1])} files: {verdict}", flush=True)
    print(f"{len(different)} of {len(CONFIGURATIONS)} configurations differ")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
