"""trainer/export/from_engine.py: what is written is what was trained, and appears whole or not at all."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import trainer
from tests import distributed
from tests.engine.parity import Cell, batch, deepspeed_config, make_engine, make_selector, train_step
from trainer.config.schema import ModelConfig
from trainer.data.tokenizer import bytes_tokenizer
from trainer.export.from_engine import ExportError, RankZeroSteps, export
from trainer.model import load as models

CELLS = {
    "tied": Cell(stage=3, tied=True, steps=3, interval=1),
    "untied": Cell(stage=3, steps=3, interval=1),
    "bf16": Cell(stage=3, steps=1, dtype="bf16"),
    "replicated": Cell(stage=2, steps=1),
    "experts": Cell(stage=3, steps=2, family="mixtral"),
}


@dataclass(frozen=True)
class Exported:
    """What rank 0 found, by cell; `logits_differ` after opening the folder again."""

    logits_differ: dict[str, float]
    moved: dict[str, float]
    interrupted: list[str]
    refused: str
    asked: int


class NoSpaceTokenizer(PreTrainedTokenizerFast):
    """Its files do not fit on the disk any more, after the model's did."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        raise OSError(errno.ENOSPC, "No space left on device")


class FlippingTokenizer(PreTrainedTokenizerFast):
    """While it is saved, the disk loses a bit of the model beside it."""

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> tuple[str, ...]:
        path = Path(save_directory) / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return ()


def export_all(rank: int, folder: Path) -> Exported:
    """Train, evaluate and export each cell, then break two exports of the last; runs in each rank."""
    logits_differ, moved = {}, {}
    for name, cell in CELLS.items():
        model = load_model(cell)
        before = full_head(model)
        sparse = trainer.prepare(model, selector=make_selector(cell), always_on=cell.always_on)
        engine = make_engine(cell, model, sparse)
        sparse.attach(engine)
        for step in range(cell.steps):
            train_step(cell, engine, step, rank)
        live = logits_of(engine)
        export(engine, bytes_tokenizer(), folder / name)
        if rank == 0:
            opened = AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="eager")
            logits_differ[name] = float((live - logits_of(opened.eval())).abs().max())
            moved[name] = float((opened.lm_head.weight - before).abs().max())
            assert opened.lm_head.weight.dtype == before.dtype
        if name == "untied":
            interrupted = interrupt(rank, engine, folder / "interrupted")
            refused = flip_a_bit(engine, folder / "refused")
            asked = stop_half_way(rank, engine, folder / "stopped")
        engine.destroy()
    return Exported(logits_differ, moved, interrupted, refused, asked)


def load_model(cell: Cell) -> PreTrainedModel:
    """As the loop does, so that under ZeRO-3 parameters are partitioned from the start."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if cell.family else {}
    config = ModelConfig(
        random={
            "model_type": cell.family or "llama",
            "num_key_value_heads": 2,
            "tie_word_embeddings": cell.tied,
            **shape,
            **experts,
        },
        dtype=cell.dtype,
        attention="eager",
    )
    return models.load(config, bytes_tokenizer(), seed=0, deepspeed=deepspeed_config(cell, micro_batch=2)).train()


def full_head(model: PreTrainedModel) -> Tensor:
    weight = model.lm_head.weight
    with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
        return weight.detach().clone()


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    model.eval()
    return model(input_ids=batch(0, 0, ranks=1, rank=0)).logits.detach().float()


def interrupt(rank: int, engine: Any, folder: Path) -> list[str]:
    """What lies there after each of four exports, of which the first and the third fail half way."""
    half = NoSpaceTokenizer(tokenizer_object=bytes_tokenizer().backend_tokenizer)
    left = []
    for tokenizer in (half, bytes_tokenizer(), half, bytes_tokenizer()):
        if tokenizer is half:
            with pytest.raises(ExportError, match="No space left"):
                export(engine, tokenizer, folder)
        else:
            if rank == 0:  # of an export that was killed
                folder.with_name(".interrupted.01234567.partial").mkdir()
                (folder.with_name(".interrupted.01234567.partial") / "stale.json").write_text("{}")
            export(engine, tokenizer, folder)
        if rank == 0:
            left.append(sorted(entry.name for entry in folder.parent.glob("*interrupted*")))
    return [" ".join(names) for names in left]


def flip_a_bit(engine: Any, folder: Path) -> str:
    with pytest.raises(ExportError) as error:
        export(engine, FlippingTokenizer(tokenizer_object=bytes_tokenizer().backend_tokenizer), folder)
    return str(error.value)


def stop_half_way(rank: int, engine: Any, folder: Path) -> int:
    """How often was asked until the third time, when rank 1 wants to stop."""
    asked = []

    def stop() -> None:
        asked.append(len(asked))
        told = torch.tensor(int(rank == 1 and len(asked) == 3))
        torch.distributed.all_reduce(told)
        if told:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        export(engine, bytes_tokenizer(), folder, step=RankZeroSteps(stop))
    return len(asked)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def exported(folder: Path) -> Exported:
    return distributed.run(export_all, folder, ranks=2)[0]


@pytest.mark.parametrize("name", CELLS)
def test_logits_are_equal_after_opening_the_folder(exported: Exported, name: str) -> None:
    assert exported.logits_differ[name] == 0
    assert exported.moved[name] > 1e-4, "weights of the start would do as well"


@pytest.mark.parametrize(("name", "dtype"), [("untied", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_keep_the_type_that_they_were_trained_in(
    exported: Exported, folder: Path, name: str, dtype: torch.dtype
) -> None:
    with safe_open(folder / name / "model.safetensors", framework="pt") as opened:
        assert {opened.get_tensor(key).dtype for key in opened.keys()} == {dtype}  # noqa: SIM118 - not a dictionary


def test_experts_stand_one_by_one_as_in_published_checkpoints(exported: Exported, folder: Path) -> None:
    with safe_open(folder / "experts" / "model.safetensors", framework="pt") as opened:
        names = list(opened.keys())
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names


@pytest.mark.parametrize(("name", "heads"), [("tied", 0), ("untied", 1)])
def test_a_tied_head_is_written_once(exported: Exported, folder: Path, name: str, heads: int) -> None:
    with safe_open(folder / name / "model.safetensors", framework="pt") as opened:
        names = list(opened.keys())
    assert names.count("lm_head.weight") == heads and "model.embed_tokens.weight" in names
    model = AutoModelForCausalLM.from_pretrained(folder / name)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "tied")


def test_the_folder_brings_its_tokenizer_and_generates_with_a_cache(exported: Exported, folder: Path) -> None:
    text = "naïve"
    tokenizer = AutoTokenizer.from_pretrained(folder / "untied")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert AutoModelForCausalLM.from_pretrained(folder / "untied").config.use_cache


def test_an_interrupted_export_leaves_no_model_and_an_earlier_one_alone(exported: Exported, folder: Path) -> None:
    assert exported.interrupted == ["", "interrupted", "interrupted", "interrupted"]
    assert not (folder / "interrupted" / "stale.json").exists()
    assert AutoModelForCausalLM.from_pretrained(folder / "interrupted").config.num_hidden_layers == 4


def test_a_folder_that_lost_a_bit_is_refused(exported: Exported, folder: Path) -> None:
    assert "model.safetensors: " in exported.refused and exported.refused.endswith("differs from the model's")
    assert not (folder / "refused").exists()


def test_an_export_can_be_stopped_between_blocks(exported: Exported, folder: Path) -> None:
    assert exported.asked == 3 and not list(folder.glob("stopped*"))
