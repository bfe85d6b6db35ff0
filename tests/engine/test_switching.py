"""What always holds while blocks switch: what is registered, what moves, what stays, what is refused."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import trainer
from tests import distributed
from tests.engine.parity import (
    ADAM,
    Cell,
    batch,
    build_model,
    deepspeed_config,
    full_weights,
    largest_difference,
    make_engine,
    make_selector,
    reference,
    strata,
    summed_loss,
    train_step,
)
from tests.models import tiny_llama
from trainer.blocks import Block
from trainer.selectors import Cyclic, Measurement, Selector, Uniform, keyed_generator
from trainer.updates import UpdateRule


def start(cell: Cell, **prepare: Any) -> tuple[Any, trainer.Sparse]:
    model = build_model(cell)
    options = {"selector": make_selector(cell), "bank": cell.bank, "always_on": cell.always_on} | prepare
    sparse = trainer.prepare(model, **options)
    engine = make_engine(cell, model, sparse)
    sparse.attach(engine, guard_every=1)
    return engine, sparse


# --- frozen is frozen, active moves ----------------------------------------------------------------------------


def _movement(rank: int, stages: tuple[int, ...]) -> list[str]:
    problems = []
    for stage in stages:
        cell = Cell(stage=stage, weight_decay=0.1, interval=3, steps=9, bank="cpu")
        engine, sparse = start(cell)
        for step in range(cell.steps):
            before = full_weights(engine)
            train_step(cell, engine, step, rank)
            after = full_weights(engine)
            for block in sparse.blocks:
                moved = [not torch.equal(before[n], after[n]) for n in block.parameters]
                wanted = block.index in sparse.active
                if any(moved) if not wanted else not all(moved):
                    problems.append(f"stage {stage} step {step}: block {block.index} active={wanted} moved={moved}")
            for parameters in sparse.always_on.values():
                if not all(not torch.equal(before[n], after[n]) for n in parameters):
                    problems.append(f"stage {stage} step {step}: {list(parameters)} did not move")
        if sparse.times_active != _draws(cell):
            problems.append(f"times active {sparse.times_active}")
        engine.destroy()
    return problems


def _draws(cell: Cell) -> list[int]:
    selector = make_selector(cell)
    times = [0] * 6
    for step in range(cell.steps):
        for index in selector.select(step // cell.interval, 6):
            times[index] += 1
    return times


def test_active_blocks_move_every_step_and_frozen_ones_not_by_a_bit() -> None:
    for problems in distributed.run(_movement, (0, 1, 2, 3), ranks=2):
        assert not problems


# --- memory and registration -----------------------------------------------------------------------------------


def _registration(rank: int, cells: tuple[Cell, ...]) -> list[str]:
    problems = []
    for cell in cells:
        stage = cell.stage
        engine, sparse = start(cell)
        live, identity = [], (id(engine.basic_optimizer), id(engine.optimizer))
        for step in range(cell.steps):
            train_step(cell, engine, step, rank)
            gc.collect()
            tensors = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in gc.get_objects()
                if issubclass(type(t), Tensor) and t.device.type == "cpu"
            }
            for piece in sparse.bank._stored.values():
                for t in piece.tensors.values():
                    tensors.pop(t.untyped_storage().data_ptr(), None)
            live.append(sum(tensors.values()))
            if sum(len(g["params"]) > 1 for g in engine.basic_optimizer.param_groups) and stage:
                problems.append("a group holds more than its flat tensor")
        if max(live[3:]) > 1.001 * live[3]:
            problems.append(f"stage {stage}: live bytes {live}")
        inactive = sum(b.numel for b in sparse.blocks if b.index not in sparse.active)
        if not 0 < sparse.bank.num_bytes <= 12 * inactive / (2 if stage else 1) + 64:
            problems.append(f"stage {stage}: bank {sparse.bank.num_bytes} bytes for {inactive} inactive parameters")
        if identity != (id(engine.basic_optimizer), id(engine.optimizer)):
            problems.append("the optimizer's identity changed")
        if len(engine.basic_optimizer.param_groups) != 2 * 2 + 3:
            problems.append(f"{len(engine.basic_optimizer.param_groups)} groups")
        engine.destroy()
    return problems


def test_memory_is_flat_and_groups_keep_number_and_identity() -> None:
    settings: tuple[dict[str, Any], ...] = (
        {"stage": 2},
        {"stage": 3},
        {"stage": 2, "offload": True},
        {"stage": 3, "offload": True, "extra": {"zero": {"offload_param": {"device": "cpu"}}}},
    )
    cells = tuple(Cell(interval=1, steps=16, bank="cpu", **changed) for changed in settings)
    for problems in distributed.run(_registration, cells, ranks=2):
        assert not problems


# --- engines that were built wide ------------------------------------------------------------------------------


def _wide(rank: int, stages: tuple[int, ...]) -> list[tuple[float, bool]]:
    import deepspeed

    results = []
    for stage in stages:
        cell = Cell(stage=stage, steps=8, weight_decay=0.1)
        model = build_model(cell)
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, **ADAM)
        engine, held, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(cell, micro_batch=2)
        )
        model.requires_grad_(True)
        sparse = trainer.prepare(model, selector=make_selector(cell))
        sparse.attach(engine)
        for step in range(cell.steps):
            train_step(cell, engine, step, rank)
        expected, _ = reference(cell)
        live = {id(p) for group in sparse._registered().registered() for p in group}
        wanted = {id(p) for p in sparse.trainable_parameters()}
        same_holder = held.__dict__ is engine.optimizer.__dict__ if stage else held is engine.optimizer
        results.append((largest_difference(full_weights(engine), expected), live == wanted and same_holder))
        engine.destroy()
    return results


def test_an_engine_built_with_everything_is_shrunk() -> None:
    for results in distributed.run(_wide, (0, 2, 3), ranks=2):
        for difference, narrow in results:
            assert difference <= 1e-6 and narrow


# --- schedulers ------------------------------------------------------------------------------------------------


def _one_cycle(rank: int) -> list[float]:
    import deepspeed

    cell = Cell(stage=3, interval=1, steps=8)
    model = build_model(cell)
    sparse = trainer.prepare(model, selector=make_selector(cell))
    optimizer = torch.optim.AdamW(sparse.param_groups(), **ADAM)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=20)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(cell, micro_batch=2))
    sparse.attach(engine)
    rates = []
    for step in range(cell.steps):
        train_step(cell, engine, step, rank)
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_a_scheduler_that_counts_groups_stays_valid() -> None:
    rates, _ = distributed.run(_one_cycle, ranks=2)
    plain = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], **ADAM)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(plain, max_lr=1e-2, total_steps=20)
    expected = []
    for _ in range(8):
        plain.step()
        scheduler.step()
        expected.append(plain.param_groups[0]["lr"])
    assert rates == pytest.approx(expected)


# --- skipped steps ---------------------------------------------------------------------------------------------


def _skipped(rank: int) -> tuple[list[tuple[int, ...]], list[bool], int]:
    cell = Cell(stage=2, dtype="bf16", interval=2)
    engine, sparse = start(cell)
    sets, applied = [], []
    for step in range(5):
        ids = batch(step, 0, ranks=2, rank=rank)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss * (float("inf") if step == 1 else 1.0))
        engine.step()
        applied.append(engine.was_step_applied())
        sets.append(sparse.active)
    return sets, applied, sparse.steps


def test_a_skipped_step_does_not_count_towards_the_interval() -> None:
    (sets, applied, steps), _ = distributed.run(_skipped, ranks=2)
    assert applied == [True, False, True, True, True] and steps == 4
    selector = make_selector(Cell(interval=2))
    first, second = selector.select(0, 6), selector.select(1, 6)
    assert sets == [first, first, first, second, second]


# --- blocks of different shapes --------------------------------------------------------------------------------


def _uneven_model() -> torch.nn.Module:
    """A Llama whose MLPs differ in width from block to block, and one of which has biases."""
    model = tiny_llama()
    torch.manual_seed(1)
    for index, layer in enumerate(model.model.layers):
        width = 32 + 16 * index
        layer.mlp.gate_proj = torch.nn.Linear(32, width, bias=False)
        layer.mlp.up_proj = torch.nn.Linear(32, width, bias=index == 2)
        layer.mlp.down_proj = torch.nn.Linear(width, 32, bias=False)
        for name, parameter in layer.mlp.named_parameters():  # as transformers does: torch's are eight times as large,
            if name.endswith("weight"):  # and with them what another order of summation leaves
                torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def _uneven(rank: int, cells: tuple[Cell, ...]) -> list[float]:
    import tests.engine.parity as parity

    parity.build_model = lambda cell: _uneven_model()
    differences = []
    for cell in cells:
        weights, _ = strata(rank, cell)
        differences.append(largest_difference(weights, reference(cell)[0]))
    return differences


@pytest.mark.slow
def test_blocks_of_different_shapes() -> None:
    cells = tuple(
        Cell(stage=stage, bank=bank, accumulation=2, offload=offload, interval=1, steps=8, weight_decay=0.1)
        for stage, bank, offload in (
            (1, "discard", False),
            (2, "cpu", False),
            (2, "cpu", True),
            (3, "cpu", False),
            (3, "cpu", True),
        )
    )
    for differences in distributed.run(_uneven, cells, ranks=2):
        assert max(differences) <= 1e-6, differences


# --- bf16 ------------------------------------------------------------------------------------------------------


def _bf16(rank: int, stages: tuple[int, ...]) -> list[tuple[bool, bool]]:
    """Tiny steps vanish in bf16 weights; with a bank the fp32 masters must remember them over a switch."""
    results = []
    for stage in stages:
        for bank in ("cpu", "discard"):
            cell = Cell(stage=stage, dtype="bf16", bank=bank, always_on=("norm",))
            # Ascending, because a block that is drawn twice in a row was not frozen in between.
            engine, sparse = start(cell, selector=Cyclic(blocks=1, interval=1, order="ascending"))
            for group in engine.basic_optimizer.param_groups:
                group["lr"] = 1e-7  # far below half a unit in the last place of a weight of 0.02
            numbers: dict[str, Tensor] = {}
            kept = []
            for step in range(13):  # two rounds over six blocks
                train_step(cell, engine, step, rank)
                for piece in sparse._registered().slices(0):
                    if piece.name in numbers:
                        weight = sparse._registered().local_shard(dict(engine.module.named_parameters())[piece.name])
                        part = weight[: piece.stop - piece.start] if stage == 3 else weight[piece.start : piece.stop]
                        drift = piece.tensors["master"] - part.float()
                        kept.append(bool((drift.abs() > 1.5e-7).any()))  # two steps' worth
                    numbers[piece.name] = piece.tensors["master"].clone()
            results.append((bank == "cpu", any(kept)))
            engine.destroy()
    return results


def test_with_a_bank_no_update_is_lost_at_a_switch_in_bf16() -> None:
    for results in distributed.run(_bf16, (1, 2, 3), ranks=2):
        for has_bank, remembered in results:
            assert remembered == has_bank


# --- a sparse update rule and a measuring selector: proof of the interfaces -------------------------------------


class TopGradientEntries(UpdateRule):
    """A toy: of each matrix on this rank, plain gradient descent on the k entries with the largest first gradient."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.chosen: dict[str, Tensor] = {}
        self.received: dict[str, Tensor] = {}

    def in_optimizer(self, block: Block) -> set[str]:
        return {name for name, p in block.parameters.items() if len(getattr(p, "ds_shape", p.shape)) == 1}

    def leave(self, name: str, *, keep: bool) -> None:
        self.chosen.pop(name, None)

    def receive(self, name: str, gradient: Tensor, weights: Tensor, *, last: bool) -> None:
        self.received[name] = self.received[name] + gradient if name in self.received else gradient.clone()

    def discard(self) -> None:
        self.received.clear()

    def step(self, name: str, weights: Tensor, *, lr: float) -> None:
        gradient = self.received.pop(name)
        if name not in self.chosen:
            self.chosen[name] = gradient.abs().topk(min(self.k, gradient.numel())).indices
        weights[self.chosen[name]] -= 10 * lr * gradient[self.chosen[name]]


def _sparse_rule(rank: int, stages: tuple[int, ...]) -> list[dict[str, Tensor]]:
    results = []
    for stage in stages:
        cell = Cell(stage=stage, steps=6, interval=2, accumulation=2)
        engine, sparse = start(cell, update=TopGradientEntries(k=5))
        before = full_weights(engine)
        counts = []
        for step in range(cell.steps):
            train_step(cell, engine, step, rank)
            after = full_weights(engine)
            counts.append(
                {
                    n: int((before[n] != after[n]).sum())
                    for b in sparse.blocks
                    for n in b.parameters
                    if b.index in sparse.active
                }
            )
            frozen = [n for b in sparse.blocks for n in b.parameters if b.index not in sparse.active]
            assert all(torch.equal(before[n], after[n]) for n in frozen)
            before = after
        for count in counts:
            assert all(n == 10 for name, n in count.items() if "proj" in name), count  # k on each of two ranks
            assert all(n == 32 for name, n in count.items() if "layernorm" in name), count
        results.append(before)
        engine.destroy()
    return results


def test_a_sparse_update_rule_moves_only_what_it_chose() -> None:
    results, others = distributed.run(_sparse_rule, (0, 2, 3), ranks=2)
    for a, b in zip(results, others, strict=True):
        assert largest_difference(a, b) == 0.0  # replicas agree
    assert largest_difference(results[0], results[1]) <= 1e-6
    assert largest_difference(results[0], results[2]) <= 1e-6


class WorstToLose(Selector):
    """A toy: measures the loss without each block, and trains those that are missed most."""

    def __init__(self, *, interval: int, seed: int) -> None:
        super().__init__(interval=interval, seed=seed)
        self.losses: tuple[float, ...] = ()

    def num_active(self, num_blocks: int) -> int:
        return 2

    def select(self, interval: int, num_blocks: int) -> tuple[int, ...]:
        if not self.losses:
            return tuple(sorted(int(i) for i in keyed_generator(self.seed, interval).permutation(num_blocks)[:2]))
        ranked = sorted(range(num_blocks), key=lambda i: self.losses[i], reverse=True)
        return tuple(sorted(ranked[:2]))

    def needs(self, step: int) -> Measurement | None:
        return Measurement("ablated_loss", tuple((i,) for i in range(6))) if step % 4 == 0 else None

    def observe(self, measurement: Measurement, result: tuple[float, ...]) -> None:
        self.losses = result


def _probe(rank: int, stages: tuple[int, ...]) -> list[Any]:
    results = []
    for stage in stages:
        outcomes = []
        for measuring in (True, False):
            cell = Cell(stage=stage, interval=100, steps=4, checkpointing=False)
            model = build_model(cell)
            selector = WorstToLose(interval=cell.interval, seed=3)
            if not measuring:
                selector.needs = lambda step: None  # type: ignore[method-assign]
            sparse = trainer.prepare(model, selector=selector)
            engine = make_engine(cell, model, sparse)
            ids = batch(99, 0, ranks=2, rank=rank)
            keep = 2 - rank  # ragged: ranks weigh by their tokens

            sparse.attach(engine, probe_batches=iter(lambda chosen=ids[:keep]: chosen, None), loss_function=summed_loss)
            torch.manual_seed(5)
            for step in range(cell.steps):
                train_step(cell, engine, step, rank)
            outcomes.append((full_weights(engine), torch.rand(1).item(), selector.losses))
            engine.destroy()
        (weights, noise, losses), (plain, plain_noise, _) = outcomes
        same = all(torch.equal(weights[n], plain[n]) for n in weights) and noise == plain_noise
        results.append((losses, same))
    return results


def _ablated_by_hand() -> list[float]:
    model = tiny_llama().eval()
    rows = torch.cat([batch(99, 0, ranks=2, rank=0)[:2], batch(99, 0, ranks=2, rank=1)[:1]])
    losses = []
    for left_out in range(6):
        layers = torch.nn.ModuleList(layer for i, layer in enumerate(model.model.layers) if i != left_out)
        whole, model.model.layers = model.model.layers, layers
        model.config.num_hidden_layers = 5
        with torch.no_grad():
            logits = model(input_ids=rows).logits
        model.model.layers = whole
        model.config.num_hidden_layers = 6
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item())
    return losses


def test_a_measuring_selector_sees_right_losses_and_leaves_no_trace() -> None:
    results, others = distributed.run(_probe, (2, 3), ranks=2)
    expected = _ablated_by_hand()
    for (losses, same), (other_losses, _) in zip(results, others, strict=True):
        assert losses == other_losses
        assert losses == pytest.approx(expected, abs=1e-5)
        assert same


# --- who calls what ---------------------------------------------------------------------------------------------


def _callers(rank: int) -> tuple[list[tuple[int, ...]], tuple[int, ...], list[str]]:
    cell = Cell(stage=2, interval=2)
    engine, sparse = start(cell, selector=Cyclic(blocks=1, interval=2, order="ascending"))
    sets, refused = [], []

    def train(forward: Any) -> None:
        engine.backward(forward(input_ids=ids, labels=ids).loss)
        engine.step()

    for step in range(4):
        ids = batch(step, 0, ranks=cell.ranks, rank=rank)
        train(engine.forward)
        sets.append(sparse.active)
    engine.eval()
    engine(input_ids=ids)  # with gradients, at the border of an interval
    evaluated = sparse.active
    for forward in (engine, engine.module):  # in evaluation mode, and past the engine
        with pytest.raises(RuntimeError, match="no switch has happened") as error:
            train(forward)
        refused.append(str(error.value))
        engine.train()
    return sets, evaluated, refused


def test_switches_follow_the_engine_s_forward_in_training_mode_and_nothing_else() -> None:
    (sets, evaluated, refused), _ = distributed.run(_callers, ranks=2)
    assert sets == [(0,), (0,), (1,), (1,)]
    assert evaluated == (1,)
    assert all("step 4 begins interval 2" in text and "engine.train()" in text for text in refused)


class LateMeasurer(WorstToLose):
    def needs(self, step: int) -> Measurement | None:
        return super().needs(step) if step else None


def _late(rank: int) -> None:
    cell = Cell(stage=2, interval=2)
    engine, _ = start(cell, selector=LateMeasurer(interval=2, seed=0))
    for step in range(4):
        train_step(cell, engine, step, rank)
    with pytest.raises(ValueError, match="LateMeasurer measures"):
        train_step(cell, engine, 4, rank)


def test_a_selector_that_measures_later_is_not_left_without_answers() -> None:
    distributed.run(_late, ranks=1)


# --- the guard -------------------------------------------------------------------------------------------------


def _guarded(rank: int, kind: str) -> str:
    from trainer.engine.guard import GuardError

    cell = Cell(stage=3 if kind == "unfrozen" else 2, interval=2)
    model = build_model(cell)
    seed = 7 + (rank if kind == "ranks" else 0)
    sparse = trainer.prepare(model, selector=Uniform(blocks=2, interval=2, seed=7))
    engine = make_engine(cell, model, sparse)
    sparse.attach(engine, guard_every=1)
    sparse.selector.seed = seed
    try:
        for step in range(6):
            train_step(cell, engine, step, rank)
            frozen = next(b for b in sparse.blocks if b.index not in sparse.active)
            if kind == "moved" and rank == 1 and step == 2:
                next(p for n, p in frozen.parameters.items() if "gate" in n).data.add_(1.0)
            if kind == "still" and step == 1:
                engine.basic_optimizer.step = lambda *args, **kwargs: None
            if kind == "unfrozen" and step == 3:
                sparse.blocks[sparse.active[0]].module.requires_grad_(False)
                sparse.selector.seed, sparse.selector.select = 7, lambda interval, n, same=sparse.active: same
    except GuardError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("ranks", ["rank 0: interval 1, active blocks", "rank 1: interval 1, active blocks"]),
        ("moved", ["rank 1", "is frozen but its weights moved"]),
        ("still", ["were active but none of their sampled masters moved"]),
        ("unfrozen", ["does not require gradients"]),
    ],
)
def test_the_guard_stops_all_ranks_at_once(kind: str, words: list[str]) -> None:
    answers = distributed.run(_guarded, kind, ranks=2, deadline=60)
    for answer in answers:
        for word in words:
            assert word in answer
    assert answers[0] == answers[1]
