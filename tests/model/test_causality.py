"""trainer/model/causality.py: what models see, found by gradient; and the check leaves no trace in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests import distributed
from tests.engine.parity import Cell, full_weights, start, train_step
from tests.models import COMMON, FAMILIES, tiny_llama, tiny_model
from trainer.model.causality import check_causal
from trainer.model.loss import LossError

# Beside tests.models.FAMILIES: encoders, decoders without their encoder, and states instead of attention.
_MAMBA = {"mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_head": 8}
OTHERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "electra": {"embedding_size": 32},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, **_MAMBA},
    "trocr": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
}


def build(kind: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**COMMON, "num_hidden_layers": 2, **OTHERS.get(kind, {}), **fields})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()


def check(model: nn.Module, *, packed: bool = False) -> None:
    check_causal(model, packed=packed, key="model.random", device="cpu")


# --- the future ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FAMILIES, "mamba2", "falcon_h1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoders_pass(kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(kind) if kind in FAMILIES else build(kind)
    check(model.to(dtype).train())


@pytest.mark.parametrize("kind", ["bert", "electra", "xlm"])
def test_encoders_are_refused(kind: str) -> None:
    with pytest.raises(LossError, match=r"model\.random: \w+ sees tokens that come later.* is_decoder: true"):
        check(build(kind))


def test_an_encoder_that_is_made_a_decoder_passes() -> None:
    check(build("bert", is_decoder=True))


class Leaks(nn.Module):
    """A Llama whose positions see a little of the last token's embedding."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.model = tiny_llama(layers=1)
        self.config = self.model.config
        self.model.model.layers[0].register_forward_pre_hook(
            lambda layer, args: (args[0] + share * args[0][:, -1:], *args[1:])
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [1.0, 1e-6])
def test_the_smallest_leak_is_found(share: float, dtype: torch.dtype) -> None:
    with pytest.raises(LossError, match="Leaks sees tokens that come later"):
        check(Leaks(share).to(dtype))
    check(Leaks(0.0).to(dtype))


def test_a_gradient_that_is_not_a_number_is_not_zero() -> None:
    model = Leaks(0.0)
    model.model.model.layers[0].register_forward_pre_hook(lambda layer, args: (_Poison.apply(args[0]), *args[1:]))
    with pytest.raises(LossError, match="sees tokens that come later"):
        check(model)


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * float("nan")


class Hides(nn.Module):
    """Embeds its tokens by another table than the one that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.named = tiny_llama(layers=1), nn.Embedding(64, 32)
        self.config = self.model.config

    def get_input_embeddings(self) -> nn.Module:
        return self.named

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)


def test_a_model_that_cannot_be_looked_into_is_refused() -> None:
    with pytest.raises(LossError, match="Hides sees tokens that come later cannot be checked"):
        check(Hides())


@pytest.mark.parametrize("fields", [{}, {"add_cross_attention": True, "is_decoder": True}], ids=["trocr", "bert"])
def test_cross_attention_without_an_encoder_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(LossError, match=r"attends to the output of an encoder \(.*layers?\.0\.\w+\), and there is"):
        check(build("bert" if fields else "trocr", **fields))


# --- packed samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gemma2", "gpt2", "mixtral"])
def test_attention_keeps_packed_samples_apart(kind: str) -> None:
    check(tiny_model(kind).train(), packed=True)


@pytest.mark.parametrize("kind", ["falcon_h1", "mamba2", "opt"])
def test_samples_that_see_each_other_are_refused(kind: str) -> None:
    """Falcon-H1's attention keeps them apart; its convolutions and states do not."""
    model = tiny_model(kind).train() if kind in FAMILIES else build(kind)
    check(model)
    with pytest.raises(LossError, match=r"data\.packing: true, but \w+ lets packed samples see each other"):
        check(model, packed=True)


class SeesTheNext(nn.Module):
    """A packed sample sees the sample after it, which a causal mask alone would hide."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama(layers=1)
        self.config = self.model.config

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Any:
        hidden = self.get_input_embeddings()(input_ids)
        hidden = hidden + 1e-3 * hidden.roll(-20, dims=1)
        return self.model(inputs_embeds=hidden, position_ids=position_ids)


def test_both_directions_are_looked_at() -> None:
    with pytest.raises(LossError, match="lets packed samples see each other"):
        check(SeesTheNext(), packed=True)


def test_a_model_without_position_ids_cannot_be_packed() -> None:
    class Plain(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids

    with pytest.raises(LossError, match="data.packing: true, but Plain takes no position ids"):
        check(Plain(), packed=True)


# --- no trace ------------------------------------------------------------------------------------------------------

CELLS = (
    Cell(stage=2, steps=4, interval=2),
    Cell(stage=3, steps=4, interval=2, checkpointing=True, always_on=("norm",)),
    Cell(stage=3, steps=4, interval=2, lora=2, checkpointing=True, bank="cpu"),
    Cell(stage=3, steps=4, interval=2, offload=True, family="mixtral"),
)


def _trained(rank: int, cell: Cell, *, checked: bool) -> dict[str, Tensor]:
    engine, sparse = start(cell, rank)
    torch.manual_seed(5 + rank)
    if checked:
        state = torch.get_rng_state()
        modes = [module.training for module in engine.module.modules()]
        gradients = [p.grad for p in engine.module.parameters()]
        with sparse.inspecting():
            check_causal(engine.module, packed=False, key="model.random", device=engine.device)
            if cell.family is None:
                check_causal(engine.module, packed=True, key="model.random", device=engine.device)
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in engine.module.modules()] == modes
        now = [p.grad for p in engine.module.parameters()]
        assert all(a is b for a, b in zip(now, gradients, strict=True)), [type(g) for g in gradients]
        if cell.stage == 3:
            assert not sparse._attached().registration.fetch_order()
            assert all(p.numel() == 0 for p in engine.module.parameters()), "all partitioned again"
    orders = []
    for step in range(cell.steps):
        train_step(cell, engine, step, rank)
        orders.append(len(sparse._attached().registration.fetch_order()))
    weights = full_weights(engine) | {"orders": torch.tensor(orders)}
    engine.destroy()
    return weights


def _untouched(rank: int) -> list[bool]:
    found = []
    for cell in CELLS:
        plain, checked = (_trained(rank, cell, checked=checked) for checked in (False, True))
        found.append(all(torch.equal(plain[name], checked[name]) for name in plain))
    return found


def test_training_after_the_check_is_equal_to_the_bit() -> None:
    for found in distributed.run(_untouched, ranks=2):
        assert found == [True] * len(CELLS), found
