"""trainer/engine/silence.py: parameters that train by name only are found, and no others."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import trainer
from tests import distributed
from tests.engine import parity
from tests.engine.parity import Cell
from tests.engine.test_families import RoutedExperts
from tests.models import COMMON, tiny_llama
from trainer.engine.guard import GuardError

_JAMBA: dict[str, Any] = {
    "num_experts": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}


def jamba(targets: str | list[str]) -> nn.Module:
    """Two layers; its `dt_proj` is called by its weight."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("jamba", **{**COMMON, "num_hidden_layers": 2, **_JAMBA})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets)).train()


def unused(cell: Cell) -> nn.Module:
    """A matrix in every block, and one outside, that nothing calls."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.spare = nn.Linear(32, 32, bias=False)
    model.spare_head = nn.Linear(32, 8, bias=False)
    return model.train()


def experts(cell: Cell) -> nn.Module:
    """No token goes to the last of sixteen experts."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp = RoutedExperts(model.model.embed_tokens)
        layer.mlp._remember = None
    model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: [setattr(layer.mlp, "chosen", args[0] % 15) for layer in model.model.layers] and None
    )
    return model.train()


def start(cell: Cell, *, guard_every: int) -> Any:
    model = parity.build_model(cell)
    selector = parity.make_selector(cell)
    sparse = trainer.prepare(model, selector=selector, substrate="adapter" if cell.lora else "full")
    engine = parity.make_engine(cell, model, sparse)
    sparse.attach(engine, guard_every=guard_every)
    return engine


MODELS = {
    "jamba, no guard": lambda cell: jamba("all-linear"),
    "jamba": lambda cell: jamba("all-linear"),
    "jamba, its projections": lambda cell: jamba(["in_proj", "out_proj", "q_proj", "v_proj"]),
    "llama": lambda cell: tiny_llama().train(),
    "unused": unused,
    "experts": experts,
}


def _guarded(rank: int, cases: tuple[tuple[str, Cell], ...]) -> list[list[str]]:
    """Return what the guard said of each case: warnings, and the error that ended it."""
    answers = []
    for name, cell in cases:
        parity.build_model = MODELS[name]
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, said=said: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("trainer.engine.guard").addHandler(handler)
        engine = start(cell, guard_every=0 if "no guard" in name else 1)
        try:
            for step in range(cell.steps):
                parity.train_step(cell, engine, step, rank)
        except GuardError as error:
            said.append(f"step {step + 1}: {error}")
        logging.getLogger("trainer.engine.guard").removeHandler(handler)
        answers.append(said)
        engine.destroy()
    return answers


FULL = Cell(selector="all", steps=8)
LORA = replace(FULL, lora=2, interval=20)
CASES = (
    ("jamba", replace(LORA, stage=2)),
    ("jamba", replace(LORA, stage=3)),
    ("jamba, its projections", replace(LORA, stage=2)),
    ("unused", replace(FULL, stage=2)),
    ("unused", Cell(stage=3, interval=4, steps=12, offload=True)),
    ("experts", replace(FULL, stage=3)),
    ("llama", Cell(stage=2, interval=1, steps=6)),
)


@pytest.mark.slow
def test_what_no_gradient_reaches_is_named() -> None:
    first, second = distributed.run(_guarded, CASES, ranks=2)
    for answers in (first, second):
        for (said,) in answers[:2]:
            check_stopped(said)
        assert answers[2] == answers[5] == answers[6] == []
    assert second[3:5] == [[], []], "said once, by rank 0"
    (said,) = first[3]
    assert said.startswith("no gradient has reached model.layers.0.spare.weight, ") and "and 2 more" in said
    names = [name for said in first[4] for name in re.findall(r"[\w.]+\.weight", said)]
    assert "spare_head.weight" in names and "proj" not in " ".join(names)
    assert len(set(names)) == len(names) == 5, "four blocks have trained, and the head"


def check_stopped(said: str) -> None:
    assert said.startswith("step 3: the guard stopped training: no gradient has reached ")
    assert "layers.0.mamba.dt_proj.lora_" in said and "substrate.peft.exclude_modules" in said
    assert said.count("lora_A") + said.count("lora_B") == 2, "no other adapters"


def test_adapters_that_do_not_learn_stop_training_unless_the_guard_is_off() -> None:
    cell = replace(LORA, stage=2, ranks=1, steps=4)
    ((guarded, unguarded),) = distributed.run(_guarded, (("jamba", cell), ("jamba, no guard", cell)), ranks=1)
    check_stopped(*guarded)
    assert unguarded == []
