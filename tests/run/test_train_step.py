"""The loop's step and evaluation on a real engine: packed rows, fused losses and experts' routers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor

import trainer
from tests import distributed
from tests.comparing import largest
from tests.data.conftest import tokenised
from tests.engine.parity import Cell, deepspeed_config, full_weights, largest_difference
from tests.models import tiny_llama, tiny_model
from trainer.config import load
from trainer.config.schema import DataSource
from trainer.data.batches import SampleOrder, collate
from trainer.data.cache import TokenisedData
from trainer.data.rank_batches import RankBatches
from trainer.data.tokenizer import bytes_tokenizer
from trainer.model.loss import LossError, Objective, check_fused, summed_loss
from trainer.run.model_checks import check_model, try_fused
from trainer.run.step import evaluate, train_step
from trainer.selectors import All, Importance

CONFIG: Any = SimpleNamespace(
    eval=SimpleNamespace(micro_batch_size=2, max_samples=None), train=SimpleNamespace(micro_batch_size=1)
)


def start(model: Any, *, stage: int, ranks: int, micro_batch: int, fused: bool = False) -> tuple[Any, Objective]:
    cell = Cell(stage=stage, ranks=ranks)
    ds = deepspeed_config(cell, micro_batch=micro_batch)
    sparse = trainer.prepare(model.train(), selector=All())
    objective = Objective(model, fused=fused, deepspeed=ds)
    optimizer = torch.optim.AdamW(sparse.param_groups(), lr=3e-3, eps=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds)
    sparse.attach(engine)
    return engine, objective


# --- packing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Of one step and an evaluation after it."""

    loss: float
    targets: int
    tokens: int
    evaluation: float
    weights: dict[str, Tensor]


def step_and_evaluation(data: TokenisedData, *, flat: bool = False) -> Outcome:
    model = tiny_llama(vocab=300)
    model.set_attn_implementation("sdpa")
    size = len(data.train)
    engine, objective = start(model, stage=2, ranks=1, micro_batch=size)
    feed = RankBatches(CONFIG, data, pad_id=256, flat=flat)
    batches = SampleOrder(
        data.sizes, seed=0, global_batch_size=size, micro_batch_size=size, rank=0, ranks=1,
        fingerprint=data.fingerprint, weights=data.weights,
    )  # fmt: skip
    result = train_step(engine, objective, feed.micro_batches(batches.indices(0)))
    evaluation = evaluate(engine, objective, feed.eval_batches())
    return Outcome(float(result.loss_sum), int(result.targets), int(result.tokens), evaluation, full_weights(engine))


def _packing(rank: int, folder: Path) -> None:
    rows = [{"prompt": "p" * n, "completion": "abcdefgh"[: 1 + n % 8]} for n in range(1, 13)]
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"max_length": 32, "eval": [DataSource(path=str(path))]}
    whole = tokenised(folder, bytes_tokenizer(), path, **options)
    packed = tokenised(folder, bytes_tokenizer(), path, packing=True, **options)
    assert len(packed.train) < len(whole.train)
    expected = step_and_evaluation(whole)
    assert expected.targets == whole.train_report.target_tokens
    assert expected.tokens == whole.train_report.tokens
    for flat in (False, True):
        found = step_and_evaluation(packed, flat=flat)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert (found.targets, found.tokens) == (expected.targets, expected.tokens)
        assert found.evaluation == pytest.approx(expected.evaluation, rel=1e-5)
        assert largest_difference(found.weights, expected.weights) <= 1e-6


def test_packing_changes_neither_loss_nor_weights_nor_counts(tmp_path: Path) -> None:
    distributed.run(_packing, tmp_path, ranks=1)


def alone(model: Any) -> Any:
    """The model where an engine is asked for: of one, the objective needs no more than the module inside."""
    object.__setattr__(model, "module", model)
    return model


# --- fused head and loss -----------------------------------------------------------------------------------------


def ragged_batches(rank: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    batches = []
    for lengths in ((9, 16), (12, 5)):
        samples = []
        for length in lengths:
            ids = torch.randint(64, (length,), generator=generator).tolist()
            samples.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
        batches.append(collate(samples, pad_id=0))
    return batches


def _fused(rank: int, points: tuple[tuple[int, str], ...]) -> dict[str, tuple[float, float]]:
    """Differences of loss and of weights after two steps of accumulation two, by stage and family."""
    found = {}
    for stage, family in points:
        outcomes = []
        for fused in (False, True):
            model = tiny_llama(tied=True) if family == "tied" else tiny_model(family)
            ds = deepspeed_config(Cell(stage=stage, accumulation=2), micro_batch=2)
            sparse = trainer.prepare(model.train(), selector=All())
            objective = Objective(model, fused=fused, deepspeed=ds)
            optimizer = torch.optim.AdamW(sparse.param_groups(), lr=3e-3, eps=1e-3)
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds)
            sparse.attach(engine)
            config = load(None, [*RUN, "train.fused_loss=true"], check_files=False)
            check_model(config, engine, sparse, objective)
            losses = [float(train_step(engine, objective, ragged_batches(rank + 2 * s)).loss_sum) for s in (0, 1)]
            outcomes.append((losses, full_weights(engine)))
            engine.destroy()
            del objective  # transformers creates models partitioned for as long as it knows of ZeRO-3
        (plain, expected), (tiled, weights) = outcomes
        relative = largest(abs(a / b - 1) for a, b in zip(tiled, plain, strict=True))
        found[f"stage {stage}, {family}"] = relative, largest_difference(weights, expected)
    return found


RUN = ["model.random={model_type: llama}", "train.steps=2", "train.global_batch_size=4", "data.train=none.jsonl"]
POINTS = ((2, "gemma2"), (2, "tied"), (3, "llama"), (3, "tied"), (3, "mixtral"))


@pytest.mark.slow
def test_the_fused_loss_equals_the_plain_one_and_trains_the_same() -> None:
    """gemma2 caps its logits, mixtral has a router's loss besides."""
    for found in distributed.run(_fused, POINTS, ranks=2):
        for name, (loss, weights) in found.items():
            assert loss <= 1e-5 and weights <= 1e-5, (name, loss, weights)


def test_the_fused_loss_holds_no_more_logits_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 8)
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 50)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            made = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
            self.numel = max([self.numel, *(t.numel() for t in made if t.dim() and t.shape[0] != vocabulary)])
            return result

    vocabulary, tokens = 4000, 32
    sizes = {}
    for fused in (False, True):
        model = tiny_llama(layers=1, vocab=vocabulary, hidden=8).train()
        objective = Objective(model, fused=fused)
        ids = torch.randint(vocabulary, (2, tokens // 2))
        with Largest() as largest:
            objective(alone(model), {"input_ids": ids, "labels": ids})[0].backward()
        sizes[fused] = largest.numel
    assert sizes[False] >= tokens * vocabulary
    assert sizes[True] <= 2 * 4 * 16 * 16, "attention scores are the largest then; a tile has 8 x 50"


# --- experts -----------------------------------------------------------------------------------------------------


def _router(rank: int) -> tuple[float, float, float, bool]:
    """The router's share of the gradient norm: HF's own loss, ours, ours without it; none in evaluation."""
    norms = []
    ids = ragged_batches(0)[0]["input_ids"]
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    model = tiny_model("mixtral").train()
    loss = model(**batch).loss
    loss.backward()
    own = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
    for router_loss in (True, False):
        model = tiny_model("mixtral")
        objective = Objective(model, router_loss=router_loss)
        engine, _ = start(model, stage=2, ranks=1, micro_batch=2)
        train_step(engine, objective, [batch])
        norms.append(float(engine.get_global_grad_norm()))
        engine.eval()
        silent = objective(engine, batch)[1] is None
    return float(own), norms[0], norms[1], silent


def test_the_router_is_trained_as_transformers_does() -> None:
    ((own, ours, without, silent),) = distributed.run(_router, ranks=1)
    assert ours == pytest.approx(own, rel=1e-4)
    assert abs(without - own) > 1e-3 * own
    assert silent


def test_a_head_that_the_fused_loss_does_not_know_is_refused() -> None:
    distributed.run(_unknown_head, ranks=1)


def _unknown_head(rank: int) -> None:
    model = tiny_llama()
    engine, objective = start(model, stage=2, ranks=1, micro_batch=2, fused=True)
    check_fused(engine, objective)
    model.lm_head.register_forward_hook(lambda module, args, output: 100 * output)
    with pytest.raises(LossError, match="LlamaForCausalLM changes its logits"):
        check_fused(engine, objective)
    assert engine.module.training
    choice = try_fused(SimpleNamespace(train=SimpleNamespace(fused_loss="auto")), engine, objective)
    assert not objective.fused and choice is not None, "where it was not asked for, the plain loss serves"
    assert str(choice).startswith("loss: plain (train.fused_loss: auto, but it was tried and does not fit: ")
    ids = torch.arange(8)[None]
    assert summed_loss(engine(input_ids=ids).logits, ids).isfinite()


def _fused_as_plain(rank: int, family: str) -> tuple[list[float], list[float]]:
    """The norm of the first step's gradient, and the weights' sum after it, of the plain and of the fused loss."""
    ids = ragged_batches(0)[0]["input_ids"]
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    found: tuple[list[float], list[float]] = ([], [])
    for fused, values in zip((False, True), found, strict=True):
        model = tiny_model(family, router_aux_loss_coef=0.1)
        engine, objective = start(model, stage=2, ranks=1, micro_batch=2, fused=fused)
        if fused:
            check_fused(engine, objective)
        engine.train()
        train_step(engine, objective, [batch])
        values += [float(engine.get_global_grad_norm()), float(sum(p.double().sum() for p in model.parameters()))]
    return found


@pytest.mark.parametrize("family", ["llama4_text", "phimoe", "granitemoehybrid", "granitemoe", "cohere", "gemma2"])
def test_the_fused_loss_is_the_models_own(family: str) -> None:
    """Whatever it calls its backbone and its experts, its logits scaled and capped, with its router's loss or none."""
    ((plain, fused),) = distributed.run(_fused_as_plain, family, ranks=1)
    assert fused == pytest.approx(plain, rel=1e-4)


# --- probes ------------------------------------------------------------------------------------------------------


def _probed(rank: int, where: str, weights: tuple[float, ...] | None) -> list[list[int]]:
    """The first tokens of this rank's sequences in each probe; those of part p begin with 100 p + their number."""
    parts = [[{"input_ids": [100 * part + i, 1], "labels": [-100, 1]} for i in range(50)] for part in range(2)]
    data: Any = SimpleNamespace(
        train=parts[0] + parts[1],
        sizes=[50, 50],
        weights=weights,
        eval=parts[1][:10],
        streams=None,
        has_images=False,
    )
    config: Any = SimpleNamespace(
        eval=CONFIG.eval,
        seed=3,
        selector=Importance(probe={"data": where, "batch_size": 5}),
    )
    feed = RankBatches(config, data, pad_id=0, flat=False)
    batches = feed.probe_batches()
    drawn = []
    for number in range(20):
        probe = next(batches)
        if number == 13:
            _check_resumed_probes(feed, probe)
        targets = [
            batch["input_ids"][i, 0].item()
            for batch in probe
            for i in range(len(batch["labels"]))
            if batch["labels"][i, 1] >= 0
        ]
        drawn.append(targets)
    return drawn


def _check_resumed_probes(feed: RankBatches, fourteenth: list[dict[str, torch.Tensor]]) -> None:
    """The same batches, without one of those before: a run may have had thousands."""
    made = []
    collated, feed._collate = feed._collate, lambda samples: made.append(samples) or collated(samples)
    resumed = feed.probe_batches()
    resumed.go_to(13)
    assert not made
    for mine, its in zip(next(resumed), fourteenth, strict=True):
        assert all(torch.equal(mine[name], its[name]) for name in its)
    feed._collate = collated


def test_probe_batches_follow_the_mix_and_reach_every_rank() -> None:
    ranks = distributed.run(_probed, "train", (9.0, 1.0), ranks=2)
    whole = [sorted(first + second) for first, second in zip(*ranks, strict=True)]
    assert all(len(set(probe)) == 5 for probe in whole)
    assert all(len(probe) in (2, 3) for rank in ranks for probe in rank), "not three for one rank and two empty batches"
    second_part = sum(token >= 100 for probe in whole for token in probe)
    assert second_part == 10, "a tenth of 100"


def test_probe_batches_of_held_out_data() -> None:
    (probes,) = distributed.run(_probed, "eval", (9.0, 1.0), ranks=1)
    assert sorted(token for probe in probes[:2] for token in probe) == list(range(100, 110)), "one pass after another"
