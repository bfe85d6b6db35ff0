"""What passes through a model store and compute, for families of every kind."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tests.families import MORE
from tests.models import COMMON, FAMILIES, family_fields, tiny_llama, tiny_model
from tests.multimodal import MULTIMODAL
from trainer.config import RunConfig
from trainer.model.blocks import find
from trainer.model.load import ModelError
from trainer.model.loss import Objective
from trainer.model.towers import towers_of
from trainer.planner import Plan, Planner
from trainer.planner.passes import PassError, Passes
from trainer.planner.tracing import kinds

# Stacked experts, state-space blocks alone and beside attention, convolutions of three dimensions, blocks that use what
# others have computed, shapes that depend on values.
ODD = ("mixtral", "bamba", "falcon_h1", "mamba", "gemma3n_text", "gemma4_text", "jetmoe", "mpt", "llama4_text", "lfm2")


def configured(family: str, dtype: str, *, fields: dict[str, Any] | None = None, **more: Any) -> RunConfig:
    if family in MULTIMODAL:
        text = {**MULTIMODAL[family]["text_config"], "vocab_size": 272}
        random = {**MULTIMODAL[family], "text_config": text}
    else:
        text = random = {**COMMON, **family_fields(family), "vocab_size": 272, **(fields or {})}
    del text["use_cache"]
    return RunConfig.model_validate(
        {
            "method": "lisa",
            "model": {"random": {"model_type": family, **random}, "tokenizer": "bytes", "dtype": dtype},
            "data": {"train": "none.jsonl", "max_length": 48},
            "train": {"steps": 6, "global_batch_size": 4, "micro_batch_size": 2},
            **more,
        }
    )


def planned(family: str, dtype: str, caplog: pytest.LogCaptureFixture, **more: Any) -> Plan:
    with caplog.at_level(logging.WARNING):
        plan = Planner(on_cpu=True).plan(configured(family, dtype, **more), 2)
    assert "Traceback" not in caplog.text and "fake_tensor" not in caplog.text
    assert plan.flops > 0 and plan.memory.moments["loss"]["activations"] > 0
    assert len(plan.notes) == (family == "jetmoe")  # whose routers turn numbers of tokens into Python's
    return plan


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ODD)
def test_odd_families_are_planned(family: str, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    planned(family, dtype, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*FAMILIES, *MORE, *MULTIMODAL} - set(ODD)))
def test_all_families_are_planned(family: str, caplog: pytest.LogCaptureFixture) -> None:
    for dtype in ("fp32", "bf16"):
        planned(family, dtype, caplog)


@pytest.mark.parametrize(("family", "text"), [("gemma3", "gemma3_text"), ("qwen3_vl", "qwen3")])
def test_frozen_towers_are_weights_and_nothing_else(family: str, text: str, caplog: pytest.LogCaptureFixture) -> None:
    whole = planned(family, "fp32", caplog)
    fields = {"rope_parameters": None, "sliding_window": 8} if family == "gemma3" else {}
    alone = planned(text, "fp32", caplog, fields=fields)
    assert (whole.flops, whole.volume, whole.trained) == (alone.flops, alone.volume, alone.trained)
    towers = towers_of(tiny_model(family))
    assert towers is not None
    numel = sum(p.numel() for part in towers.outside.values() for p in part.values())
    assert whole.parameters == alone.parameters + numel
    assert 0 <= whole.state.weights - alone.state.weights - 2 * numel < 4 * 50  # two ranks; parts are padded
    assert whole.memory.moments["loss"]["activations"] == alone.memory.moments["loss"]["activations"]


@pytest.mark.parametrize("family", ["mpt", "mixtral", "bamba"])
def test_adapters_are_planned(family: str, caplog: pytest.LogCaptureFixture) -> None:
    peft = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear", "lora_dropout": 0.0}
    lora = planned(family, "fp32", caplog, method="lora", substrate={"name": "adapter", "peft": peft})
    full = planned(family, "fp32", caplog)
    assert lora.trained < full.trained and lora.memory.parts != full.memory.parts


def test_blocks_of_a_kind_are_found() -> None:
    def found(family: str, **fields: Any) -> list[int]:
        model = tiny_model(family, **fields)
        return kinds([block.module for block in find(model).blocks])

    assert found("llama") == [0, 0, 0, 0]
    assert found("lfm2") == [0, 1, 0, 1]
    assert found("deepseek_v3") == [0, 1, 1, 1]  # the first one is dense
    # Two kinds of attention, and the last two blocks use the keys of others.
    assert found("gemma3n_text") == [0, 1, 2, 3]


def passes(model: Any, **sizes: int) -> Passes:
    structure = find(model)
    return Passes(model, structure, structure.blocks, **{"batch": 2, "length": 1024, **sizes})


class OnlyReal(nn.Module):
    """A block that reads a value, as routers do that count their tokens."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.attention_type = getattr(block, "attention_type", "")

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if float(hidden.detach().sum()) == torch.inf:
            raise AssertionError
        return self.block(hidden, *args, **kwargs)


def test_what_cannot_be_traced_is_run_on_short_sequences() -> None:
    model = tiny_llama(layers=2)
    traced = passes(model).of_blocks()[0]
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = OnlyReal(block)
    found = passes(model)
    measured = found.of_blocks()[0]
    assert measured.flops == traced.flops
    for kind in ("passed", "active", "entry"):
        for name in ("saved", "peak", "forward"):
            expected = getattr(getattr(traced, kind).activations, name)
            assert abs(getattr(getattr(measured, kind).activations, name) / expected - 1) < 0.02
    assert len(found.notes) == 1
    assert found.notes[0].startswith("activations and FLOPs of block 0 follow from sequences of up to 768 tokens (")


def _failing(only_traced: type[Exception], only_real: type[Exception]) -> Any:
    model = tiny_llama(layers=2)

    def fail(_: nn.Module, args: Any) -> None:
        raise (only_traced if isinstance(args[0], FakeTensor) else only_real)("no such shape")

    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(fail)
    return model


def test_a_block_that_fails_either_way_is_refused() -> None:
    with pytest.raises(PassError, match="block 0: ValueError: no such shape"):
        passes(_failing(ValueError, ValueError)).of_blocks()


def test_a_block_that_can_be_neither_traced_nor_run_is_left_out_of_the_plan() -> None:
    found = passes(_failing(ValueError, MemoryError))
    assert found.complete and found.of_blocks()[0].flops.forward == 0 and not found.complete
    assert found.notes == [
        "activations and FLOPs of block 0 are not in this plan: it cannot be traced (ValueError: no such shape)"
    ]


def test_a_length_that_the_model_cannot_take_is_refused() -> None:
    """MPT has a bias for each position, and says how many under a name of its own."""
    model = tiny_model("mpt")
    assert len(passes(model, length=128).of_blocks()) == 4
    with pytest.raises(PassError, match="block 0: RuntimeError: "):
        passes(tiny_model("mpt", max_seq_len=1024), length=2048).of_blocks()


def test_a_model_whose_sizes_do_not_fit_is_refused_with_the_key() -> None:
    config = configured("llama", "fp32")
    planner = Planner(on_cpu=True)
    model = planner._model(config)
    model.model.layers[0].mlp.up_proj = nn.Linear(7, 64, device="meta")
    with pytest.raises(ModelError, match=r"model\.random: a pass through one block of this model, with data\.max_len"):
        planner.plan(config, 1)


def test_a_model_with_the_fused_head_is_traced_like_any_other() -> None:
    plain, fused = tiny_model("llama"), tiny_model("llama")
    Objective(fused, fused=True)
    assert passes(fused, length=16).of_blocks() == passes(plain, length=16).of_blocks()
