"""Fine-tune a small pretrained model from its folder to an exported one that answers, with each method under ZeRO.

    python benchmarks/real_model.py SMOLLM2 --data ../shared/data/gsm8k --json real-model-smollm2.json
    python benchmarks/real_model.py GEMMA3 --data ../shared/data/gsm8k --json real-model-gemma3.json

SMOLLM2 and GEMMA3 are model folders, such as those of HuggingFaceTB/SmolLM2-135M-Instruct and google/gemma-3-270m. A
model with a chat template learns from conversations in it, another from questions and answers. Every run is one of
`launch/train.py` on `--ranks` processes through DeepSpeed's launcher. Printed for each: the evaluation loss before
training, and by how much it differs from that of the model as transformers loads it; the loss after training; seconds
for a step; what the exported folder says to a question, as transformers generates it; and how many rows of its
embeddings differ from the model's own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.provenance import command  # noqa: E402
from trainer.config.schema import TrainSource  # noqa: E402
from trainer.data.cache import tokenise  # noqa: E402

TRAIN = Path(__file__).resolve().parent.parent / "launch" / "train.py"
QUESTION = "What is the capital of France?"
LORA = "{peft_type: LORA, r: 16, lora_alpha: 32, target_modules: [q_proj, v_proj, up_proj, down_proj]}"
FROZEN = "always_on={embeddings: false, head: false, norm: true}"
# Around the way to the answer in rows of their own.
NEW_TOKENS, MARKED = ("<work>", "</work>"), "-marked"
CASES = {
    "LISA, ZeRO-3": ["method=lisa", "deepspeed=zero3", "optimizer.lr=2e-5"],
    "LISA, ZeRO-3, embeddings frozen": ["method=lisa", "deepspeed=zero3", "optimizer.lr=2e-5", FROZEN],
    "LISA, ZeRO-3, two new tokens": [
        *("method=lisa", "deepspeed=zero3", "optimizer.lr=2e-5", "optimizer.lr_always_on=1e-3"),
        *(f"model.add_tokens=[{', '.join(NEW_TOKENS)}]", "always_on={embeddings: new_rows, norm: true}"),
    ],
    "IST, ZeRO-2": ["method=ist", "deepspeed=zero2", "optimizer.lr=2e-4", f"substrate.peft={LORA}"],
    "LoRA, ZeRO-2": ["method=lora", "deepspeed=zero2", "optimizer.lr=2e-4", f"substrate.peft={LORA}"],
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder in the format of Hugging Face")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and test.jsonl, as GSM8K's")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="some of the runs")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step, of all ranks")
    parser.add_argument("--length", type=int, default=256, help="tokens; longer samples are left out")
    parser.add_argument("--eval-samples", type=int, default=64)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, most in (("train", None), ("test", args.eval_samples)):
            rows = list(fitting(args.data / f"{name}.jsonl", tokenizer, args.length, most))
            write_rows(folder / f"{name}.jsonl", rows)
            write_rows(folder / f"{name}{MARKED}.jsonl", [marked(row) for row in rows])
        plain = plain_loss(args.model, tokenizer, folder, args)
        print(f"the model as transformers loads it: loss {plain:.6f}", file=sys.stderr, flush=True)
        runs = []
        for name in args.only:
            values = CASES[name]
            marks = MARKED if any(value.startswith("model.add_tokens") for value in values) else ""
            data = [f"data.train={folder / f'train{marks}.jsonl'}", f"data.eval={folder / f'test{marks}.jsonl'}"]
            run = trained([*data, *values], folder / str(len(runs)), folder / "cache", args)
            if not marks:  # with other rows in its table it is another model
                run["difference_from_plain"] = abs(run["eval_loss_before"] - plain)
            runs.append({"name": name, **run})
            print(json.dumps(runs[-1], ensure_ascii=False), file=sys.stderr, flush=True)
    figures = {
        "plain_eval_loss": plain,
        "runs": runs,
        "environment": {
            "command": command(),
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers", "peft")},
        },
    }
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fitting(
    source: Path, tokenizer: PreTrainedTokenizerBase, length: int, most: int | None
) -> Iterator[dict[str, Any]]:
    """Yield the rows that fit into `length` tokens, at most `most`, as conversations if there is a chat template."""
    with source.open(encoding="utf-8") as lines:
        rows = map(json.loads, lines)
        # The template and the words of a question and answer take a few tens of tokens.
        short = (row for row in rows if len(tokenizer(row["question"] + row["answer"])["input_ids"]) + 48 <= length)
        for row in islice(short, most):
            if tokenizer.chat_template:
                said = [("user", row["question"]), ("assistant", row["answer"])]
                yield {"messages": [{"role": role, "content": content} for role, content in said]}
            else:
                yield row


def marked(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with the new tokens around the way to the answer."""
    work, result = (row["messages"][1]["content"] if "messages" in row else row["answer"]).rsplit("####", 1)
    answer = f"{NEW_TOKENS[0]}{work}{NEW_TOKENS[1]}{result}"
    if "messages" in row:
        return {"messages": [row["messages"][0], {**row["messages"][1], "content": answer}]}
    return {**row, "answer": answer}


def write_rows(target: Path, rows: list[dict[str, Any]]) -> None:
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@torch.no_grad()
def plain_loss(path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, args: argparse.Namespace) -> float:
    """Return the mean loss over all targets of the evaluation rows, one sample at a time, of the model in `path`."""
    samples = tokenise(
        train=[TrainSource(path=str(folder / "test.jsonl"))],
        eval=(),
        eval_fraction=0.0,
        tokenizer=tokenizer,
        max_length=args.length,
        overflow="error",
        packing=False,
        cache=folder / "cache",
        seed=0,
    ).train
    model = load(path, args.dtype)
    total, count = 0.0, 0
    for sample in samples:
        ids, labels = (torch.tensor(sample[key]).long() for key in ("input_ids", "labels"))
        logits = model(input_ids=ids[None].to(model.device)).logits[0, :-1].float().cpu()
        total += float(nn.functional.cross_entropy(logits.double(), labels[1:], reduction="sum"))
        count += int((labels[1:] != -100).sum())
    return total / count


def load(path: Path, dtype: str) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtypes[dtype], attn_implementation="sdpa").to(device).eval()


def trained(values: list[str], output: Path, cache: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run `launch/train.py` to the end in `output`, and return what is printed of it."""
    words = [
        *("deepspeed", "--num_gpus" if torch.cuda.is_available() else "--num_accelerators", str(args.ranks)),
        *("--master_port", str(free_port()), str(TRAIN), str(TRAIN.parent / "recipes" / "lisa.yaml")),
        *(f"model.path={args.model.resolve()}", f"model.dtype={args.dtype}", "model.activation_checkpointing=false"),
        *(f"data.max_length={args.length}", "data.overflow=error", f"data.cache={cache}", "data.eval_fraction=0"),
        *(f"train.steps={args.steps}", "train.epochs=null", f"train.global_batch_size={args.batch}"),
        *(f"train.micro_batch_size={args.batch // args.ranks}", "eval.micro_batch_size=4", f"output={output}"),
        *("selector.interval=5", *values),
    ]
    finished = subprocess.run(words, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{' '.join(words)}\n{finished.stdout}\n{finished.stderr}")
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    seconds = [record["step_seconds"] for record in records if "step_seconds" in record]
    adapted = (output / "adapter").is_dir()
    exported = output / ("adapter" if adapted else "model")
    base = load(args.model, args.dtype)
    table = base.get_input_embeddings().weight.detach().cpu().clone()
    model = PeftModel.from_pretrained(base, str(exported)).eval() if adapted else load(exported, args.dtype)
    now = model.get_input_embeddings().weight.detach().cpu()[: len(table)]
    return {
        "eval_loss_before": losses[0],
        "eval_loss_after": losses[-1],
        "step_seconds": statistics.median(seconds) if seconds else None,
        "embedding_rows_changed": int((now != table).any(dim=1).sum()),
        "answer": answer(model, AutoTokenizer.from_pretrained(args.model if adapted else exported)),
    }


def answer(model: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the model says to the question, greedily."""
    if tokenizer.chat_template:
        said = [{"role": "user", "content": QUESTION}]
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    else:
        text = f"{tokenizer.bos_token or ''}Question: {QUESTION}\nAnswer:"
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
