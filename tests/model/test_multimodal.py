"""Multimodal models: what is a block and what is not, what adapters sit on, and how folders are loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForMultimodalLM

from tests import distributed
from tests.model.loading import TOKENS, load, weights
from tests.models import tiny_llama
from tests.multimodal import MULTIMODAL, TEXT, VISION, tiny_multimodal, write_folder
from trainer.config.schema import AdapterSubstrate, ModelConfig
from trainer.data.tokenizer import bytes_tokenizer
from trainer.model.adapter_checks import AdapterError
from trainer.model.adapters import adapt
from trainer.model.blocks import BlockError, always_on, find
from trainer.model.causality import check_causal
from trainer.model.folder_checks import ModelError
from trainer.model.fused_head import _without_blocks, obstacle
from trainer.model.load import on_meta
from trainer.model.loss import LossError

# Found by hand: the path of the blocks, and the names of a projector where it is a part of the tower.
PATHS = {
    "llama4": "language_model.model.layers",
    "idefics3": "model.text_model.layers",
    "smolvlm": "model.text_model.layers",
}
INSIDE = ("merger", "downsample", "deepstack_merger_list")
OF_LANGUAGE = ("language_model.", "text_model.", "lm_head.")
OF_PROJECTOR = ("multi_modal_projector", "mm_projector", "connector", "image_newline", "embed_vision", *INSIDE)


@pytest.mark.parametrize("family", MULTIMODAL)
def test_blocks_are_the_language_model_s_and_all_else_is_apart(family: str) -> None:
    model = tiny_multimodal(family)
    structure = find(model)
    assert structure.path == PATHS.get(family, "model.language_model.layers") and len(structure.blocks) == 4
    in_blocks = {name for block in structure.blocks for name in block.parameters}
    outside = {name: part for part, found in structure.outside.items() for name in found}
    assert in_blocks | outside.keys() == dict(model.named_parameters()).keys() and not in_blocks & outside.keys()
    for name, part in outside.items():
        if any(of in name for of in OF_LANGUAGE):
            assert part in ("embeddings", "head", "norm"), name
        else:
            assert part == ("projector" if any(of in name for of in OF_PROJECTOR) else "vision"), name
    assert structure.outside["vision"] and structure.outside["projector"]


def test_what_a_text_model_lacks_is_refused() -> None:
    structure = find(tiny_llama())
    with pytest.raises(
        BlockError, match=r"^always_on\.projector: true, but this model reads text only; set .* to false"
    ):
        always_on(structure, ("projector",))
    with pytest.raises(BlockError, match=r"^model\.vision: train, but this model reads text only; set .* to frozen"):
        always_on(structure, ("vision",))


def test_layers_of_a_tower_are_no_blocks() -> None:
    model = tiny_multimodal("gemma3")
    with pytest.raises(BlockError, match=r"'model\.vision_tower\.encoder\.layers' is not in the language model"):
        find(model, path="model.vision_tower.encoder.layers")
    assert len(find(model, path="model.language_model.layers").blocks) == 4


# --- adapters --------------------------------------------------------------------------------------------------------


def _lora(targets: Any, **more: Any) -> AdapterSubstrate:
    peft = {"peft_type": "LORA", "r": 2, "target_modules": targets, "lora_dropout": 0.0, **more}
    return AdapterSubstrate(name="adapter", peft=peft)


def _trained_outside(model: nn.Module) -> set[str]:
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any(of in name for name in names for of in OF_LANGUAGE)
    return {name for name in names if not any(of in name for of in OF_LANGUAGE)}


@pytest.mark.parametrize("family", MULTIMODAL)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ".*[qv]_proj"])
def test_adapters_sit_on_the_language_model_alone_unless_the_towers_train(family: str, targets: Any) -> None:
    model = tiny_multimodal(family)
    assert not _trained_outside(adapt(copy.deepcopy(model), _lora(targets)).model)
    if family == "gemma4" and targets != "all-linear":  # its tower's layers of these names are no linear ones
        with pytest.raises(AdapterError, match="Gemma4ClippableLinear"):
            adapt(model, _lora(targets), vision="train")
        return
    adapted = adapt(model, _lora(targets), vision="train").model
    shared = any(
        name.endswith(".q_proj") for name, _ in model.named_modules() if not any(o in name for o in OF_LANGUAGE)
    )
    if targets == "all-linear" or shared:
        assert _trained_outside(adapted)
        assert find(adapted, substrate="adapter").outside["vision"]


def test_what_is_excluded_stays_excluded_and_what_trains_nothing_is_refused() -> None:
    model = tiny_multimodal("gemma3")
    adapted = adapt(copy.deepcopy(model), _lora("all-linear", exclude_modules=["k_proj"])).model
    assert not _trained_outside(adapted) and not any("k_proj.lora" in name for name, _ in adapted.named_parameters())
    with pytest.raises(
        AdapterError, match=r"fc1 is not in the language model, only in model\.vision_tower.*vision=train"
    ):
        adapt(copy.deepcopy(model), _lora(["q_proj", "fc1"]))
    with pytest.raises(
        AdapterError, match=r"weights of the model's towers would train, .*model\.vision=train, or name"
    ):
        adapt(copy.deepcopy(model), _lora(["q_proj"], modules_to_save=["out_proj"]))
    # A projector has no adapters then, but may train as a whole.
    whole = adapt(model, _lora(["q_proj"], modules_to_save=["multi_modal_projector"])).model
    assert len(_trained_outside(whole)) == 2
    assert len(find(whole, substrate="adapter").outside["projector"]) == 2


# --- what they compute -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", MULTIMODAL)
def test_packed_rows_are_separate_or_packing_is_refused(family: str) -> None:
    model = tiny_multimodal(family).eval()
    ids = torch.randint(59, (1, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in (10, 6, 8)])[None]
    packed = model(input_ids=ids, position_ids=positions).logits
    alone = torch.cat([model(input_ids=part).logits for part in ids.split([10, 6, 8], dim=1)], dim=1)
    check_causal(copy.deepcopy(model), packed=False, key="model", device="cpu")
    if torch.allclose(packed, alone, atol=1e-5):
        check_causal(model, packed=True, key="model", device="cpu")
    else:
        with pytest.raises(LossError, match=r"data\.packing: true, but \w+ lets packed samples see each other"):
            check_causal(model, packed=True, key="model", device="cpu")


def test_the_fused_head_is_tried_without_the_towers_weights() -> None:
    for family in ("gemma3", "qwen2_5_vl", "qwen3_vl"):
        with torch.device("meta"):
            model = tiny_multimodal(family, vocab_size=40_000)
        assert obstacle(model, find(model).path) is None
        small = _without_blocks(model, find(model).path)
        assert {p.is_meta for p in small.model.get_encoder(modality="image").parameters()} == {True}
    with torch.device("meta"):
        model = tiny_multimodal("llama4", vocab_size=40_000)
    assert "does not fit Llama4ForConditionalGeneration" in str(obstacle(model, find(model).path))


# --- folders ---------------------------------------------------------------------------------------------------------

RANDOM = {"model_type": "gemma3", **MULTIMODAL["gemma3"]}


def test_a_random_one_takes_its_vocabulary_from_the_tokenizer() -> None:
    without = {name: value for name, value in TEXT.items() if name != "vocab_size" and not name.endswith("_token_id")}
    model = load(random={**RANDOM, "text_config": without})
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert model.get_input_embeddings().weight.shape[0] == TOKENS == model.config.text_config.vocab_size
    assert model.config.text_config.eos_token_id == 257 and not model.config.text_config.use_cache
    with pytest.raises(ModelError, match=r"261 tokens, but the model embeds 64: .*or model\.random\.vocab_size"):
        load(random=RANDOM)


@pytest.mark.parametrize("random", [{"model_type": "qwen2_5_omni"}, {"model_type": "idefics", "vision_config": VISION}])
def test_models_that_do_not_say_where_the_language_model_is_are_refused(random: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"model\.random: .*(is more than a language model|cannot build)"):
        on_meta(ModelConfig(random=random), bytes_tokenizer())


def _loaded(rank: int, folder: Path, families: tuple[str, ...]) -> dict[str, bool]:
    same = {}
    for family in families:
        path = str(folder / family)
        published = weights(AutoModelForMultimodalLM.from_pretrained(path))
        for stage in (2, 3):
            model = load(stage, path=path)
            found = weights(model)
            same[f"{family} {stage}"] = found.keys() == published.keys() and all(
                torch.equal(found[name], published[name]) for name in found
            )
    return same


def test_folders_are_loaded_whole_with_the_class_they_name(tmp_path: Path) -> None:
    families = ("gemma3", "qwen2_5_vl", "qwen3_vl", "llama4", "mistral3", "llava_next", "qwen3_vl_moe")
    for family in families:
        write_folder(tmp_path / family, family)
    for found in distributed.run(_loaded, tmp_path, families, ranks=2):
        assert len(found) == 2 * len(families) and all(found.values()), found
