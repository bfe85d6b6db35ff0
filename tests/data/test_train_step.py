"""trainer/train.py's step and evaluation on packed rows and on whole samples, with a plain model for an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.data.conftest import prepared
from tests.models import tiny_llama
from trainer import train
from trainer.config.schema import DataSource
from trainer.data import Batches, Prepared


class PlainEngine:
    """What the loop calls of a DeepSpeedEngine, on one rank and without an optimizer."""

    device, world_size = torch.device("cpu"), 1

    def __init__(self) -> None:
        self.model = tiny_llama(vocab=300)
        self.model.set_attn_implementation("sdpa")
        self.train = self.eval = self.step = lambda: None

    def __call__(self, **inputs: torch.Tensor):
        return self.model(**inputs)

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> None:
        loss.backward()

    def zero_optimization_stage(self) -> int:
        return 3

    def was_step_applied(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        train, "dist", SimpleNamespace(all_reduce=lambda tensor: None, get_rank=lambda: 0, get_world_size=lambda: 1)
    )


def step_and_evaluation(data: Prepared, *, micro_batch_size: int, flat: bool = False):
    engine = PlainEngine()
    feed = train._Feed(data, pad_id=256, flat=flat)
    size = len(data.train)
    batches = Batches(
        data.sizes, seed=0, global_batch_size=size, micro_batch_size=micro_batch_size, rank=0, ranks=1,
        fingerprint=data.fingerprint, weights=data.weights,
    )  # fmt: skip
    result = train.train_step(engine, feed.micro_batches(batches.indices(0)))
    gradients = torch.cat([parameter.grad.flatten() for parameter in engine.model.parameters()])
    config = SimpleNamespace(
        eval=SimpleNamespace(micro_batch_size=2, max_samples=None), train=SimpleNamespace(micro_batch_size=1)
    )
    return result, gradients, train.evaluate(engine, feed, config)


def test_packing_changes_neither_loss_nor_gradients_nor_counts(write, tmp_path, tokenizer) -> None:
    path = write(*[{"prompt": "p" * n, "completion": "abcdefgh"[: 1 + n % 8]} for n in range(1, 13)])
    options = {"max_length": 32, "eval": [DataSource(path=str(path))]}
    whole = prepared(tmp_path, tokenizer, path, **options)
    packed = prepared(tmp_path, tokenizer, path, packing=True, **options)
    assert len(packed.train) < len(whole.train)
    expected, gradients, evaluation = step_and_evaluation(whole, micro_batch_size=4)
    for flat in (False, True):
        found, packed_gradients, packed_evaluation = step_and_evaluation(
            packed, micro_batch_size=len(packed.train), flat=flat
        )
        assert float(found.loss_sum) == pytest.approx(float(expected.loss_sum), rel=1e-5)
        assert int(found.targets) == int(expected.targets) == whole.train_report.target_tokens
        assert int(found.tokens) == int(expected.tokens) == whole.train_report.tokens
        torch.testing.assert_close(packed_gradients, gradients, rtol=1e-4, atol=1e-6)
        assert packed_evaluation == pytest.approx(evaluation, rel=1e-5)
