"""Adapters on a model: PEFT's configuration passed through, and every mistake named by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

import trainer
from tests.models import tiny_llama, tiny_model
from trainer.accounting import nf4_bytes
from trainer.adapters import AdapterError, adapt
from trainer.blocks import BlockError
from trainer.config.schema import AdapterSubstrate, ModelConfig
from trainer.data.tokenizer import bytes_tokenizer
from trainer.export import ExportError, _write_merged
from trainer.loss import LossError, choose_fused
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


def merged(model: PreTrainedModel, peft: dict[str, Any], folder: Path) -> tuple[PeftModel, PreTrainedModel]:
    """The model with adapters that do something, and what was written of both together."""
    adapted = adapt(model, substrate(peft=peft))
    with torch.no_grad():
        for parameter in adapted.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    weights = {name: tensor.clone() for name, tensor in adapted.model.state_dict().items()}
    _write_merged(adapted, weights, bytes_tokenizer(), folder)
    return adapted.model.eval(), AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"modules_to_save": ["norm"]}], ids=["lora", "dora", "saved"])
def test_a_merged_model_computes_what_base_and_adapter_do(tmp_path: Path, tied: bool, more: dict[str, Any]) -> None:
    before, after = merged(tiny_llama(tied=tied), {**LORA, **more}, tmp_path / "model")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(before(input_ids=ids).logits, after(input_ids=ids).logits, atol=1e-5)
    assert (after.get_input_embeddings().weight is after.get_output_embeddings().weight) == tied


def test_what_cannot_be_merged_is_said_with_the_adapter_s_place(tmp_path: Path) -> None:
    words = (
        "substrate.merge: PEFT cannot merge LORA into LlamaForCausalLM: .* written to .*adapter; set substrate.merge"
    )
    with pytest.raises(ExportError, match=words):
        merged(tiny_llama(), {**LORA, "lora_bias": True}, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("more", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapted_head_is_not_fused(more: dict[str, Any]) -> None:
    """The fused head would multiply with the base's weights, and the adapter would never learn."""
    model = tiny_llama(vocab=40_000)
    assert choose_fused("auto", model)
    adapt(model, substrate(peft={**LORA, **more}))
    assert not choose_fused("auto", model) and not choose_fused(False, model)
    with pytest.raises(
        LossError, match="train.fused_loss: true, but the output head is a .*set train.fused_loss=false"
    ):
        choose_fused(True, model)
