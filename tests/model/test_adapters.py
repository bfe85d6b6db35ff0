"""Adapters on a model: PEFT's configuration passed through, and every mistake named by key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import trainer
import trainer.config
from tests.launching import write_inputs
from tests.models import tiny_llama, tiny_model
from trainer.accounting import nf4_bytes
from trainer.config.schema import AdapterSubstrate, FullSubstrate, ModelConfig
from trainer.data.tokenizer import bytes_tokenizer
from trainer.export.from_engine import ExportError, write_adapter, write_merged
from trainer.model.adapter_checks import AdapterError, check_saved
from trainer.model.adapters import Adapted, adapt, choose_merge, merged, reads_base
from trainer.model.blocks import BlockError
from trainer.model.load import load
from trainer.model.loss import LossError, choose_fused
from trainer.selectors import All, Importance

LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}


def substrate(**values: Any) -> AdapterSubstrate:
    return AdapterSubstrate(**values)


def test_what_begins_with_the_base_s_weights_is_known() -> None:
    """If so, the base is loaded on the host; everything else directly onto the device."""
    for more in ({"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}):
        assert reads_base(substrate(peft=LORA | more))
    assert not any(map(reads_base, (FullSubstrate(), substrate(peft=LORA), substrate(adapter="/some/adapter"))))


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
    environment = dict(os.environ)
    adapted = adapt(tiny_llama(dtype=torch.bfloat16), substrate(peft=peft), empty=empty)
    sparse = trainer.prepare(adapted.model, selector=All(), substrate="adapter")
    trained = {name for block in sparse.blocks for name in block.parameters}
    assert len(sparse.blocks) == 6 and trained and trained <= adapted.names
    assert all("base_layer" not in name for name in adapted.names)
    for block in sparse.blocks:
        for parameter in block.parameters.values():
            assert parameter.dtype == torch.bfloat16 and (parameter.device.type == "meta") == empty
    assert dict(os.environ) == environment  # BOFT tries to compile, by another compiler


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
        ({"peft": {**LORA, "r": "eight"}}, "substrate.peft.r: got 'eight'; allowed: int"),
        ({"peft": {**LORA, "r": True}}, "substrate.peft.r: got True; allowed: int"),
        ({"peft": {**LORA, "use_dora": "no"}}, "substrate.peft.use_dora: got 'no'; allowed: bool"),
        ({"peft": {**LORA, "bias": "some"}}, r"substrate.peft.bias: got 'some'; allowed: 'none' \| 'all'"),
        ({"peft": {**LORA, "lora_dropout": -0.1}}, "substrate.peft.lora_dropout: got -0.1; allowed: 0 to below 1"),
        ({"peft": {**LORA, "lora_alpha": 0}}, "substrate.peft.lora_alpha: got 0; allowed: above 0"),
        ({"peft": {**LORA, "task_type": "SEQ_CLS"}}, "substrate.peft.task_type: got 'SEQ_CLS'; allowed: CAUSAL_LM"),
        ({"peft": {**LORA, "inference_mode": True}}, "substrate.peft.inference_mode: got True; allowed: false"),
        ({"peft": {**LORA, "target_modules": "*.q_proj"}}, r"target_modules: '\*.q_proj' is no regular expression"),
        ({"peft": {**LORA, "rank_pattern": {"*.q_proj": 2}}}, r"rank_pattern: '\*.q_proj' is no regular expression"),
        ({"peft": {**LORA, "target_modules": "q_proj"}}, r"q_proj match nothing in .*; write \[q_proj\] for a name"),
        ({"peft": {**LORA, "rank_pattern": {"k_proj": 2}}}, "rank_pattern: k_proj match nothing"),
        ({"peft": LORA, "frozen": ["lora"]}, "substrate.frozen: lora leaves nothing to train"),
        (
            {"peft": {**LORA, "target_modules": ["q_proj", None]}},
            r"substrate.peft.target_modules: got \['q_proj', None",
        ),
        ({"peft": {**LORA, "modules_to_save": "lm_head"}}, "substrate.peft.modules_to_save: got 'lm_head'; allowed: "),
        ({"peft": {**LORA, "modules_to_save": ["lm_hed"]}}, "modules_to_save: lm_hed match nothing .* mean 'lm_head'"),
        ({"peft": {**LORA, "exclude_modules": ["q_prj"]}}, "exclude_modules: q_prj match nothing .* mean 'q_proj'"),
        ({"peft": {**LORA, "rank_pattern": {"q_porj": 2}}}, "rank_pattern: q_porj match nothing .* mean 'q_proj'"),
        ({"peft": {**LORA, "target_parameters": ["gate"]}}, "target_parameters: gate match nothing"),
        ({"peft": {**LORA, "trainable_token_indices": [64]}}, "trainable_token_indices: got 64; allowed: 0 to 63"),
        (
            {"peft": {**LORA, "init_lora_weights": "pissa_niter_4"}},
            "init_lora_weights: 'pissa_niter_4' needs more than",
        ),
        ({"peft": {**LORA, "init_lora_weights": "eva"}}, "init_lora_weights: 'eva' needs more than the base"),
        (
            {"peft": {"peft_type": "IA3", "target_modules": ["q_proj"]}},
            "substrate.peft: PEFT refuses IA3 on LlamaForCausalLM: .*feedforward_modules",
        ),
        ({"peft": {"peft_type": "LORRA"}}, r"substrate.peft.peft_type: 'LORRA', did you mean 'LORA'\?; allowed: "),
        (
            {"peft": {**LORA, "target_modules": ["q_proj", "up_prj"]}},
            "up_prj match nothing in .* did you mean 'up_proj'",
        ),
        ({"peft": {**LORA, "rank": 8}}, "LORA takes no rank; rank: unknown"),
        ({"peft": {**LORA, "r": 0}}, "substrate.peft: PEFT refuses .*positive"),
        (
            {"peft": {**LORA, "target_modules": "nothing.*"}},
            r"target_modules: nothing.\* match nothing in Llama.* q_proj",
        ),
        ({"peft": {"peft_type": "ADALORA", "target_modules": ["q_proj"]}}, "ADALORA cannot be trained here"),
        (
            {"peft": {**LORA, "megatron_config": {"x": 1}, "megatron_core": "this.module"}},
            "substrate.peft.megatron_config: PEFT would import 'this.module' for it; allowed: null",
        ),
        (
            {"peft": {"peft_type": "XLORA", "adapters": {"a": "owner/name"}, "hidden_size": 32}},
            "XLORA cannot be trained here: it loads the other adapters",
        ),
        ({"peft": LORA, "frozen": ["lora_C"]}, "substrate.frozen: 'lora_C' is in no name of a trained weight"),
        ({"adapter": "/nowhere"}, "substrate.adapter: cannot load '/nowhere': no adapter_config.json there"),
    ],
)
@pytest.mark.parametrize("empty", [False, True])
def test_mistakes_are_named_by_key(values: dict[str, Any], words: str, empty: bool) -> None:
    with pytest.raises(AdapterError, match=words):
        adapt(tiny_llama(), substrate(**values), empty=empty)


def test_the_published_targets_do_not_fit_every_architecture() -> None:
    with pytest.raises(AdapterError, match="q_proj, v_proj match nothing in GPT2LMHeadModel, .* names there: .*c_attn"):
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
    """Compare the formula of the dry run with what bitsandbytes stores."""
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
    peft = {**LORA, "target_modules": ["q_proj", "down_proj"]}
    assert len(adapt(model, substrate(peft=peft), quantization="nf4").names) == 2 * 2 * 2


def trained(model: PreTrainedModel, peft: dict[str, Any]) -> Adapted:
    """Return the model with adapters that do something."""
    adapted = adapt(model, substrate(peft=peft))
    with torch.no_grad():
        for parameter in adapted.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    adapted.model.eval()
    return adapted


def state(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def gathered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def written_merged(model: PreTrainedModel, peft: dict[str, Any], folder: Path) -> tuple[PeftModel, PreTrainedModel]:
    """Return the model with adapters that do something, and what was written of both together."""
    adapted = trained(model, peft)
    write_merged(adapted, gathered, bytes_tokenizer(), folder)
    return adapted.model, AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None]).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"modules_to_save": ["norm"]}], ids=["lora", "dora", "saved"])
def test_a_merged_model_computes_what_base_and_adapter_do(tmp_path: Path, tied: bool, more: dict[str, Any]) -> None:
    before, after = written_merged(tiny_llama(tied=tied), {**LORA, **more}, tmp_path / "model")
    assert torch.allclose(logits(before), logits(after), atol=1e-5)
    assert (after.get_input_embeddings().weight is after.get_output_embeddings().weight) == tied


def test_what_cannot_be_merged_is_said_with_the_adapter_s_place(tmp_path: Path) -> None:
    words = (
        "substrate.merge: PEFT cannot merge LORA into LlamaForCausalLM: .* written to .*adapter; set substrate.merge"
    )
    with pytest.raises(ExportError, match=words):
        written_merged(tiny_llama(), {**LORA, "lora_bias": True}, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_merge_takes_buffers_that_are_never_saved(tmp_path: Path) -> None:
    """RandLoRA's projections come from a seed and from how many numbers were drawn before."""
    peft = {"peft_type": "RANDLORA", "r": 4, "target_modules": ["q_proj", "v_proj"], "save_projection": False}
    before, after = written_merged(tiny_llama(), peft, tmp_path / "model")
    assert torch.allclose(logits(before), logits(after), atol=1e-5)


@pytest.mark.parametrize("wanted", [True, "auto"])
def test_a_merge_that_cannot_be_is_known_before_training(tmp_path: Path, wanted: Any) -> None:
    write_inputs(tmp_path)
    values = ["method=lora", "substrate.peft.lora_bias=true", f"substrate.merge={wanted}"]
    config = trainer.config.load(str(tmp_path / "tiny.yaml"), values)
    assert config.merges
    for empty in (False, True):
        adapted = adapt(tiny_llama(), config.substrate, empty=empty)
        if wanted is True:
            with pytest.raises(AdapterError, match="substrate.merge: true, but PEFT cannot merge LORA into Llama"):
                choose_merge(config, adapted)
        else:
            merge, (line,) = choose_merge(config, adapted)
            assert not merge and line.startswith("WARNING: no model/ will be written beside adapter/: PEFT cannot")
    assert choose_merge(trainer.config.load(str(tmp_path / "tiny.yaml"), ["method=lora"]), None) == (False, [])
    assert all(tensor.is_meta for tensor in merged(adapt(tiny_llama(), substrate(peft=LORA))).parameters())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_train_are_saved_with_the_adapter(tmp_path: Path, bias: str) -> None:
    adapted = trained(tiny_model("gpt2"), {"peft_type": "LORA", "r": 4, "target_modules": ["c_attn"], "bias": bias})
    saved = {name: tensor for name, tensor in state(adapted.model).items() if name in adapted.names}
    assert any(name.endswith("c_attn.base_layer.bias") for name in saved)
    assert any("ln_1.bias" in name for name in saved) == (bias == "all")
    write_adapter(adapted.model, saved, tmp_path / "adapter")
    opened = PeftModel.from_pretrained(tiny_model("gpt2"), str(tmp_path / "adapter")).eval()
    assert torch.allclose(logits(opened), logits(adapted.model), atol=1e-6)
    again = adapt(tiny_model("gpt2"), substrate(adapter=str(tmp_path / "adapter")))
    assert torch.allclose(logits(again.model.eval()), logits(adapted.model), atol=1e-6) and again.names == adapted.names


def test_what_trains_and_would_not_be_saved_is_refused() -> None:
    adapted = adapt(tiny_llama(), substrate(peft=LORA))
    lost = next(name for name in adapted.names if "lora_A" in name)
    with pytest.raises(AdapterError, match=f"1 of the weights that this trains, for instance {lost}, would not be in"):
        check_saved(adapted.model, adapted.names - {lost}, "substrate.peft")


@pytest.mark.parametrize(
    ("made", "opened", "words"),
    [
        ({"layers": 6}, {"layers": 8}, "lacks 8 weights of its adapters on this LlamaForCausalLM, for instance .*[67]"),
        ({"layers": 6}, {"layers": 4}, "has 8 weights that its adapters do not have on this LlamaForCausalLM"),
        ({"hidden": 32}, {"hidden": 64}, r"has 24 weights of other shapes, .*: \[4, 32\] instead of \[4, 64\]"),
    ],
)
@pytest.mark.parametrize("empty", [False, True])
def test_an_adapter_of_another_base_is_refused(
    tmp_path: Path, made: dict[str, int], opened: dict[str, int], words: str, empty: bool
) -> None:
    adapt(tiny_llama(**made), substrate(peft=LORA)).model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=f"substrate.adapter: '{tmp_path}' {words}"):
        adapt(tiny_llama(**opened), substrate(adapter=str(tmp_path)), empty=empty)


def test_an_adapter_that_lost_something_is_refused(tmp_path: Path) -> None:
    adapt(tiny_llama(), substrate(peft=LORA)).model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights.pop(next(name for name in weights if "layers.3.self_attn.v_proj.lora_B" in name))
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"lacks 1 weights .*layers.3.self_attn.v_proj.lora_B"):
        adapt(tiny_llama(), substrate(adapter=str(tmp_path)))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(AdapterError, match=f"substrate.adapter: cannot load '{tmp_path}': "):
        adapt(tiny_llama(), substrate(adapter=str(tmp_path)))
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"LORRA"'))
    with pytest.raises(AdapterError, match=f"substrate.adapter: cannot load '{tmp_path}': KeyError: 'LORRA'"):
        adapt(tiny_llama(), substrate(adapter=str(tmp_path)))


def test_another_base_than_the_one_it_was_trained_on_is_said(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny_llama().save_pretrained(tmp_path / name)
    first, same, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "aab")
    adapt(first, substrate(peft=LORA)).model.save_pretrained(tmp_path / "adapter")
    assert adapt(same, substrate(adapter=str(tmp_path / "adapter"))).warnings == ()
    (line,) = adapt(other, substrate(adapter=str(tmp_path / "adapter"))).warnings
    assert f"was trained on {tmp_path / 'a'}, and model.path is {tmp_path / 'b'}" in line


def test_a_model_that_has_adapters_already_is_refused() -> None:
    model = adapt(tiny_llama(), substrate(peft=LORA)).model
    with pytest.raises(AdapterError, match="comes with adapters: set model.path to their base, and substrate.adapter"):
        adapt(model.get_base_model(), substrate(peft=LORA))
    with pytest.raises(ValueError, match="this model has adapters: pass substrate='adapter'"):
        trainer.prepare(model, selector=All())


@pytest.mark.parametrize(
    "more",
    [
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 5]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_tied_models_may_train_one_end_of_the_tie(tmp_path: Path, more: dict[str, Any]) -> None:
    adapted = trained(tiny_llama(tied=True), {**LORA, **more})
    sparse = trainer.prepare(adapted.model, selector=All(), substrate="adapter")
    assert sparse.always_on
    saved = {name: tensor for name, tensor in state(adapted.model).items() if name in adapted.names}
    write_adapter(adapted.model, saved, tmp_path / "adapter")
    opened = PeftModel.from_pretrained(tiny_llama(tied=True), str(tmp_path / "adapter")).eval()
    assert torch.allclose(logits(opened), logits(adapted.model), atol=1e-5)
    write_merged(adapted, gathered, bytes_tokenizer(), tmp_path / "model")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.allclose(logits(after), logits(adapted.model), atol=1e-5)


@pytest.mark.parametrize(
    ("peft", "beside"),
    [
        ({**LORA, "modules_to_save": ["input_layernorm"]}, "input_layernorm.modules_to_save"),
        ({"peft_type": "ADAPTION_PROMPT", "adapter_layers": 6, "adapter_len": 4}, "adaption_"),
    ],
)
def test_importance_wants_to_be_able_to_suppress_what_trains(peft: dict[str, Any], beside: str) -> None:
    model = adapt(tiny_llama(), substrate(peft=peft)).model
    with pytest.raises(ValueError, match=f"importance suppresses adapters, and .*{beside}.* is in none of them"):
        trainer.prepare(model, selector=Importance(active_share=0.5), substrate="adapter")


def test_adapters_of_parameters_can_be_suppressed() -> None:
    """Use experts that are stacked in one parameter."""
    peft = {"peft_type": "LORA", "r": 2, "target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
    model = adapt(tiny_model("mixtral"), substrate(peft=peft)).model
    trainer.prepare(model, selector=Importance(active_share=0.5), substrate="adapter")


def test_four_bits_take_lora_only() -> None:
    with pytest.raises(
        AdapterError, match=r"IA3 on a base in four bits \(model.quantization=nf4\); allowed there: LORA"
    ):
        adapt(
            tiny_llama(),
            substrate(peft={"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}),
            quantization="nf4",
        )


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal"])
def test_initialisations_that_compute_with_the_base_are_not_for_four_bits(start: str) -> None:
    with pytest.raises(
        AdapterError, match=f"init_lora_weights: '{start}' computes with the whole weights; allowed: true"
    ):
        adapt(tiny_llama(), substrate(peft={**LORA, "init_lora_weights": start}), quantization="nf4")


def test_an_adapter_on_the_head_as_peft_saves_it_is_gone_on_with(tmp_path: Path) -> None:
    """Accept the base's own weights in the file; refuse others."""
    peft = {**LORA, "target_modules": ["q_proj", "lm_head"]}
    adapt(tiny_llama(), substrate(peft=peft)).model.save_pretrained(tmp_path)
    (name,) = (name for name in load_file(tmp_path / "adapter_model.safetensors") if "base_layer" in name)
    assert adapt(tiny_llama(), substrate(adapter=str(tmp_path))).model.get_base_model().lm_head.lora_A
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file({**weights, name: weights[name] + 1}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=f"has 1 weights that its adapters do not have .* {name}"):
        adapt(tiny_llama(), substrate(adapter=str(tmp_path)))


def test_blocks_are_named_as_the_model_names_them() -> None:
    model = adapt(tiny_llama(), substrate(peft=LORA)).model
    sparse = trainer.prepare(model, selector=All(), substrate="adapter", blocks="model.layers")
    assert sparse.structure.path == "base_model.model.model.layers"


def test_the_fused_head_would_miss_adapters_but_takes_another_head() -> None:
    """The fused loss multiplies with the head's weights, and adapters on it would never learn."""
    model = tiny_llama(vocab=40_000)
    assert choose_fused("auto", model).fused
    adapt(model, substrate(peft={**LORA, "modules_to_save": ["lm_head"]}))
    assert choose_fused("auto", model).fused
    model = tiny_llama(vocab=40_000)
    adapt(model, substrate(peft={**LORA, "target_modules": ["q_proj", "lm_head"]}))
    assert not choose_fused("auto", model).fused and not choose_fused(False, model).fused
    with pytest.raises(
        LossError, match="train.fused_loss: true, but adapters sit on the output head .*fused_loss=false"
    ):
        choose_fused(True, model)
