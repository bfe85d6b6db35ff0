"""Turning down what a block adds: exact, for any PEFT method, and undone whatever happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from tests.models import tiny_llama, tiny_model
from trainer.engine.suppression import suppressed_adapters, suppressed_residuals

IDS = torch.arange(12)[None] * 5 % 64
LINEAR = ["q_proj", "v_proj", "down_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "target_modules": LINEAR, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 32}},
    "LOHA": {"r": 4, "target_modules": LINEAR},
    "LOKR": {"r": 4, "target_modules": LINEAR},
    "IA3": {"target_modules": LINEAR, "feedforward_modules": ["down_proj"]},
    "OFT": {"r": 2, "oft_block_size": 0, "target_modules": LINEAR},
    "BOFT": {"boft_block_size": 4, "target_modules": LINEAR},
    "VERA": {"r": 4, "target_modules": ["q_proj", "o_proj"]},
}


def adapted(method: str, **more: Any) -> Any:
    """Build a Llama of six blocks with adapters that do something."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[method](task_type="CAUSAL_LM", **METHODS[method], **more)
    model = get_peft_model(tiny_llama(), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def blocks(model: Any, *chosen: int) -> list[torch.nn.Module]:
    layers = model.get_base_model().model.layers
    return [layers[i] for i in chosen or range(len(layers))]


@pytest.mark.parametrize("method", METHODS)
def test_adapters_turned_off_on_and_half_way(method: str) -> None:
    model = adapted(method)
    full = logits(model)
    with model.disable_adapter():
        bare = logits(model)
    assert (full - bare).abs().max() > 1e-3, "adapters that do nothing show nothing"
    with suppressed_adapters(blocks(model), 0.0):
        assert torch.allclose(logits(model), bare, atol=1e-5)
    with suppressed_adapters(blocks(model), 1.0):
        assert torch.allclose(logits(model), full, atol=1e-6)
    with suppressed_adapters(blocks(model), 0.25):
        quarter = logits(model)
    assert (quarter - bare).abs().max() > 1e-4 and (quarter - full).abs().max() > 1e-4
    with suppressed_adapters(blocks(model, 2), 0.0):
        one_off = logits(model)
    assert (one_off - bare).abs().max() > 1e-4 and (one_off - full).abs().max() > 1e-5
    assert torch.equal(logits(model), full), "undone"


def test_adapters_of_stacked_experts_are_turned_down_too() -> None:
    """LoRA of parameters: a quarter of its scaling adds a quarter of its product to them."""
    torch.manual_seed(0)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
    model = get_peft_model(tiny_model("mixtral"), config).eval()
    full = logits(model)
    with model.disable_adapter():
        bare = logits(model)
    with suppressed_adapters(blocks(model), 0.0):
        assert torch.allclose(logits(model), bare, atol=1e-5)
    with suppressed_adapters(blocks(model), 0.25):
        found = logits(model)
    assert torch.equal(logits(model), full), "undone"
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling = {name: value / 4 for name, value in module.scaling.items()}
    assert torch.allclose(found, logits(model), atol=1e-6)
    assert min(float((found - other).abs().max()) for other in (full, bare)) > 1e-4


@pytest.mark.parametrize("method", ["LOHA", "LOKR", "IA3", "OFT", "BOFT", "VERA"])
def test_a_layer_without_lora_s_scaling_gives_a_blend(method: str) -> None:
    """One quarter with the adapter, three quarters without."""
    model = adapted(method)
    layer = blocks(model, 0)[0].self_attn.q_proj
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = 0.75 * layer.get_base_layer()(x) + 0.25 * layer(x)
        with suppressed_adapters(blocks(model, 0), 0.25):
            found = layer(x)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("method", ["LORA", "IA3"])
def test_it_is_undone_when_a_probe_raises(method: str) -> None:
    model = adapted(method)
    full = logits(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), suppressed_adapters(blocks(model), 0.25):
        raise ZeroDivisionError
    assert torch.equal(logits(model), full)
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_lora_is_scaled_by_adapter_name_and_patterns_stay() -> None:
    model = adapted("LORA")
    model.add_adapter("second", model.peft_config["default"])
    layer = blocks(model, 0)[0].self_attn.q_proj
    other = blocks(model, 0)[0].self_attn.v_proj
    before = (dict(layer.scaling), dict(other.scaling))
    assert before == ({"default": 8.0, "second": 8.0}, {"default": 4.0, "second": 4.0})
    with suppressed_adapters(blocks(model, 0), 0.25):
        assert (layer.scaling, other.scaling) == ({"default": 2.0, "second": 2.0}, {"default": 1.0, "second": 1.0})
        assert blocks(model, 1)[0].self_attn.q_proj.scaling == before[0]
    assert (layer.scaling, other.scaling) == before


def test_dora_loses_the_direction_of_its_adapter() -> None:
    """DoRA, arXiv 2402.09353, eq. 5: m V / |V| with V = W + s B A; the factor goes into s."""
    model = adapted("LORA", use_dora=True)
    layer = blocks(model, 0)[0].self_attn.q_proj
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(2))
    direction = (
        layer.weight + 0.25 * layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    magnitude = layer.lora_magnitude_vector["default"].weight
    expected = x @ (magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)).T
    with suppressed_adapters(blocks(model, 0), 0.25), torch.no_grad():
        found = layer(x)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
def test_a_residual_is_scaled_by_the_factor(factor: float) -> None:
    model = tiny_llama().eval()
    passed: list[Tensor] = []

    def remember(module: torch.nn.Module, args: Any, output: Tensor) -> None:
        passed.extend([args[0], output])

    handle = model.model.layers[2].register_forward_hook(remember)
    full = logits(model)
    before, after = passed
    handle.remove()
    handle = model.model.layers[3].register_forward_hook(lambda module, args, output: passed.append(args[0]))
    with suppressed_residuals([model.model.layers[2]], factor):
        logits(model)
    handle.remove()
    assert torch.allclose(passed[-1], before + factor * (after - before), atol=1e-6)
    with pytest.raises(ZeroDivisionError), suppressed_residuals([model.model.layers[2]], factor):
        raise ZeroDivisionError
    assert torch.equal(logits(model), full), "undone"
