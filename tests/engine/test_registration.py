"""The private names of DeepSpeed that the switch rests on, and the error when one is gone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch

import trainer
from tests import distributed
from tests.engine import parity
from tests.engine.parity import Cell, build_model, make_engine, make_selector
from trainer.engine import zero
from trainer.engine.zero import stage3
from trainer.engine.zero.errors import RegistrationError
from trainer.engine.zero.parameters import GroupMaster, PartitionedParameter, ReplicatedParameter
from trainer.engine.zero.private_names import PRIVATE_NAMES, READ_IN_VERSION, missing_names


def test_the_version_that_was_read_is_installed() -> None:
    assert deepspeed.__version__ == READ_IN_VERSION


def _names(rank: int) -> list[str]:
    missing = []
    for stage, label in ((1, "stage 1 or 2"), (2, "stage 1 or 2"), (3, "stage 3")):
        for offload in (False, True):
            cell = Cell(stage=stage, ranks=1, offload=offload)
            model = build_model(cell)
            sparse = trainer.prepare(model, selector=make_selector(cell))
            engine = make_engine(cell, model, sparse)
            missing += [f"stage {stage}: {name}" for name in missing_names(engine, label)]
            missing += [f"stage {stage}: {name}" for name in _missing_attributes(engine, stage)]
            engine.destroy()
    return missing


def _missing_attributes(engine: Any, stage: int) -> list[str]:
    """Return what the types in `parameters` declare and DeepSpeed has not set."""
    zero = engine.optimizer
    pairs: list[tuple[type, Any]] = [(ReplicatedParameter, zero.bit16_groups[0][0])] if stage < 3 else []
    if stage == 3:
        pairs = [(PartitionedParameter, zero.fp16_groups[0][0]), (GroupMaster, zero.fp32_partitioned_groups_flat[0])]
    return [
        name
        for declared, tensor in pairs
        for name in (*declared.__annotations__, *(name for name in vars(declared) if not name.startswith("_")))
        if name != "ds_z3_leaf_module" and not hasattr(tensor, name)
    ]


def test_every_private_name_is_where_it_was_read() -> None:
    assert distributed.run(_names, ranks=1) == [[]]


def test_the_list_of_private_names_is_complete() -> None:
    """Check every file of the folder; the other rooms use none."""
    files = sorted(Path(zero.__file__).parent.glob("*.py"))
    assert {"stage0", "stage12", "stage3", "registration"} <= {file.stem for file in files}
    source = "\n".join(file.read_text() for file in files)
    used = set(re.findall(r"(?<![.\w])(?:zero|coordinator|self\.optimizer|self\._zero)\.(\w+)", source))
    public = {"__dict__", "destroy", "offload_states", "reload_states", "zero_grad"}
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


class _Streams:
    """An accelerator whose work is asynchronous, with streams that only note who waits for whom."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.waited: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def is_synchronized_device(self) -> bool:
        return False

    def current_stream(self) -> str:
        return "compute"

    def wait_stream(self, other: str) -> None:  # of the gather stream
        self.waited.append(("gather", other))


def _ordered(rank: int) -> list[list[tuple[str, str]]]:
    """Return who waits for whom at a switch, after weights are written, and after ID3 has written single ones."""
    engine, sparse = parity.start(Cell(ranks=1), rank)
    held = sparse._registered()
    streams = _Streams(stage3.get_accelerator())
    held._coordinator._PartitionedParameterCoordinator__allgather_stream = streams
    found = []
    parameter = sparse.blocks[3].parameters["model.layers.3.mlp.up_proj.weight"]
    with mock.patch.object(stage3, "get_accelerator", lambda: streams):
        for act in (
            lambda: held.shares.publish(parameter),
            lambda: held.shares.publish_entries([(parameter, torch.tensor([0]))]),
            lambda: held.refill(0, held.groups[0]),
        ):
            streams.waited.clear()
            act()
            found.append(list(streams.waited))
    return found


def test_gathers_wait_for_what_is_written_to_partitions() -> None:
    """On GPUs ZeRO-3 gathers on a stream of its own. That the wait is issued is all that can be seen without two."""
    (found,) = distributed.run(_ordered, ranks=1)
    assert found == [[("gather", "compute")]] * 3
