"""Tiny models, built on the spot."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


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
