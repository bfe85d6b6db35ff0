"""LISA on real data under ZeRO-3, against a run that trains embeddings alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import forked
from tests.launching import (
    SCRIPT,
    metrics,
)
from tests.run.whole_runs import evaluations, loss_by_hand
from trainer.config.schema import TrainSource
from trainer.data.cache import tokenise
from trainer.data.tokenizer import bytes_tokenizer

GSM8K = SCRIPT.parent.parent.parent / "shared" / "data" / "gsm8k"
GSM8K_LENGTH = 288  # bytes: a short row, of which there are 471 to train and 74 to evaluate on
GSM8K_RECIPE = f"""\
method: lisa
model:
  random:
    model_type: llama
    hidden_size: 128
    intermediate_size: 384
    num_hidden_layers: 4
    num_attention_heads: 4
    num_key_value_heads: 2
    max_position_embeddings: {GSM8K_LENGTH}
  dtype: fp32
selector: {{blocks: 2, interval: 5}}
optimizer: {{lr: 1.0e-3}}
schedule: {{name: cosine, warmup_steps: 8}}
train: {{steps: 80, global_batch_size: 4, micro_batch_size: 2}}
eval: {{micro_batch_size: 8}}
data: {{train: train.jsonl, eval: test.jsonl, max_length: {GSM8K_LENGTH}, overflow: error}}
deepspeed: zero3
"""
# What is always on trains as in the other run. The blocks' rate is so small that adding an update to a weight gives
# that weight again, which the guard would stop.
EMBEDDINGS_ONLY = ["optimizer.lr=1e-30", "optimizer.lr_always_on=1e-3", "train.guard_every=0"]


def copy_short_rows(folder: Path) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        lines = (GSM8K / name).read_text(encoding="utf-8").splitlines()
        texts = [(line, json.loads(line)) for line in lines]
        short = [
            line
            for line, row in texts
            if len(f"Question: {row['question']}\nAnswer: {row['answer']}".encode()) < GSM8K_LENGTH
        ]
        (folder / name).write_text("\n".join(short), encoding="utf-8")


def blocks_of(model_folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Weights by block."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(model_folder / "model.safetensors").items():
        if match := re.match(r"model\.layers\.(\d+)\.", name):
            found.setdefault(int(match[1]), {})[name] = tensor
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"needs GSM8K in {GSM8K}")
def test_lisa_learns_more_of_gsm8k_than_embeddings_alone(tmp_path: Path) -> None:
    """The same weights, samples and steps on two ranks under ZeRO-3, once with blocks and once without."""
    copy_short_rows(tmp_path)
    (tmp_path / "gsm8k.yaml").write_text(GSM8K_RECIPE)
    for name, values in (("lisa", []), ("embeddings", EMBEDDINGS_ONLY)):
        finished = forked.start(["gsm8k.yaml", *values, f"output=runs/{name}"], tmp_path).wait(deadline=800)
        assert finished.code == 0, finished.everything
    lisa, embeddings = tmp_path / "runs" / "lisa", tmp_path / "runs" / "embeddings"
    assert metrics(lisa)[0] == metrics(embeddings)[0], "the same weights to start from"
    assert evaluations(lisa)[-1]["step"] == evaluations(embeddings)[-1]["step"] == 80
    assert evaluations(lisa)[-1]["eval_loss"] < evaluations(embeddings)[-1]["eval_loss"]
    assert evaluations(embeddings)[-1]["eval_loss"] < evaluations(lisa)[0]["eval_loss"]

    trained, untrained = blocks_of(lisa / "model"), blocks_of(embeddings / "model")
    drawn = {index for line in metrics(lisa) for index in line.get("active_blocks", [])}
    assert len(drawn) > 2
    for index, weights in trained.items():
        for name, tensor in weights.items():
            assert torch.equal(tensor, untrained[index][name]) == (index not in drawn), name
            assert "norm" not in name or bool((untrained[index][name] == 1).all()), "a weight moved at rate 1e-30"

    model = AutoModelForCausalLM.from_pretrained(lisa / "model").eval()
    prepared = tokenise(
        train=[TrainSource(path=str(tmp_path / "test.jsonl"))],
        eval=(),
        eval_fraction=0.0,
        tokenizer=bytes_tokenizer(),
        max_length=GSM8K_LENGTH,
        overflow="error",
        packing=False,
        cache=tmp_path / "cache-of-test",
        seed=0,
    )
    assert loss_by_hand(model, prepared.train) == pytest.approx(evaluations(lisa)[-1]["eval_loss"], abs=1e-4)
