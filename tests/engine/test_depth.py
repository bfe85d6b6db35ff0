"""Backward goes no deeper than what trains, and ZeRO-3 prefetches what that takes right after a switch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import trainer
from tests import distributed
from tests.engine.parity import Cell, batch, build_model, make_engine, make_selector, train_step
from trainer.engine.fetch_order import FetchOrder
from trainer.model.blocks import Block
from trainer.selectors import Selector


class Listed(Selector):
    """One block at a time, as listed."""

    def __init__(self, *blocks: int) -> None:
        super().__init__(interval=2, seed=0)
        self.blocks = blocks

    def num_active(self, num_blocks: int) -> int:
        return 1

    def select(self, interval: int, num_blocks: int) -> tuple[int, ...]:
        return (self.blocks[interval % len(self.blocks)],)


# --- the order itself --------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.add_module(kind, nn.Linear(1, 1))


def blocks_of(kinds: str) -> list[Block]:
    return [Block(i, f"blocks.{i}", Layer(kind), {}) for i, kind in enumerate(kinds)]


def step_order(blocks: list[Block], head: nn.Module, lowest: int) -> list[nn.Module]:
    """Return forward through all, backward down to `lowest`, where the block itself is not reached any more."""
    children = [next(block.module.children()) for block in blocks]
    order: list[nn.Module] = [m for block, child in zip(blocks, children, strict=True) for m in (block.module, child)]
    order += [head, head]
    for index in reversed(range(lowest, len(blocks))):
        order += [children[index]] if index == lowest else [blocks[index].module, children[index]]
    return order


def test_deeper_and_shallower_orders_follow_from_one_that_was_recorded() -> None:
    blocks, head = blocks_of("aaaaaa"), nn.Linear(1, 1)
    known = FetchOrder(blocks)
    for before, after in ((3, 1), (1, 4), (4, 0), (0, 5)):
        assert known.after_switch(step_order(blocks, head, before), lowest=after) == step_order(blocks, head, after)
    assert known.after_switch(step_order(blocks, head, 2), lowest=2) is None, "it stands already"


def test_blocks_of_another_kind_are_not_guessed() -> None:
    blocks, head = blocks_of("baba"), nn.Linear(1, 1)
    known = FetchOrder(blocks)
    assert known.after_switch(step_order(blocks, head, 3), lowest=1) is None, "b was never seen in backward"
    assert known.after_switch(step_order(blocks, head, 0), lowest=2) is not None


def test_what_is_no_whole_step_is_not_followed() -> None:
    blocks, head = blocks_of("aaaa"), nn.Linear(1, 1)
    known = FetchOrder(blocks)
    whole = step_order(blocks, head, 1)
    assert known.after_switch([], lowest=2) is None
    assert known.after_switch(whole[:9], lowest=2) is None, "forward alone, as in an evaluation"
    assert known.after_switch([*whole, head], lowest=2) is None, "something below the blocks trains"
    assert known.after_switch([*whole[:10], *whole[12:], *whole[10:12]], lowest=2) is None, "out of order"


# --- under ZeRO-3 ------------------------------------------------------------------------------------------------


def _start(cell: Cell, selector: Selector) -> tuple[Any, trainer.Sparse]:
    model = build_model(cell)
    adapters: dict[str, Any] = {"substrate": "adapter"} if cell.lora else {"always_on": cell.always_on}
    sparse = trainer.prepare(model, selector=selector, bank=cell.bank, **adapters)
    engine = make_engine(cell, model, sparse)
    sparse.attach(engine, guard_every=1)
    return engine, sparse


def _traces(rank: int) -> list[str]:
    """Return the steps from the third on after which ZeRO-3's recording was not whole: a module was out of order."""
    problems = []
    orders = {"ascending": (0, 1, 2, 3), "descending": (3, 2, 1, 0), "random": (2, 3, 0, 1), "top": (3, 0, 3, 1)}
    for number, (name, listed) in enumerate(orders.items()):
        for checkpointing in (False, True):
            cell = Cell(checkpointing=checkpointing, always_on=((), ("head", "norm"))[(number + checkpointing) % 2])
            engine, _ = _start(cell, Listed(*listed))
            coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
            for step in range(9):
                train_step(cell, engine, step, rank)
                if step >= 2 and not coordinator.is_complete_trace():
                    problems.append(f"{name}, {cell}: step {step}")
            engine.destroy()
    return problems


def test_no_switch_costs_zero3_its_recording() -> None:
    for problems in distributed.run(_traces, ranks=2, deadline=240):
        assert not problems, problems


def _kept(rank: int) -> list[list[int]]:
    """Return the blocks that are gathered between forward and backward, with the lowest block at 0 and then at 2."""
    # Reuse at any distance: what backward needs again stays gathered after forward.
    cell = Cell(always_on=(), extra={"zero": {"stage3_max_reuse_distance": 10**9, "stage3_max_live_parameters": 10**9}})
    engine, sparse = _start(cell, Listed(0, 2))
    kept = []
    for step in range(4):
        ids = batch(step, 0, ranks=cell.ranks, rank=rank)
        loss = engine(input_ids=ids, labels=ids).loss
        kept.append([b.index for b in sparse.blocks if any(p.numel() and p.dim() > 1 for p in b.parameters.values())])
        engine.backward(loss)
        engine.step()
    return kept


def test_what_backward_does_not_reach_is_released_after_forward() -> None:
    for kept in distributed.run(_kept, ranks=2):
        assert kept[1] == [0, 1, 2, 3]
        assert kept[2] == kept[3] == [2, 3]


# --- no work below what trains -----------------------------------------------------------------------------------


def _reached(rank: int, cells: tuple[Cell, ...]) -> list[str]:
    return [problem for cell in cells for problem in _reached_in(cell, rank)]


def _reached_in(cell: Cell, rank: int) -> list[str]:
    problems = []
    engine, sparse = _start(cell, make_selector(cell))
    forwards = [0] * len(sparse.blocks)

    def count(index: int, output: torch.Tensor) -> None:
        forwards[index] += 1
        lowest = sparse.active[0]  # whose first module has a graph if its weights train, and not with adapters
        if index != lowest and output.requires_grad != (index > lowest):
            problems.append(f"{cell}: graph in block {index} {output.requires_grad}, active {sparse.active}")

    for block in sparse.blocks:  # recomputation stops before a block's last module
        block.module.input_layernorm.register_forward_hook(lambda module, args, output, i=block.index: count(i, output))
    for step in range(8):
        forwards[:] = [0] * len(forwards)
        train_step(cell, engine, step, rank)
        wanted = [1 + (cell.checkpointing and i >= sparse.active[0]) for i in range(len(forwards))]
        if forwards != wanted:
            problems.append(f"{cell} step {step}: forwards {forwards}, active {sparse.active}")
    engine.destroy()
    return problems


def test_nothing_below_the_lowest_active_block_has_a_graph_or_is_recomputed() -> None:
    cells = tuple(
        Cell(stage=stage, checkpointing=checkpointing, always_on=("head",))
        for stage in (0, 1, 2, 3)
        for checkpointing in (False, True)
    ) + (Cell(lora=4, checkpointing=True), Cell(lora=4, checkpointing=True, stage=2))
    for problems in distributed.run(_reached, cells, ranks=2, deadline=240):
        assert not problems, problems
