"""Blocks and parts are found by structure, in models of many families, with and without adapters."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from tests.models import tiny_llama
from trainer.model.blocks import BlockError, always_on, find

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "gemma": {"num_key_value_heads": 2, "head_dim": 8},
    "phi": {},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "falcon": {},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 2},
}


def family(name: str) -> nn.Module:
    extra = FAMILIES[name]
    fields = extra if name == "gpt2" else SMALL | extra
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**fields | {"vocab_size": 64, "pad_token_id": 0}))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_in_one_block_or_one_part(name: str) -> None:
    model = family(name)
    structure = find(model)
    assert len(structure.blocks) == 3
    inside = [id(p) for block in structure.blocks for p in block.parameters.values()]
    outside = [id(p) for part in structure.outside.values() for p in part.values()]
    assert sorted(inside + outside) == sorted(id(p) for p in model.parameters())
    assert structure.outside["embeddings"] and structure.outside["norm"]
    assert structure.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert bool(structure.outside["head"]) or structure.tied
    assert all(p.dim() == 1 for p in structure.outside["norm"].values())


def test_names_and_counts_of_a_llama() -> None:
    model = tiny_llama(layers=4)
    structure = find(model)
    assert structure.path == "model.layers"
    assert [b.path for b in structure.blocks] == [f"model.layers.{i}" for i in range(4)]
    assert structure.blocks[1].numel == sum(p.numel() for p in model.model.layers[1].parameters())
    assert {k: list(v) for k, v in structure.outside.items()} == {
        "embeddings": ["model.embed_tokens.weight"],
        "head": ["lm_head.weight"],
        "norm": ["model.norm.weight"],
    }


def test_tied_embeddings_count_once_and_halves_are_refused() -> None:
    structure = find(tiny_llama(tied=True))
    assert structure.tied and not structure.outside["head"]
    chosen = always_on(structure, ("embeddings", "head", "norm"))
    assert list(chosen) == ["embeddings", "norm"]
    with pytest.raises(BlockError, match=r"embeddings=True and head=False.*same value"):
        always_on(structure, ("embeddings", "norm"))
    with pytest.raises(BlockError, match="same value"):
        always_on(structure, ("head",))


def test_adapters_are_what_may_train_in_a_block() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    structure = find(model, substrate="adapter")
    assert len(structure.blocks) == 6
    for block in structure.blocks:
        assert len(block.parameters) == 4 and all("lora_" in name for name in block.parameters)
    with pytest.raises(BlockError, match="no parameters to train under substrate 'adapter'"):
        find(get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["lm_head"])), substrate="adapter")


def test_an_ambiguous_model_lists_the_candidates_and_a_path_decides() -> None:
    config = T5Config(d_model=32, d_ff=48, num_layers=2, num_heads=4, vocab_size=64)
    model = T5ForConditionalGeneration(config)
    with pytest.raises(BlockError, match=r"encoder\.block \(2 children\), decoder\.block \(2 children\)"):
        find(model)
    assert len(find(model, path="decoder.block").blocks) == 2


def test_wrong_paths_and_models_without_blocks() -> None:
    with pytest.raises(BlockError, match=r"no module 'model\.layer', did you mean 'model\.layers'"):
        find(tiny_llama(), path="model.layer")
    with pytest.raises(BlockError, match="has no children"):
        find(tiny_llama(), path="lm_head")
    with pytest.raises(BlockError, match="found no list of blocks"):
        find(nn.Linear(2, 2))
    with pytest.raises(BlockError, match="unknown part 'embedding', did you mean 'embeddings'"):
        always_on(find(tiny_llama()), ("embedding",))


def test_a_part_that_selects_nothing_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    with pytest.raises(BlockError, match=r"always_on\.head: true selects nothing"):
        always_on(find(Bare()), ("head",))


def test_shared_blocks_are_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.Linear(4, 4)
            self.layers = nn.ModuleList([layer, layer])
            self.other = nn.ModuleList([nn.Linear(1, 1)])

    model = Shared()
    model.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model.layers[1].weight = model.layers[0].weight
    with pytest.raises(BlockError, match="share the parameter"):
        find(model)


def test_meta_tensors_suffice() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    assert len(find(model).blocks) == 6
