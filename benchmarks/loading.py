"""What loading a model under ZeRO-3 needs in host memory: Strata's way and transformers' own, beside the bound.

    python benchmarks/loading.py --ranks 2 --json loading.json

Models of random weights are written in many files, and each is loaded by either way in a launch of its own. On each
rank the anonymous memory (`RssAnon`, sampled) and all resident memory (`VmHWM`, which counts pages of mapped files as
well) at their highest, above what they were before. The bound is the rank's own partition and one block, for all
resident memory and one file. On the CPU the partition and what is gathered are in host memory too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import start_process
from deepspeed import comm as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trainer.config.schema import ModelConfig
from trainer.data.tokenizer import bytes_tokenizer
from trainer.model import load as models
from trainer.model.blocks import find, full_numel

WAYS = ("strata", "transformers")
# One as its weights lie in the files, one whose experts are stacked while it is loaded. In fp32.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16},
    "mixtral": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_local_experts": 8,
    },
}
ZERO3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
_KIB = 1024
_SAMPLED_EVERY = 0.002  # seconds; the system keeps the peak of all resident memory, not that of the anonymous


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=16, help="of each model")
    parser.add_argument("--file-size", default="60MB", help="of safetensors, at most, but for larger weights")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # what a launched rank is to load, and how
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_model(family: str, folder: Path, args: argparse.Namespace) -> None:
    fields = SHAPES[family] | {"num_hidden_layers": args.blocks, "vocab_size": 8192}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    model.save_pretrained(folder, max_shard_size=args.file_size)


def launched(folder: Path, way: str, ranks: int) -> list[dict[str, Any]]:
    """By rank, what loading `folder` in processes of their own took."""
    with tempfile.NamedTemporaryFile() as file:
        words = ["--folder", str(folder), "--way", way, "--json", file.name]
        command = ["deepspeed", "--num_accelerators", str(ranks), __file__, *words]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            raise SystemExit(f"{' '.join(command)}\n{finished.stdout}\n{finished.stderr}")
        return json.loads(Path(file.name).read_text(encoding="utf-8"))


def load(folder: Path, way: str) -> PreTrainedModel:
    if way == "strata":
        return models.load(ModelConfig(path=str(folder), dtype="fp32"), bytes_tokenizer(), seed=0, deepspeed=ZERO3)
    with models.partitioned_creation(ZERO3):
        return AutoModelForCausalLM.from_pretrained(folder)


def measure(folder: Path, way: str) -> dict[str, Any]:
    """Peaks of this rank in bytes above its level before, and the bounds of them."""
    load(folder.parent / "small", way)  # what a first load needs once and for all
    started = time.perf_counter()
    with peaks() as peak:
        model = load(folder, way)
    seconds = time.perf_counter() - started
    partition = sum(p.ds_tensor.nbytes for p in model.parameters())
    block = max(4 * block.numel for block in find(model).blocks)
    file = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        "anonymous_peak_bytes": peak["RssAnon"],
        "anonymous_bound_bytes": partition + block,
        "anonymous_over_bound": peak["RssAnon"] / (partition + block),
        "resident_peak_bytes": peak["VmHWM"],
        "resident_bound_bytes": partition + block + file,
        "resident_over_bound": peak["VmHWM"] / (partition + block + file),
        "partition_bytes": partition,
        "block_bytes": block,
        "file_bytes": file,
        "model_bytes": sum(4 * full_numel(p) for p in model.parameters()),
        "seconds": seconds,
    }


@contextmanager
def peaks() -> Iterator[dict[str, int]]:
    """Bytes of `RssAnon` and `VmHWM` at their highest while inside, above what is resident when it is entered."""
    found: dict[str, int] = {}
    done = threading.Event()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = memory()
    highest = [before["RssAnon"]]

    def sample() -> None:
        while not done.wait(_SAMPLED_EVERY):
            highest[0] = max(highest[0], memory()["RssAnon"])

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield found
    finally:
        done.set()
        sampler.join()
    found["RssAnon"] = highest[0] - before["RssAnon"]
    found["VmHWM"] = memory()["VmHWM"] - before["VmRSS"]


def memory() -> dict[str, int]:
    """Bytes of this process, by the kernel's names."""
    status = Path("/proc/self/status").read_text()
    return {name: int(size) * _KIB for name, size in re.findall(r"^(VmHWM|VmRSS|RssAnon):\s+(\d+) kB$", status, re.M)}


def rank_main(args: argparse.Namespace) -> None:
    start_process(args.local_rank)
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, measure(args.folder, args.way))
    if dist.get_rank() == 0:
        args.json.write_text(json.dumps(by_rank), encoding="utf-8")


def main() -> None:
    args = arguments()
    if args.folder:
        return rank_main(args)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for family in SHAPES:
            folder = Path(place, family, "model")
            write_model(family, folder, args)
            write_model(family, folder.with_name("small"), argparse.Namespace(**vars(args) | {"blocks": 1}))
            files = len(list(folder.glob("*.safetensors")))
            figures[family] = {"files": files} | {way: launched(folder, way, args.ranks) for way in WAYS}
    figures["settings"] = {"ranks": args.ranks, "blocks": args.blocks, "file_size": args.file_size, "shapes": SHAPES}
    figures["environment"] = {
        "command": "python benchmarks/loading.py",
        "date": datetime.date.today().isoformat(),
        "device": "cpu",
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers", "safetensors")},
    }
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
