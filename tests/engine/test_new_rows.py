"""The rows of new tokens under ZeRO: numbers of a plain loop, all other rows as they were, and the state of few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import trainer
from tests import distributed
from tests.comparing import largest_difference
from tests.engine.parity import ADAM, Cell, batch, full_weights, make_engine, train_step
from tests.models import tiny_model
from trainer.config.schema import AdapterSubstrate
from trainer.model.adapters import adapt
from trainer.model.growth import grow
from trainer.model.new_rows import fold, split
from trainer.selectors import All, Uniform

IDS = range(61, 64)
STEPS = 20


@dataclass(frozen=True)
class Case:
    family: str
    cell: Cell
    spare: int = 0
    adapter: bool = False

    def __str__(self) -> str:
        return f"{self.family}{' adapter' * self.adapter} {self.cell}"


def _cell(stage: int, **values: Any) -> Cell:
    return Cell(stage=stage, steps=STEPS, weight_decay=0.1, **values)


CASES = [
    Case("llama", _cell(3)),
    Case("llama", _cell(2, clipping=0.1, accumulation=2)),
    Case("gemma3_text", _cell(3, checkpointing=True)),
    Case("qwen2", _cell(2), spare=16),
    Case("mixtral", _cell(2)),
    Case("llama", _cell(3), adapter=True),
    Case("gemma3_text", _cell(2), adapter=True),
]
SLOW = [
    Case("llama", _cell(0)),
    Case("qwen2", _cell(1), spare=16),
    Case("mixtral", _cell(3)),
    Case("llama", _cell(2, offload=True)),
    Case("gemma3_text", _cell(3, offload=True, extra={"zero": {"offload_param": {"device": "cpu"}}})),
    Case("qwen2", _cell(3, offload=True), spare=16, adapter=True),
]
HPZ = Case("gemma3_text", _cell(3, extra={"zero": {"zero_hpz_partition_size": 2}}))


def _model(case: Case, *, rows: bool) -> Any:
    model = tiny_model(case.family, vocab_size=61 + case.spare).train()
    grow(model, IDS)
    if case.cell.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    if rows:
        split(model, IDS, ("embeddings", "head"))
    if case.adapter:
        torch.manual_seed(3)
        peft = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        return adapt(model, AdapterSubstrate(peft=peft)).model
    return model


def _selector(case: Case) -> Any:
    return All() if case.adapter else Uniform(blocks=2, interval=STEPS, seed=5)


def _plain(case: Case) -> dict[str, Tensor]:
    """Train a plain model, put back all rows but the new ones after each step, and let nothing else of them learn."""
    model = _model(case, rows=False)
    drawn = {f".{index}." for index in _selector(case).select(0, 4)}
    tables = [t for t in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)]
    tables = list({id(table): table for table in tables}.values())
    for name, parameter in model.named_parameters():
        block = any(part in name for part in drawn) and (not case.adapter or "lora_" in name)
        norm = not case.adapter and name.endswith("norm.weight") and "layers" not in name
        parameter.requires_grad_(block or norm or any(parameter is table for table in tables))
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = [{"params": [p for p in trained if (p.dim() > 1) is d], "weight_decay": 0.1 * d} for d in (True, False)]
    optimizer = torch.optim.AdamW(decay, **ADAM)
    for step in range(STEPS):
        for micro in range(case.cell.accumulation):
            for rank in range(2):
                ids = batch(step, micro, ranks=2, rank=rank)
                (model(input_ids=ids, labels=ids).loss / (2 * case.cell.accumulation)).backward()
        for table in tables:
            table.grad[: IDS.start] = table.grad[IDS.stop :] = 0
        if case.cell.clipping:
            torch.nn.utils.clip_grad_norm_(trained, case.cell.clipping)
        before = [table.detach().clone() for table in tables]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for table, old in zip(tables, before, strict=True):
                table[: IDS.start], table[IDS.stop :] = old[: IDS.start], old[IDS.stop :]
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _state_bytes(sparse: trainer.Sparse) -> int:
    """Return what this rank's optimizer has of the new rows: the storages of their moments, padding included, and as
    many elements of fp32 masters and gradients."""
    names = [n for part in ("embeddings", "head") for n in sparse.always_on.get(part, {}) if n.endswith("new_rows")]
    moments = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for piece in sparse.optimizer_slices(names)
        for key, tensor in piece.tensors.items()
        if key != "master"
    }
    return 2 * sum(moments.values())


def _trained(rank: int, cases: list[Case]) -> list[tuple[dict[str, Tensor], int]]:
    found = []
    for case in cases:
        model = _model(case, rows=True)
        always_on = None if case.adapter else ("embeddings", "head", "norm")
        sparse = trainer.prepare(
            model,
            selector=_selector(case),
            always_on=always_on,
            substrate="adapter" if case.adapter else "full",
        )
        engine = make_engine(case.cell, model, sparse)
        sparse.attach(engine, guard_every=1)
        for step in range(STEPS):
            train_step(case.cell, engine, step, rank)
        found.append((fold(model, full_weights(engine)), _state_bytes(sparse)))
        engine.destroy()
    return found


def _check(cases: list[Case]) -> None:
    for case, *ranks in zip(cases, *distributed.run(_trained, cases, ranks=2), strict=True):
        start, plain = dict(_model(case, rows=False).named_parameters()), _plain(case)
        weights = ranks[0][0]
        tables = [name for name in weights if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
        for name in tables:
            for kept in (slice(IDS.start), slice(IDS.stop, None)):
                assert torch.equal(weights[name][kept], start[name].detach()[kept]), f"{case}: {name}"
            assert not torch.equal(weights[name][IDS.start : IDS.stop], start[name][IDS.start : IDS.stop])
        assert largest_difference(weights, plain) <= 1e-6, str(case)
        values = len(IDS) * 32 * len(tables) * (2 if case.cell.stage == 0 else 1)  # which every rank has whole
        assert 16 * values <= sum(size for _, size in ranks) <= 1.05 * 16 * values, str(case)


def test_rows_train_as_in_a_plain_loop_and_no_other_row_moves() -> None:
    _check(CASES)


@pytest.mark.slow
def test_rows_train_under_every_stage_and_offloaded() -> None:
    _check(SLOW)


@pytest.mark.slow
def test_rows_train_with_a_copy_of_the_weights_on_each_machine() -> None:
    _check([HPZ])  # DeepSpeed makes hpZ's groups once per process
