"""The private names of DeepSpeed that the switch rests on, and the error when one is gone."""

from __future__ import annotations

import inspect
import re
from typing import Any

import deepspeed
import pytest

import trainer
from tests import distributed
from tests.engine.parity import Cell, build_model, make_engine, make_selector
from trainer.engine import registration
from trainer.engine.registration import PRIVATE_NAMES, RegistrationError, missing_names


def test_the_version_that_was_read_is_installed() -> None:
    assert deepspeed.__version__ == registration.READ_IN_VERSION


def _names(rank: int) -> list[str]:
    missing = []
    for stage, label in ((1, "stage 1 or 2"), (2, "stage 1 or 2"), (3, "stage 3")):
        for offload in (False, True):
            cell = Cell(stage=stage, ranks=1, offload=offload)
            model = build_model(cell)
            sparse = trainer.prepare(model, selector=make_selector(cell))
            engine = make_engine(cell, model, sparse)
            missing += [f"stage {stage}: {name}" for name in missing_names(engine, label)]
            engine.destroy()
    return missing


def test_every_private_name_is_where_it_was_read() -> None:
    assert distributed.run(_names, ranks=1) == [[]]


def test_the_list_of_private_names_is_complete() -> None:
    source = inspect.getsource(registration)
    used = set(re.findall(r"(?<![.\w])zero\.(\w+)", source)) | set(re.findall(r"self\.optimizer\.(\w+)", source))
    used |= set(re.findall(r"(?<![.\w])coordinator\.(\w+)", source))
    public = {"__dict__", "destroy"}
    assert used - public <= {name for names in PRIVATE_NAMES.values() for name in names}


def _refused(rank: int, settings: dict[str, Any]) -> list[str]:
    answers = []
    for change in settings:
        cell = Cell(ranks=1, **change)
        model = build_model(cell)
        sparse = trainer.prepare(model, selector=make_selector(cell))
        engine = make_engine(cell, model, sparse)
        if cell.extra.get("forget"):
            delattr(engine.optimizer, cell.extra["forget"])
        try:
            sparse.attach(engine)
            answers.append("accepted")
        except RegistrationError as error:
            answers.append(str(error))
    return answers


def test_engines_that_cannot_be_switched_are_refused_with_the_key_to_change() -> None:
    settings = [
        {"stage": 2, "extra": {"zero": {"round_robin_gradients": True}}},
        {"stage": 1, "dtype": "bf16", "extra": {"config": {"data_types": {"grad_accum_dtype": "fp32"}}}},
        {"stage": 0, "dtype": "bf16"},
        {"stage": 3, "extra": {"zero": {"sub_group_size": 3000}}},
        {"stage": 2, "extra": {"forget": "params_in_partition"}},
    ]
    (answers,) = distributed.run(_refused, settings, ranks=1)
    for answer, words in zip(
        answers,
        ["round_robin_gradients", "grad_accum_dtype", "stage 0 in fp32", "sub_group_size", "params_in_partition"],
        strict=True,
    ):
        assert words in answer


def _attached_wrongly(rank: int) -> list[str]:
    cell = Cell(stage=2, ranks=1, clipping=1.0)
    model = build_model(cell)
    sparse = trainer.prepare(model, selector=make_selector(cell))
    answers = []
    with pytest.raises(RuntimeError, match="not attached"):
        _ = sparse.steps
    engine = make_engine(cell, model, sparse)
    sparse.attach(engine)
    with pytest.raises(RuntimeError, match="already attached"):
        sparse.attach(engine)
    return answers


def test_attach_is_for_one_engine_once() -> None:
    distributed.run(_attached_wrongly, ranks=1)
