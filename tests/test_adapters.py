"""Adapters on a model: PEFT's configuration passed through, and every mistake named by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import trainer
from tests.models import tiny_llama, tiny_model
from trainer.accounting import nf4_bytes
from trainer.adapters import AdapterError, adapt
from trainer.blocks import BlockError
from trainer.config.schema import AdapterSubstrate, ModelConfig
from trainer.data.tokenizer import bytes_tokenizer
from trainer.model import load
from trainer.selectors import All

LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}


def substrate(**values: Any) -> AdapterSubstrate:
    return AdapterSubstrate(**values)


@pytest.mark.parametrize(
    "peft",
    [
        LORA,
        {**LORA, "use_dora": True},
        {**LORA, "use_rslora": True},
        {**LORA, "init_lora_weights": "pissa"},
        {"peft_type": "ia3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"peft_type": "LOHA", "r": 4, "target_modules": ["q_proj"]},
        {"peft_type": "LOKR", "r": 4, "target_modules": ["q_proj"]},
        {"peft_type": "OFT", "r": 2, "oft_block_size": 0, "target_modules": ["q_proj"]},
        {"peft_type": "BOFT", "boft_block_size": 4, "target_modules": ["q_proj"]},
        {"peft_type": "VERA", "r": 4, "target_modules": ["q_proj"]},
        {"peft_type": "LORA", "target_modules": "all-linear"},
    ],
    ids=lambda peft: "-".join(str(v) for k, v in peft.items() if k in ("peft_type", "init_lora_weights") or v is True),
)
@pytest.mark.parametrize("empty", [False, True])
def test_adapters_of_many_kinds_are_what_trains(peft: dict[str, Any], empty: bool) -> None:
    adapted = adapt(tiny_llama(dtype=torch.bfloat16), substrate(peft=peft), empty=empty)
    sparse = trainer.prepare(adapted.model, selector=All(), substrate="adapter")
    trained = {name for block in sparse.blocks for name in block.parameters}
    assert len(sparse.blocks) == 6 and trained and trained <= adapted.names
    assert all("base_layer" not in name for name in adapted.names)
    for block in sparse.blocks:
        for parameter in block.parameters.values():
            assert parameter.dtype == torch.bfloat16 and (parameter.device.type == "meta") == empty


def test_frozen_a_is_lora_fa() -> None:
    adapted = adapt(tiny_llama(), substrate(peft=LORA, frozen=["lora_A"]))
    trained = [name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 12 and all("lora_B" in name for name in trained)


def test_modules_to_save_are_always_on() -> None:
    adapted = adapt(tiny_llama(), substrate(peft={**LORA, "modules_to_save": ["lm_head"]}))
    sparse = trainer.prepare(adapted.model, selector=All(), substrate="adapter")
    assert list(sparse.always_on) == ["head"]


def test_an_adapter_goes_on_from_its_folder(tmp_path: Path) -> None:
    first = adapt(tiny_llama(), substrate(peft=LORA)).model
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.25)
    first.save_pretrained(tmp_path)
    second = adapt(tiny_llama(), substrate(adapter=str(tmp_path)))
    trained = [parameter for parameter in second.model.parameters() if parameter.requires_grad]
    assert len(trained) == 24 and all(bool((parameter == 0.25).all()) for parameter in trained)
    assert isinstance(second.model, PeftModel)
    empty = adapt(tiny_llama(), substrate(adapter=str(tmp_path)), empty=True)
    assert empty.names == second.names


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft": {"peft_type": "LORRA"}}, r"substrate.peft.peft_type: 'LORRA', did you mean 'LORA'\?; allowed: "),
        (
            {"peft": {**LORA, "target_modules": ["q_proj", "up_prj"]}},
            "up_prj match no module .* did you mean 'up_proj'",
        ),
        ({"peft": {**LORA, "rank": 8}}, "LORA takes no rank; rank: unknown"),
        ({"peft": {**LORA, "r": 0}}, "substrate.peft: PEFT refuses .*positive"),
        ({"peft": {**LORA, "target_modules": "nothing.*"}}, "substrate.peft: PEFT refuses .* not found in the base"),
        ({"peft": {"peft_type": "ADALORA", "target_modules": ["q_proj"]}}, "ADALORA cannot be trained here"),
        ({"peft": LORA, "frozen": ["lora_C"]}, "substrate.frozen: 'lora_C' is in no name of a trained weight"),
        ({"adapter": "/nowhere"}, "substrate.adapter: cannot load '/nowhere'"),
    ],
)
def test_mistakes_are_named_by_key(values: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        adapt(tiny_llama(), substrate(**values))


def test_the_published_targets_do_not_fit_every_architecture() -> None:
    with pytest.raises(
        AdapterError, match="q_proj, v_proj match no module of GPT2LMHeadModel, .* modules there: .*c_attn"
    ):
        adapt(tiny_model("gpt2"), substrate(peft=LORA))


def test_prompts_are_in_no_block() -> None:
    adapted = adapt(tiny_llama(), substrate(peft={"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}))
    with pytest.raises(BlockError, match="has no parameters to train under substrate 'adapter'"):
        trainer.prepare(adapted.model, selector=All(), substrate="adapter")


def test_adapters_in_some_blocks_only_are_refused() -> None:
    adapted = adapt(tiny_llama(), substrate(peft={**LORA, "layers_to_transform": [0, 1]}))
    with pytest.raises(BlockError, match="model.layers.2 has no parameters to train .* every block needs some"):
        trainer.prepare(adapted.model, selector=All(), substrate="adapter")


def test_bytes_of_a_base_in_four_bits(tmp_path: Path) -> None:
    """The formula of the dry run against what bitsandbytes holds."""
    tiny_llama(layers=2, hidden=64, vocab=261).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), tokenizer="bytes", dtype="bf16", quantization="nf4")
    model = load(config, bytes_tokenizer(), seed=0, deepspeed={"zero_optimization": {"stage": 2}})
    packed = [p for p in model.parameters() if hasattr(p, "quant_state")]
    assert len(packed) == 2 * 7
    for parameter in packed:
        state = parameter.quant_state
        held = [parameter.data, state.absmax, state.state2.absmax]
        numel = state.shape[0] * state.shape[1]
        assert sum(t.numel() * t.element_size() for t in held) == nf4_bytes(numel) < 0.53 * numel
