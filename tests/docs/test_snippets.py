"""The Python blocks of the pages about loops of one's own, run on a small model in a real process group."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

import trainer
from tests import distributed
from tests.docs.pages import ROOT, blocks
from tests.models import tiny_llama
from trainer.data.tokenizer import bytes_tokenizer
from trainer.selectors import Importance, Uniform

pytestmark = pytest.mark.slow
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
}


def code(page: str) -> list[dict[str, Any]]:
    """What each Python block of a page defines; blocks that need names of the reader's are left out."""
    defined = []
    for block in blocks(ROOT / page, "python"):
        names: dict[str, Any] = {}
        exec(compile(block.text, str(block), "exec"), names)
        defined.append(names)
    return defined


def having(defined: list[dict[str, Any]], name: str) -> Callable[..., Any]:
    (found,) = (names[name] for names in defined if name in names)
    return found


def batch(number: int) -> dict[str, Tensor]:
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "labels": ids}


def _own_loop(rank: int, folder: Path) -> None:
    (folder / "ds.json").write_text(json.dumps(DEEPSPEED))
    defined = code("docs/own-loop.md")
    build, train_step = having(defined, "build"), having(defined, "train_step")
    before_all, *_ = (names for names in defined if "resume" in names)
    with_checkpoints = having(defined, "open_checkpoints")
    (saves,) = (names["save"] for names in defined if "open_checkpoints" in names)

    engine, sparse = build(tiny_llama(layers=4).bfloat16())
    drawn = [p.detach().clone() for p in sparse.trainable_parameters()]
    for number in range(3):
        train_step(engine, [batch(number)])
    assert any(not torch.equal(a, b) for a, b in zip(drawn, sparse.trainable_parameters(), strict=True))
    before_all["save"](engine, folder / "theirs", 3)
    checkpoints, state = with_checkpoints(sparse, folder / "ours")
    assert state == {}
    scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    saves(checkpoints, sparse, scheduler)
    checkpoints.finish()
    again, other = build(tiny_llama(layers=4).bfloat16())
    assert before_all["resume"](again, folder / "theirs") == 3 and other.steps == 3
    third, fresh = build(tiny_llama(layers=4).bfloat16())
    _, state = with_checkpoints(fresh, folder / "ours")
    assert "scheduler" in state and fresh.steps == 3

    assert having(defined, "prepare_id3")(tiny_llama(layers=4, hidden=512), 10).update.budget == 8_000_000
    checkpointed = having(defined, "prepare_with_checkpointing")(tiny_llama(layers=4))
    assert "embeddings" not in checkpointed.always_on
    assert having(defined, "prepare_adapters")(tiny_llama(layers=6)).trainable_parameters()
    of_tokens = having(defined, "prepare_new_tokens")(tiny_llama(layers=4, vocab=261), bytes_tokenizer())
    assert [p.shape for part in of_tokens.always_on.values() for p in part.values()] == [(2, 32), (2, 32)]
    ids = (batch(number)["input_ids"] for number in count())
    measuring = trainer.prepare(tiny_llama(layers=4).bfloat16(), selector=Importance(active_share=0.5))
    having(defined, "attach_measuring")(measuring, _engine(measuring), ids)
    alone = trainer.prepare(tiny_llama(layers=4).bfloat16(), selector=Uniform(blocks=2))
    having(defined, "attach_without_checkpoints")(alone, _engine(alone))

    rows = [{"prompt": f"{number}? ", "chosen": "yes", "rejected": "no"} for number in range(9)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = bytes_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    engine, _ = build(tiny_llama(layers=4, vocab=len(tokenizer)).bfloat16())
    batches = having(defined, "batches")(str(folder / "pairs.jsonl"), tokenizer, 4)
    before = having(defined, "reference")(engine, batches)
    losses = [
        having(defined, "dpo_step")(engine, *both) for _ in range(4) for both in zip(batches, before, strict=True)
    ]
    assert len(batches) == 2 and float(losses[0]) == pytest.approx(0.6931, abs=1e-3), (
        "log 2: the policy is the reference"
    )
    assert losses[-1] < losses[0]


def _engine(sparse: trainer.Sparse) -> Any:
    import deepspeed

    optimizer = torch.optim.AdamW(sparse.param_groups(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=sparse.model, optimizer=optimizer, config=DEEPSPEED)
    return engine


def test_the_page_about_loops_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    distributed.run(_own_loop, tmp_path, ranks=1)


def _readme(rank: int, folder: Path) -> int:
    (folder / "ds.json").write_text(json.dumps(DEEPSPEED))
    first, _ = blocks(ROOT / "README.md", "python")
    names: dict[str, Any] = {"model": tiny_llama(layers=4).bfloat16()}
    exec(compile(first.text, str(first), "exec"), names)
    engine = names["engine"]
    engine.backward(engine(**batch(0)).loss)
    engine.step()
    return names["sparse"].steps


def test_the_first_lines_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert distributed.run(_readme, tmp_path, ranks=1) == [1]


def _trainers(rank: int, folder: Path, index: int) -> bool:
    defined = code("docs/transformers-and-trl.md")
    ds = next(names["DEEPSPEED"] for names in defined if "DEEPSPEED" in names)
    (folder / "ds.json").write_text(json.dumps(ds))
    tokenizer = bytes_tokenizer()
    base = tiny_llama(layers=4, vocab=len(tokenizer))
    base.config.eos_token_id = base.config.pad_token_id = tokenizer.eos_token_id
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    trains = [names["train"] for names in defined if "train" in names and "path" in names["train"].__annotations__]
    ids = [batch(number)["input_ids"][0].tolist() for number in range(24)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    if index == 1:
        rows = Dataset.from_dict({"text": [f"{number} and more words" for number in range(24)]})
    for name in {"TrainingArguments", "SFTConfig"} & trains[index].__globals__.keys():
        trains[index].__globals__[name] = partial(trains[index].__globals__[name], use_cpu=True, max_steps=4)
    trains[index](str(folder / "base"), rows)
    return len(trains) == 3


@pytest.mark.parametrize("index", [0, 1, 2], ids=["Trainer", "SFTTrainer", "adapters"])
def test_the_page_about_other_trainers(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert distributed.run(_trainers, tmp_path, index, ranks=1) == [True]
