"""The private names of DeepSpeed that the switch rests on, and the error when one is gone."""

from __future__ import annotations

import json
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

import trainer
from tests import distributed
from tests.engine import parity
from tests.engine.parity import Cell, build_model, deepspeed_config, make_engine, make_selector
from tests.engine.private_names import definitions, trespasses, unlisted
from trainer.engine import zero
from trainer.engine.zero import stage3
from trainer.engine.zero.errors import RegistrationError
from trainer.engine.zero.loss_scale import loss_scale_state, restore_loss_scale
from trainer.engine.zero.parameters import GroupMaster, PartitionedParameter, ReplicatedParameter
from trainer.engine.zero.private_names import READ_IN_VERSION, missing_names


def test_the_version_that_was_read_is_installed() -> None:
    assert deepspeed.__version__ == READ_IN_VERSION


def _prepared(cell: Cell) -> tuple[Any, trainer.Sparse]:
    """Return an engine and the model to attach to it."""
    model = build_model(cell)
    sparse = trainer.prepare(model, selector=make_selector(cell))
    # torch computes in fp16 on a CPU, slowly; DeepSpeed refuses to, for that reason.
    with mock.patch.object(get_accelerator(), "is_fp16_supported", lambda: True):
        return make_engine(cell, model, sparse), sparse


def _names(rank: int) -> list[str]:
    missing = []
    for stage, label in ((0, "stage 0"), (1, "stage 1 or 2"), (2, "stage 1 or 2"), (3, "stage 3")):
        for changes in ({}, {"offload": True}, {"dtype": "fp16"}) if stage else ({},):
            cell = Cell(stage=stage, ranks=1, **changes)
            engine, _ = _prepared(cell)
            found = missing_names(engine, label) + _missing_attributes(engine, cell)
            missing += [f"{cell}: {name}" for name in found]
            engine.destroy()
    return missing


def _missing_attributes(engine: Any, cell: Cell) -> list[str]:
    """Return what the types in `parameters` declare and DeepSpeed has not set."""
    zero = engine.optimizer
    pairs: list[tuple[type, Any]] = [(ReplicatedParameter, zero.bit16_groups[0][0])] if cell.stage in (1, 2) else []
    if cell.stage == 3:
        pairs = [(PartitionedParameter, zero.fp16_groups[0][0]), (GroupMaster, zero.fp32_partitioned_groups_flat[0])]
    elsewhere = {"ds_z3_leaf_module"} if cell.offload else {"ds_z3_leaf_module", "_zero_optimizer"}
    return [
        name
        for declared, tensor in pairs
        for name in (*declared.__annotations__, *(name for name in vars(declared) if not name.startswith("_")))
        if name not in elsewhere and not hasattr(tensor, name)
    ]


def test_every_private_name_is_where_it_was_read() -> None:
    assert distributed.run(_names, ranks=1) == [[]]


FOLDER = Path(zero.__file__).parent
SOURCES = {file.stem: file.read_text() for file in sorted(FOLDER.glob("*.py"))}
DEFINED = {name for source in SOURCES.values() for name in definitions(source)}


def test_the_list_of_private_names_is_complete() -> None:
    """The names that no source says are those of the lists themselves, and of a public method."""
    assert {"stage0", "stage12", "stage3", "registration"} <= SOURCES.keys()
    found = {stem: names for stem, source in SOURCES.items() if (names := unlisted(source, DEFINED))}
    assert found == {
        "loss_scale": {"engine.optimizer.loss_scaler.?"},
        "private_names": {"holder.?"},
        "registration": {"holder.?"},
    }


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("zero.a_name", "zero.a_name"),
        ("self.optimizer.a_name = 1", "self.optimizer.a_name"),
        ("self._coordinator._a_name()", "self._coordinator._a_name"),
        ("self.engine._a_name", "self.engine._a_name"),
        ("getattr(self._zero, 'a_name', None)", "self._zero.a_name"),
        ("setattr(bucket, 'a_name', 1)", "bucket.a_name"),
        ("for name in ('a_name', 'param_id'):\n    getattr(zero, name)", "zero.a_name"),
        ("mock.patch.object(Optimizer, 'a_name', 1)", "Optimizer.a_name"),
        ("parameter_offload.A_NAME", "parameter_offload.A_NAME"),
        ("adam.a_name", "adam.a_name"),
        ("parameter._a_name = zero", "parameter._a_name"),
        ("parameter.ds_a_name", "parameter.ds_a_name"),
        ("hasattr(parameter, 'ds_a_name')", "parameter.ds_a_name"),
        ("anything.a_name", "anything.a_name"),
        ("from deepspeed.runtime.zero import stage3\nstage3.a_name", "stage3.a_name"),
    ],
)
def test_a_name_that_is_in_no_list_is_found(line: str, found: str) -> None:
    assert unlisted(line, DEFINED) == {found}


def test_other_rooms_use_no_private_names() -> None:
    """`trainer/model/blocks.py` alone reads what ZeRO-3 adds to parameters."""
    package = FOLDER.parent.parent
    files = [file for file in package.rglob("*.py") if file.parent != FOLDER]
    found = {str(file.relative_to(package)): names for file in files if (names := trespasses(file.read_text()))}
    assert found == {"model/blocks.py": {"parameter.ds_id", "parameter.ds_numel", "parameter.ds_shape"}}


@pytest.mark.parametrize(
    "line", ["engine._a_name", "self.engine._a_name", "engine.optimizer", "x.fp16_groups", "getattr(x, 'ds_id')"]
)
def test_a_private_name_in_another_room_is_found(line: str) -> None:
    assert trespasses(line)


def _refused(rank: int, settings: list[dict[str, Any]]) -> list[str]:
    answers = []
    for change in settings:
        cell = Cell(ranks=1, **change)
        engine, sparse = _prepared(cell)
        holder, _, forgotten = cell.extra.get("forget", "").rpartition(".")
        if forgotten:
            delattr(attrgetter(holder)(engine), forgotten)
        try:
            sparse.attach(engine)
            answers.append("accepted")
        except RegistrationError as error:
            answers.append(str(error))
    return answers


def test_engines_that_cannot_be_switched_are_refused_with_the_key_to_change() -> None:
    masters = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
    settings = [
        {"stage": 2, "extra": {"zero": {"round_robin_gradients": True}}},
        {"stage": 1, "dtype": "bf16", "extra": {"config": {"data_types": {"grad_accum_dtype": "fp32"}}}},
        {"stage": 0, "dtype": "bf16"},
        {"stage": 3, "extra": {"zero": {"sub_group_size": 3000}}},
        {"stage": 3, "offload": True, "extra": {"zero": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}},
        {"stage": 3, "offload": True, "extra": {"zero": {"offload_optimizer": {"device": "cpu", "ratio": 0.0}}}},
        *({"stage": stage, "dtype": "bf16", "offload": True, "extra": {"config": masters}} for stage in (2, 3)),
    ]
    (answers,) = distributed.run(_refused, settings, ranks=1)
    found = ["round_robin_gradients", "grad_accum_dtype", "stage 0 in fp32", "sub_group_size"]
    found += [
        "ratio below 1 (here 0.5)",
        "ratio below 1 (here 0.0)",
        *["bf16_master_weights_and_grads (here True)"] * 2,
    ]
    for answer, words in zip(answers, found, strict=True):
        assert words in answer, answer


def test_a_deepspeed_that_has_renamed_something_is_refused_by_the_name() -> None:
    """Without the names of settings and of the loss scaler nothing would fail later: state would be lost in silence."""
    masters = ("bf16_master_weights_and_gradients", "fp16_master_weights_and_gradients")
    of_stage_3 = ("partial_offload", "zero_quantized_nontrainable_weights", "offload_param", "parameter_offload")
    scaler = ("cur_hysteresis", "cur_iter", "cur_scale", "last_overflow_iter")
    cases = [
        *((2, "fp32", f"optimizer.{name}") for name in ("params_in_partition", "zenflow", *masters)),
        *((3, "fp32", f"optimizer.{name}") for name in ("zenflow", *masters, *of_stage_3)),
        *((stage, "fp16", f"optimizer.{name}") for stage in (2, 3) for name in ("loss_scaler", "dynamic_loss_scale")),
        *((stage, "fp16", f"optimizer.loss_scaler.{name}") for stage in (2, 3) for name in scaler),
    ]
    settings = [{"stage": stage, "dtype": dtype, "extra": {"forget": name}} for stage, dtype, name in cases]
    (answers,) = distributed.run(_refused, settings, ranks=1)
    for (_, _, name), answer in zip(cases, answers, strict=True):
        assert answer.startswith(f"DeepSpeed {READ_IN_VERSION} has no {name.rpartition('.')[2]}; "), answer


def _muon(rank: int) -> None:
    """On ZeRO-3 DeepSpeed itself refuses it, with these settings."""
    cell = Cell(stage=2, ranks=1)
    model = build_model(cell)
    for name, parameter in model.named_parameters():
        parameter.use_muon = "layers" in name and parameter.ndim == 2
    sparse = trainer.prepare(model, selector=make_selector(cell))
    chosen = {"type": "Muon", "params": {"lr": 1e-3, "torch_adam": True}}
    config = deepspeed_config(cell, micro_batch=4) | {"optimizer": chosen}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=sparse.param_groups(), config=config)
    with pytest.raises(RegistrationError, match="optimizer Muon"):
        sparse.attach(engine)


def test_muon_is_refused() -> None:
    distributed.run(_muon, ranks=1)


def test_the_loss_scale_is_restored_and_a_constant_one_is_configuration() -> None:
    def engine(scaler: Any) -> Any:
        zero = SimpleNamespace(loss_scaler=scaler, dynamic_loss_scale=scaler.dynamic)
        return SimpleNamespace(optimizer=zero, fp16_enabled=lambda: True)

    def dynamic() -> Any:
        return DynamicLossScaler(2**16, 3, 1.0, 2, False)

    trained, resumed, constant = dynamic(), dynamic(), LossScaler(128.0)
    with mock.patch("deepspeed.comm.get_rank", lambda: 0):
        for overflow in (False, True, False, True, False, False):
            trained.update_scale(overflow)
    state = loss_scale_state(engine(trained))
    assert state == {"cur_scale": 2**15, "cur_iter": 6, "cur_hysteresis": 1, "last_overflow_iter": 3}
    restore_loss_scale(engine(resumed), json.loads(json.dumps(state)))
    assert vars(resumed) == vars(trained)
    assert loss_scale_state(engine(constant)) == {}
    restore_loss_scale(engine(constant), state)
    assert vars(constant) == vars(LossScaler(128.0))


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
    held = sparse._attached().registration
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
