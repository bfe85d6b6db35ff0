"""Tiny models, built on the spot."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.families import MORE
from tests.multimodal import MULTIMODAL, tiny_multimodal

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
_GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
_QWEN_EXPERTS = {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 32}
# Block path and configuration by transformers' model type. No dropout: ranks would drop other units.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("model.layers", {}),
    "mistral": ("model.layers", {"sliding_window": 8}),
    "qwen2": ("model.layers", {"tie_word_embeddings": True}),
    "qwen3": ("model.layers", {"head_dim": 8}),
    "gemma": ("model.layers", {"head_dim": 8}),
    "gemma2": ("model.layers", {"head_dim": 8}),
    "phi": ("model.layers", {"embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "phi3": ("model.layers", {"resid_pdrop": 0.0}),
    "gpt2": ("transformer.h", {**_GPT2, "attn_pdrop": 0.0}),
    "gpt_neox": ("gpt_neox.layers", {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "opt": ("model.decoder.layers", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "falcon": ("transformer.h", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "mixtral": ("model.layers", {**_EXPERTS, "num_local_experts": 4}),
    "qwen2_moe": ("model.layers", {**_QWEN_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("model.layers", {**_QWEN_EXPERTS, "head_dim": 8}),
}


def family_fields(family: str) -> dict[str, Any]:
    """What a family's configuration has beyond `COMMON`."""
    return FAMILIES[family][1] if family in FAMILIES else MORE.get(family, {})


def tiny_model(family: str, *, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A model of four blocks of the given transformers type, with random weights and eager attention."""
    if family in MULTIMODAL:
        return tiny_multimodal(family, seed=seed, **fields)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**COMMON, **family_fields(family), **fields})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def tiny_llama(
    *,
    layers: int = 6,
    hidden: int = 32,
    vocab: int = 64,
    seed: int = 0,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """A Llama with `layers` blocks of about 12 hidden^2 parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        attn_implementation="eager",
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)
