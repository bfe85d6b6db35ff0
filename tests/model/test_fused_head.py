"""trainer/model/fused_head.py: one decision on the fused loss, which plan, dry run and run share."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import distributed
from tests.models import COMMON, FAMILIES
from trainer.config import load
from trainer.model.fused_head import obstacle
from trainer.model.loss import LossError
from trainer.planner import Plan, Planner
from trainer.planner.watch import PeakWatch

VOCABULARY = 40_000
# BERT's decoder transforms what its blocks return before it comes to the head.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert.encoder.layer", {"is_decoder": True}),
    "cohere": ("model.layers", {"logit_scale": 0.25}),
    "granite": ("model.layers", {"logits_scaling": 8.0}),
}


def on_meta(family: str) -> tuple[Any, str]:
    path, fields = {**FAMILIES, **OTHERS}[family]
    with torch.device("meta"):
        config = AutoConfig.for_model(family, **{**COMMON, **fields, "vocab_size": VOCABULARY})
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager"), path


@pytest.mark.parametrize("family", [*FAMILIES, "cohere", "granite"])
def test_the_fused_head_fits(family: str) -> None:
    model, path = on_meta(family)
    blocks = len(model.get_submodule(path))
    state = torch.get_rng_state()
    assert obstacle(model, path) is None
    assert len(model.get_submodule(path)) == blocks and all(p.is_meta for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_head_that_it_does_not_know_is_found() -> None:
    assert obstacle(*on_meta("bert")) == "BertLMHeadModel changes its logits in a way that the fused head does not know"
    model, path = on_meta("granite")
    model.config.logits_scaling = 0.0  # the model has read its own; TRL divides by this one
    assert "the fused head does not fit GraniteForCausalLM (" in (obstacle(model, path) or "")


def plan(family: str, fused: str) -> Plan:
    return Planner(on_cpu=True).plan(config(family, fused), 2)


def config(family: str, fused: str) -> Any:
    _, more = OTHERS.get(family, ("", {}))
    fields = json.dumps({**COMMON, "model_type": family, "vocab_size": VOCABULARY, **more})
    settings = ["train.steps=10", "train.global_batch_size=4", "data.max_length=64", "data.train=none.jsonl"]
    own = [f"model.random={fields}", "model.dtype=fp32", f"train.fused_loss={fused}", "always_on.norm=true"]
    return load(None, [*settings, *own], check_files=False)


def test_the_plan_counts_on_the_loss_that_will_run() -> None:
    chosen, plain = plan("bert", "auto"), plan("bert", "false")
    assert not chosen.loss.fused and chosen.memory.moments == plain.memory.moments
    assert str(chosen.loss).startswith("loss: plain (train.fused_loss: auto, but BertLMHeadModel changes its logits")
    with pytest.raises(LossError, match="train.fused_loss: true, but BertLMHeadModel .*; set train.fused_loss=false"):
        plan("bert", "true")
    fused = plan("llama", "auto")
    assert fused.loss.fused and str(fused.loss) == "loss: fused with the output head (train.fused_loss: auto)"
    assert fused.memory.moments["loss"]["loss"] != plan("llama", "false").memory.moments["loss"]["loss"]


def _planned_anew(rank: int) -> None:
    wanted = Planner(on_cpu=True).plan(config("llama", "false"), 1).memory.peak
    watch = PeakWatch(config("llama", "auto"))
    before = watch._plan.memory.peak
    watch.start(fused=False)
    assert watch.result()[1]["planned_peak_bytes"] == wanted != before


def test_a_run_that_falls_back_is_planned_anew() -> None:
    distributed.run(_planned_anew, ranks=1)
