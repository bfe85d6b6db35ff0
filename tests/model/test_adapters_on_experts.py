"""Adapters on mixtures whose experts are stacked in parameters, and on models with routers of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from tests.models import tiny_model
from trainer.config.schema import AdapterSubstrate
from trainer.model.adapter_checks import AdapterError
from trainer.model.adapters import adapt

STACKED = {"num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4, "output_router_logits": False}
LLAMA_4 = {**STACKED, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "head_dim": 8}
ALL_LINEAR = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}


def layer_names(names: Iterable[str]) -> set[str]:
    """Return what adapters are on, of all blocks together."""
    return {name.split(".layers.")[1].split(".", 1)[1].split(".lora_")[0] for name in names if ".layers." in name}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_all_linear_is_stacked_experts_too(family: str) -> None:
    """In a dry run as in a run: PEFT turns it into parameters, with ranks of its own for two in one."""
    empty, made = (
        adapt(tiny_model(family, **STACKED), AdapterSubstrate(peft=ALL_LINEAR), empty=e) for e in (True, False)
    )
    assert empty.names == made.names
    on = layer_names(made.names)
    assert on == {*(f"self_attn.{n}_proj" for n in "qkvo"), "mlp.gate", "mlp.experts", "mlp.experts.base_layer"}


@pytest.mark.parametrize(
    ("family", "fields", "router"),
    [("llama4_text", LLAMA_4, "feed_forward.router"), ("phimoe", STACKED, "mlp.router")],
)
def test_routers_that_return_more_than_one_tensor_get_no_adapter(
    family: str, fields: dict[str, Any], router: str
) -> None:
    model = adapt(tiny_model(family, **fields), AdapterSubstrate(peft=ALL_LINEAR)).model
    assert router not in layer_names(name for name, _ in model.named_parameters() if "lora_" in name)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    for targets in (["q_proj", "router"], ".*(q_proj|router)"):
        with pytest.raises(AdapterError, match=rf"layers.0.{router} is a .*Router, which returns more than one tensor"):
            adapt(tiny_model(family, **fields), AdapterSubstrate(peft={**ALL_LINEAR, "target_modules": targets}))


@pytest.mark.parametrize("excluded", [["q_proj"], ".*q_proj"])
def test_what_the_user_excludes_stays_excluded_beside_routers(excluded: Any) -> None:
    peft = {**ALL_LINEAR, "exclude_modules": excluded}
    on = layer_names(adapt(tiny_model("phimoe", **STACKED), AdapterSubstrate(peft=peft)).names)
    assert on == {f"self_attn.{n}_proj" for n in "kvo"}


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize(
    ("family", "peft", "words"),
    [
        ("mixtral", {"lora_dropout": 0.1}, "does not work with lora_dropout != 0.; set substrate.peft.lora_dropout=0$"),
        ("mixtral", {"target_modules": ["w1", "w2"]}, "PEFT refuses .* w1 without also targeting w3"),
        ("phimoe", {"target_modules": ["gate_proj"]}, r"target_parameters: \[down_proj, gate_up_proj\]$"),
        ("mixtral", {"rank_pattern": {"gate_down_proj": 2}}, "rank_pattern: gate_down_proj match nothing"),
    ],
)
def test_mistakes_on_experts_are_named(family: str, peft: dict[str, Any], words: str, empty: bool) -> None:
    with pytest.raises(AdapterError, match=words):
        adapt(tiny_model(family, **STACKED), AdapterSubstrate(peft={**ALL_LINEAR, **peft}), empty=empty)


def test_names_that_experts_had_as_modules_are_their_parameters() -> None:
    peft = {**ALL_LINEAR, "target_modules": ["q_proj", "w1", "w2", "w3"], "rank_pattern": {"down_proj": 2}}
    adapted = adapt(tiny_model("mixtral"), AdapterSubstrate(peft=peft))
    assert layer_names(adapted.names) == {"self_attn.q_proj", "mlp.experts", "mlp.experts.base_layer"}
