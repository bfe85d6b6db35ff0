"""ID3 through the engine: its parts, masks and weights against the dense one, memory, and skipped steps."""

from __future__ import annotations

from typing import Any
from unittest import mock

import deepspeed.comm
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trainer
from tests import distributed
from tests.engine.dense_id3 import Case, Reference, attach, cases, compared, masks_of, scalar_updates, start
from tests.engine.parity import (
    Cell,
    batch,
    build_model,
    full_weights,
    largest_difference,
    make_engine,
    make_selector,
    train_step,
)
from trainer.accounting import measured_state, model_state
from trainer.engine import local_gradients
from trainer.updates import Unmask, candidates, unmask
from trainer.updates.candidates import best, best_of_all
from trainer.updates.unmask import d3_scores, target

# --- the parts -------------------------------------------------------------------------------------------------


def test_equal_increments_reach_the_budget_to_the_unit() -> None:
    for budget, steps in ((10, 3), (3, 10), (7, 7), (1, 1), (100, 1)):
        totals = [target(step, budget=budget, steps=steps) for step in range(steps + 3)]
        increments = [after - before for before, after in zip(totals, totals[1:], strict=False)]
        assert totals[0] == 0 and totals[steps:] == [budget] * 3
        assert max(increments[:steps]) - min(increments[:steps]) <= 1 and increments == sorted(increments, reverse=True)
    assert scalar_updates(budget=100, steps=10, total_steps=10) == 100 * 11 // 2
    assert scalar_updates(budget=100, steps=10, total_steps=15) == 100 * 11 // 2 + 5 * 100
    assert scalar_updates(budget=3, steps=10, total_steps=10) == 1 + 2 + 8 * 3


def test_scores_by_hand() -> None:
    gradient, weights = torch.tensor([-2.0, 0.0, 3.0, 0.0]), torch.tensor([0.5, 1.0, -1.0, 0.0])
    assert torch.equal(d3_scores(gradient, weights, exp=0, eps=0.5), torch.tensor([2.0, 0.0, 3.0, 0.0]))
    assert torch.equal(d3_scores(gradient, weights, exp=2, eps=0.5), torch.tensor([2.0, 0.0, 3 / 2.25, 0.0]))
    assert d3_scores(gradient, weights, exp=1, eps=0)[3] == torch.inf


def test_best_is_topk_and_ties_go_to_the_first() -> None:
    generator = torch.Generator().manual_seed(0)
    for size, values in ((50, 4), (1000, 7), (1000, 10**6)):
        scores = torch.randint(values, (size,), generator=generator).float()  # many ties, and zeros
        ranked = scores.sort(descending=True, stable=True).indices
        for k in (0, 1, 2, 17, size - 1, size, size + 5):
            assert torch.equal(best(scores, k), ranked[:k].sort().values)
            assert torch.equal(scores[best(scores, k)].sort().values, scores.topk(min(k, size)).values.sort().values)


def test_settings_that_make_no_sense() -> None:
    for changed, message in (
        ({"budget": 0}, "update.budget: got 0; allowed: 1 or more"),
        ({"exp": -1.0}, "update.exp: got -1.0; allowed: 0 or more"),
        ({"eps": -1e-3}, "update.eps: got -0.001; allowed: 0 or more, finite"),
        ({"exp": float("inf")}, "update.exp: got inf; allowed: 0 or more, finite"),
        ({"growth_steps": 0}, "update.growth_steps: got 0"),
        ({"bias_correction": "none"}, "update.bias_correction: got none; allowed: global, local"),
    ):
        with pytest.raises(ValueError, match=message):
            Unmask(**changed)
    model = build_model(Cell())
    weights = sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match=f"update.budget: got {weights + 1}, but only {weights} weights may train"):
        trainer.prepare(model, selector=make_selector(Cell(selector="all")), update=Unmask(budget=weights + 1))
    model = build_model(Cell())
    reached = sum(p.numel() for index in (0, 2) for p in model.model.layers[index].parameters())
    fixed = make_selector(Cell(selector="fixed", blocks=(0, 2)))
    with pytest.raises(ValueError, match=f"only {reached} weights may train"):
        trainer.prepare(model, selector=fixed, update=Unmask(budget=reached + 1), always_on=())
    trainer.prepare(model, selector=fixed, update=Unmask(budget=reached), always_on=())


class Counting:
    """deepspeed.comm, counting the bytes that a rank sends."""

    def __init__(self) -> None:
        self.sent = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(deepspeed.comm, name)

    def all_gather_into_tensor(self, whole: Tensor, mine: Tensor) -> None:
        self.sent += mine.numel() * mine.element_size()
        deepspeed.comm.all_gather_into_tensor(whole, mine)


def _top_k(rank: int, ranks: int) -> list[str]:
    """Compare with torch.topk on all scores, for unequal numbers of scores on each rank, some fewer than k."""
    problems = []
    generator = torch.Generator().manual_seed(3)
    for values in (3, 5, 10**6):
        whole = torch.randint(values, (97,), generator=generator).float()
        owner = torch.randint(ranks, (97,), generator=generator)
        owner[:40] = 0
        largest = int(owner.bincount().max())  # of any rank's candidates
        for k in (1, 5, 30, 97, 120):
            positions = (owner == rank).nonzero().view(-1)
            mine = positions[best(whole[positions], k)]
            counting = Counting()
            with mock.patch.object(candidates, "dist", counting):
                scores, chosen = best_of_all(whole[mine], mine, k)
            if counting.sent != 12 * min(k, largest):
                problems.append(f"k {k}: {counting.sent} bytes sent")
            wanted = whole.sort(descending=True, stable=True).indices[:k].sort().values
            if not torch.equal(chosen, wanted) or not torch.equal(scores, whole[wanted]):
                problems.append(f"{values} values, k {k}: {chosen.tolist()}, wanted {wanted.tolist()}")
            if not torch.equal(scores.sort().values, whole.topk(min(k, 97)).values.sort().values):
                problems.append(f"{values} values, k {k}: not torch.topk")
    return problems


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator returns."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_tensor_as_large_as_a_gradient_is_made_to_see_whether_it_is_finite() -> None:
    values = torch.randn(1000)
    with Largest() as largest:
        found = local_gradients._largest(values)
    assert found == values.abs().max() and largest.numel == 1
    for bad in (float("inf"), -float("inf"), float("nan")):
        values[7] = bad
        assert not local_gradients._largest(values).isfinite()
    assert local_gradients._largest(values[:0]) == 0


def _ties(rank: int) -> list[str]:
    """Check a rank's candidates from gradients in backward's order, last parameters first, in small chunks."""
    problems = []
    generator = torch.Generator().manual_seed(5)
    gradients = {f"p{i}": torch.randint(4, (n,), generator=generator).float() for i, n in enumerate((97, 50, 1, 31))}
    parameters = {name: torch.nn.Parameter(torch.ones_like(gradient)) for name, gradient in gradients.items()}
    for k in (1, 7, 20, 60, 178):
        rule = Unmask(budget=k, growth_steps=1)
        rule.bind(parameters, reachable=parameters)
        own, offset = [], 0
        for name, gradient in gradients.items():
            begin, stop = rule._parameters[name].own_range()
            own.append((torch.arange(begin, stop) + offset, gradient[begin:stop]))
            offset += gradient.numel()
        weights = [torch.ones_like(gradient) for _, gradient in own]
        with mock.patch.object(unmask, "_CHUNK", 8), Largest() as largest:
            for name, (_, gradient), weight in reversed(list(zip(gradients, own, weights, strict=True))):
                rule.receive(name, gradient, weight, last=True)
        if largest.numel > max(16, 3 * k):  # a chunk, the bounds of 13 of them, and candidates before they are compared
            problems.append(f"candidates for {k}: a tensor of {largest.numel}")
        positions, scores = (torch.cat(parts) for parts in zip(*own, strict=True))
        wanted = scores.sort(descending=True, stable=True).indices[:k].sort().values
        found = rule._candidates
        assert found is not None
        found.compare()
        if not torch.equal(found.positions, positions[wanted]) or not torch.equal(found.gradients, scores[wanted]):
            problems.append(f"candidates for {k}: {found.positions.tolist()}, wanted {positions[wanted].tolist()}")
    return problems


# --- parity ----------------------------------------------------------------------------------------------------


def _some_cases(rank: int) -> list[str]:
    with mock.patch.object(unmask, "_CHUNK", 300):
        problems = [problem for case in cases(2, every=False) for problem in compared(rank, case)]
    return _top_k(rank, 2) + _ties(rank) + problems


def _all_cases(rank: int, ranks: int) -> list[str]:
    return (
        _top_k(rank, ranks)
        + _ties(rank)
        + [problem for case in cases(ranks, every=True) for problem in compared(rank, case)]
    )


def test_masks_and_weights_are_those_of_dense_id3() -> None:
    for problems in distributed.run(_some_cases, ranks=2):
        assert not problems


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_masks_and_weights_on_other_numbers_of_ranks(ranks: int) -> None:
    for problems in distributed.run(_all_cases, ranks, ranks=ranks):
        assert not problems


# --- memory ----------------------------------------------------------------------------------------------------


def _memory(rank: int) -> list[tuple[float, float]]:
    """Return the memory of the state over that of the formula while gradients wait for the optimizer, without and with
    the quarter of candidates that may not be compared yet."""
    case = Case(Cell(selector="all", stage=3, steps=8, dtype="bf16"), budget=20_001, steps=4)
    engine, sparse = start(case)
    rule = sparse.update
    assert isinstance(rule, Unmask)
    numels = [p.ds_numel for p in engine.module.parameters()]
    ratios = []
    for step in range(case.cell.steps):
        ids = batch(step, 0, ranks=2, rank=rank)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        held = measured_state(sparse.held()).total
        # Of so many weights now, and as many candidates as join them next.
        weights = model_state(numels, [], stage=3, ranks=2, weight_bytes=2).weights
        options = {"ranks": 2, "weight_bytes": 2, "accumulation": 1}
        own = Unmask(budget=max(1, rule.unmasked)).footprint(numels, [], **options)
        formula = weights + own.gradients + own.masters + own.moments + own.indices
        transient = {part.name: part.size for part in rule.footprint(numels, [], **options).backward}
        candidates = transient.get("candidates", 0)
        ratios.append((held / (formula + candidates * 4 / 5), held / (formula + candidates)))
        engine.step()
    engine.destroy()
    return ratios


def test_state_is_in_proportion_to_what_is_unmasked() -> None:
    for ratios in distributed.run(_memory, ranks=2):
        assert all(0.9 <= most and least <= 1.05 for most, least in ratios), ratios


# --- half precision, skipped steps, infinite scores ------------------------------------------------------------


def _half_precision(rank: int) -> list[str]:
    problems = []
    for stage in (2, 3):
        case = Case(Cell(selector="all", stage=stage, steps=7, dtype="bf16", weight_decay=0.1))
        engine, sparse = start(case)
        first = full_weights(engine)
        for step in range(case.cell.steps):
            train_step(case.cell, engine, step, rank)
        weights, masks = full_weights(engine), masks_of(engine, sparse)
        moved = sum(int((weights[n] != first[n]).sum()) for n in weights)
        if not all(torch.equal(weights[n][~masks[n]], first[n][~masks[n]]) for n in weights):
            problems.append(f"stage {stage}: masked weights moved")
        if not 0.8 * case.budget <= moved <= case.budget:  # small steps of large weights round to nothing
            problems.append(f"stage {stage}: {moved} weights moved")
        gathered: list[Any] = [None, None]
        torch.distributed.all_gather_object(gathered, {n: w.sum().item() for n, w in weights.items()})
        if gathered[0] != gathered[1]:
            problems.append(f"stage {stage}: ranks hold different weights")
        engine.destroy()
    return problems


def _skipped(rank: int) -> list[str]:
    """Skip steps of infinite gradients on one rank, while the mask grows (1) and when it is whole (4): nothing moves,
    and the next step also unmasks what the skipped one would have, so that the mask is whole in time."""
    problems, skipped = [], (1, 4)
    for stage, accumulation in ((0, 1), (3, 2)):
        case = Case(Cell(selector="all", stage=stage, accumulation=accumulation, steps=6), steps=3)
        engine, sparse = start(case)
        for step in range(case.cell.steps):
            before = full_weights(engine)
            broken = step in skipped
            for micro in range(accumulation):
                ids = batch(step, micro, ranks=2, rank=rank)
                loss = engine(input_ids=ids, labels=ids).loss
                engine.backward(loss * (float("inf") if broken and (micro, rank) == (0, 1) else 1.0))
                engine.step()
            moved = largest_difference(before, full_weights(engine)) > 0
            unmasked = sparse.update.unmasked  # type: ignore[attr-defined]
            wanted = target(1 if step < 2 else step + 1, budget=case.budget, steps=case.steps)
            if moved == broken or engine.was_step_applied() == broken or unmasked != wanted:
                problems.append(
                    f"stage {stage} step {step}: moved {moved}, applied {engine.was_step_applied()}, {unmasked}"
                )
            restored = case.rule()
            restored.load_state_dict(sparse.update.state_dict())
            if restored.increment != sparse.update.increment:  # type: ignore[attr-defined]
                problems.append(f"stage {stage} step {step}: restored, {restored.increment} are to be unmasked next")
        if sparse.steps != 4:
            problems.append(f"stage {stage}: {sparse.steps} steps")
        expected = Reference(build_model(case.cell), case, skipped=skipped)
        expected.run()
        masks, weights = masks_of(engine, sparse), {n: p.detach() for n, p in expected.model.named_parameters()}
        problems += [f"stage {stage}: {n}" for n in masks if not torch.equal(masks[n], expected.masks[n])]
        difference = largest_difference(full_weights(engine), weights)
        if not difference <= 1e-6:
            problems.append(f"stage {stage}: weights differ by {difference}")
        engine.destroy()
    return problems


def _infinite_scores(rank: int) -> str:
    case = Case(Cell(selector="all", stage=3, steps=1), exp=1.0, eps=0.0)
    model = build_model(case.cell)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = 0.0  # on the first rank
    engine, _ = attach(case, model)
    try:
        train_step(case.cell, engine, 0, rank)
    except ValueError as error:
        engine.destroy()
        return str(error)
    return "nothing"


def _refused(rank: int) -> list[str]:
    messages = []
    case = Case(Cell(selector="all", stage=2, clipping=1.0))
    model = build_model(case.cell)
    sparse = trainer.prepare(model, selector=make_selector(case.cell), update=Unmask(budget=5))
    engine = make_engine(case.cell, model, sparse)
    try:
        sparse.attach(engine)
    except ValueError as error:
        messages.append(str(error))
    engine.destroy()
    return messages


def _edges(rank: int) -> tuple[list[str], str, list[str]]:
    return _half_precision(rank) + _skipped(rank), _infinite_scores(rank), _refused(rank)


def test_half_precision_skipped_steps_and_what_is_refused() -> None:
    for problems, infinite, refused in distributed.run(_edges, ranks=2):
        assert not problems
        assert infinite.startswith("update.eps: got 0.0 with update.exp 1.0, for which")
        assert len(refused) == 1 and "gradient_clipping is 1.0" in refused[0] and "to 0.0" in refused[0]
