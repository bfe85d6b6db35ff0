"""What a prepared model says before an engine is attached to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

import trainer
from tests.engine.parity import Cell, build_model, make_selector
from trainer.engine.sparse import Sparse

PARAMETER = "model.layers.0.mlp.up_proj.weight"
NEED_AN_ENGINE: dict[str, Callable[[Sparse], Any]] = {
    "steps": lambda sparse: sparse.steps,
    "device": lambda sparse: sparse.device,
    "state_names": lambda sparse: sparse.state_names,
    "held": lambda sparse: sparse.held(),
    "inspecting": lambda sparse: sparse.inspecting(),
    "owned": lambda sparse: sparse.owned(sparse.blocks[0].parameters[PARAMETER]),
    "entries": lambda sparse: sparse.entries(PARAMETER, sparse.blocks[0].parameters[PARAMETER]),
    "publish": lambda sparse: sparse.publish(sparse.blocks[0].parameters[PARAMETER]),
    "optimizer_slices": lambda sparse: list(sparse.optimizer_slices({PARAMETER})),
    "state_dict": lambda sparse: sparse.state_dict(),
    "load_state_dict": lambda sparse: sparse.load_state_dict({}, mock.Mock()),
    "compare_ranks": lambda sparse: sparse.compare_ranks(),
}
NEED_NONE: dict[str, Callable[[Sparse], Any]] = {
    "active": lambda sparse: sparse.active,
    "rounded_away": lambda sparse: sparse.rounded_away,
    "trainable_parameters": lambda sparse: sparse.trainable_parameters(),
    "ever_in_optimizer": lambda sparse: sparse.ever_in_optimizer(),
    "trained_by_rule": lambda sparse: sparse.trained_by_rule([0]),
    "groups": lambda sparse: sparse.groups(),
    "before_change": lambda sparse: sparse.before_change(list),
    "change": lambda sparse: sparse.change(),
    "param_groups": lambda sparse: sparse.param_groups(),
}


@pytest.fixture(scope="module")
def sparse() -> Sparse:
    cell = Cell(stage=0)
    return trainer.prepare(build_model(cell), selector=make_selector(cell))


def test_every_public_name_is_in_one_of_the_tables() -> None:
    public = {name for name in vars(Sparse) if not name.startswith("_")} - {"attach"}
    assert public == NEED_AN_ENGINE.keys() | NEED_NONE.keys()
    assert not NEED_AN_ENGINE.keys() & NEED_NONE.keys()


@pytest.mark.parametrize("name", NEED_AN_ENGINE)
def test_what_needs_an_engine_names_the_call_that_is_missing(sparse: Sparse, name: str) -> None:
    with pytest.raises(RuntimeError, match=r"not attached to an engine yet: call attach\(engine\)"):
        NEED_AN_ENGINE[name](sparse)


@pytest.mark.parametrize("name", NEED_NONE)
def test_what_needs_no_engine_answers(sparse: Sparse, name: str) -> None:
    NEED_NONE[name](sparse)
