"""trainer/model/load.py: what is built or loaded, partitioned or not, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import is_flash_attn_2_available

from tests import distributed
from tests.model.loading import TOKENS, load, settings, weights
from tests.models import COMMON, FAMILIES, tiny_llama
from tests.multimodal import MULTIMODAL
from trainer.config.schema import ModelConfig
from trainer.data.tokenizer import bytes_tokenizer
from trainer.model import load as models
from trainer.model.blocks import find
from trainer.model.folder_checks import ModelError
from trainer.model.load import attention, check_files, on_meta
from trainer.run.setup import emulates

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a Hugging Face folder that fits the byte-level tokenizer."""
    tiny_llama(layers=2, vocab=TOKENS, seed=5).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


# --- what is built -----------------------------------------------------------------------------------------------


def test_random_weights_follow_from_the_seed() -> None:
    assert same(weights(load(random=LLAMA)), weights(load(random=LLAMA)))
    assert not same(weights(load(random=LLAMA)), weights(load(random=LLAMA, seed=1)))


def test_a_random_model_takes_its_vocabulary_and_marks_from_the_tokenizer() -> None:
    config = load(random=LLAMA).config
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (261, 256, 257)
    assert (
        load(random=LLAMA | {"vocab_size": 300, "eos_token_id": 1}).config.to_dict().items()
        >= {
            "vocab_size": 300,
            "eos_token_id": 1,
        }.items()
    )


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_weights_have_the_training_type_and_rotary_frequencies_fp32(
    folder: Path, name: str, dtype: torch.dtype
) -> None:
    for model in (load(dtype=name, random=LLAMA), load(dtype=name, path=str(folder))):
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert {b.dtype for b in model.buffers()} == {torch.float32}  # in bf16, position 1000 would turn by radians
        assert not model.config.use_cache


def test_a_folder_is_loaded_as_it_is(folder: Path) -> None:
    assert same(weights(load(path=str(folder), seed=9)), weights(tiny_llama(layers=2, vocab=TOKENS, seed=5)))


def test_checkpointing_leaves_the_embeddings_without_gradients() -> None:
    """transformers' own hook would make every backward run down to the first block."""
    model = load(random=LLAMA, activation_checkpointing=True).train()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert model.is_gradient_checkpointing
    seen: list[bool] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    logits = model(input_ids=torch.zeros(1, 4, dtype=torch.int64)).logits
    assert seen == [False] and logits.requires_grad


def test_the_dry_run_s_model_has_the_same_structure_and_no_storage(folder: Path) -> None:
    for choice in ({"random": LLAMA}, {"path": str(folder)}):
        dry, real = on_meta(ModelConfig(**choice, dtype="fp32"), bytes_tokenizer()), load(**choice)
        assert {p.device.type for p in dry.parameters()} == {"meta"}
        assert {n: (p.shape, p.dtype) for n, p in dry.named_parameters()} == {
            n: (p.shape, p.dtype) for n, p in real.named_parameters()
        }


def partitioned(rank: int, folder: Path) -> dict[str, bool]:
    """Compare ZeRO-3 on two ranks with the whole model; runs in each rank."""
    found = {}
    for name, choice in (("random", {"random": LLAMA}), ("folder", {"path": str(folder)})):
        whole, pieces = load(**choice), load(3, **choice)
        parameters = list(pieces.parameters())
        half = all(p.ds_tensor.numel() == -(-p.ds_numel // 2) and p.numel() == 0 for p in parameters)
        found[f"{name}: a rank holds half of each parameter"] = half
        found[f"{name}: same blocks"] = [b.numel for b in find(whole).blocks] == [b.numel for b in find(pieces).blocks]
    found["random: the seed decides"] = same(weights(load(3, random=LLAMA)), weights(load(3, random=LLAMA)))
    found["folder: same weights as the whole model"] = same(weights(load(path=str(folder))), weights(pieces))
    try:
        load(3, path=str(without(folder, "model.norm.weight", "model.layers.1.mlp.up_proj.weight", rank)))
    except ModelError as error:
        found["missing weights are named"] = "lacks 2 weights, for instance model.layers.1.mlp.up" in str(error)
    large = bytes_tokenizer()
    large.add_tokens(["one more"])
    try:
        models.load(ModelConfig(path=str(folder), dtype="fp32"), large, seed=0, deepspeed=settings(3))
    except ModelError as error:
        found["vocabulary"] = "model.tokenizer: 262 tokens, but the model embeds 261" in str(error)
    # Outside `load` nothing is partitioned any more.
    found["no trace is left"] = not hasattr(next(load(random=LLAMA).parameters()), "ds_id")
    return found


def without(folder: Path, *names_and_rank: Any) -> Path:
    """Make a copy of `folder`, one per rank, whose file lacks the named weights."""
    *names, rank = names_and_rank
    copy = folder.with_name(f"incomplete-{rank}")
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_zero3_loads_partitioned_what_is_loaded_whole_otherwise(folder: Path) -> None:
    for found in distributed.run(partitioned, folder, ranks=2):
        assert len(found) == 9
        assert [what for what, holds in found.items() if not holds] == []


# --- what is refused ---------------------------------------------------------------------------------------------


def missing_folder(folder: Path) -> dict[str, Any]:
    return {"path": str(folder / "nowhere")}


def no_weights(folder: Path) -> dict[str, Any]:
    (folder / "model.safetensors").unlink()
    return {"path": str(folder)}


def some_weights(folder: Path) -> dict[str, Any]:
    return {"path": str(without(folder, "model.norm.weight", "lm_head.weight", 0))}


def truncated_weights(folder: Path) -> dict[str, Any]:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return {"path": str(folder)}


def broken_configuration(folder: Path) -> dict[str, Any]:
    (folder / "config.json").write_text('{"model_type": ')
    return {"path": str(folder)}


def gemma_3(folder: Path) -> dict[str, Any]:
    """Write the configuration of a multimodal model beside weights of a text model."""
    config = MULTIMODAL["gemma3"]
    text = {**config["text_config"], "vocab_size": TOKENS}
    AutoConfig.for_model("gemma3", **{**config, "text_config": text}).save_pretrained(folder)
    return {"path": str(folder)}


def broken_generation_settings(folder: Path) -> dict[str, Any]:
    (folder / "generation_config.json").write_text('{"temperature": 0.6')
    return {"path": str(folder)}


def no_generation_settings(folder: Path) -> dict[str, Any]:
    (folder / "generation_config.json").write_text("[]")
    return {"path": str(folder)}


def add_weights(folder: Path, **tensors: Tensor) -> Path:
    """Add tensors to the first file, by names in which _ stands for a dot, and __ for _."""
    file = folder / "model.safetensors"
    more = {name.replace("__", "-").replace("_", ".").replace("-", "_"): tensor for name, tensor in tensors.items()}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    return folder


def classifier(folder: Path) -> dict[str, Any]:
    """Write a classifier, whose head is dropped; the model's own is tied to the embeddings, so nothing is missing."""
    config = json.loads((folder / "config.json").read_text())
    changed = {"architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config | changed))
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name != "lm_head.weight"}
    save_file(tensors, file, metadata={"format": "pt"})
    return {"path": str(add_weights(folder, score_weight=torch.ones(2, 32)))}


def fewer_layers(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    return {"path": str(folder)}


def random(**fields: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"random": LLAMA | fields}


def alone(**fields: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"random": fields}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (missing_folder, r"model\.path: cannot read a model configuration from '.*/nowhere'"),
        (broken_configuration, r"model\.path: cannot read a model configuration from '.*/llama'"),
        (no_weights, r"model\.path: cannot load '.*/llama': .*no file named model\.safetensors"),
        (truncated_weights, r"model\.path: cannot load '.*/llama'"),
        (
            some_weights,
            r"model\.path: '.*' lacks 2 weights, for instance lm_head\.weight, model\.norm\.weight: is this fold",
        ),
        (random(model_type="lama"), r"model\.random: transformers refuses .*lama"),
        (random(num_attention_heads=5), r"model\.random: transformers refuses .*'num_attention_heads': 5"),
        (random(model_type="t5"), r"model\.random: transformers cannot build a causal language model of type 't5'"),
        (alone(model_type="bart"), r"model\.random: a model of type 'bart' has an encoder and a decoder"),
        (alone(model_type="whisper"), r"model\.random: a model of type 'whisper' has an encoder and a decoder"),
        (gemma_3, r"model\.path: '.*' has 20 weights that Gemma3ForConditionalGeneration has no place for"),
        (alone(model_type="git"), r"model\.random: a model of type 'git' is more than a .* vision_config"),
        (broken_generation_settings, r"model\.path: .*generation_config\.json cannot be read .*: mend this file"),
        (no_generation_settings, r"model\.path: .*generation_config\.json cannot be read"),
        (
            classifier,
            r"model\.path: '.*' has 1 weights that LlamaForCausalLM has no place for, for instance score\.weight: .* "
            r"Its config\.json says LlamaForSequenceClassification\.",
        ),
        (fewer_layers, r"has 9 weights that LlamaForCausalLM has no place for, for instance model\.layers\.1\."),
        (
            random(vocab_size=100),
            r"model\.tokenizer: 261 tokens, but the model embeds 100: set model\.tokenizer .*, or "
            r"model\.random\.vocab_size to at least 261$",
        ),
    ],
)
def test_refused_with_the_key_to_change(folder: Path, choice: Callable[[Path], dict[str, Any]], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        load(**choice(folder))
    assert len(str(error.value)) < 700, "transformers lists hundreds of models"


@pytest.mark.parametrize("choice", [{"random": LLAMA | {"vocab_size": 260}}, {"random": LLAMA | {"model_type": "t5"}}])
def test_the_dry_run_refuses_the_same(choice: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        on_meta(ModelConfig(**choice), bytes_tokenizer())


@pytest.mark.parametrize("spoil", [broken_generation_settings, classifier, fewer_layers])
def test_the_dry_run_looks_into_the_folder(folder: Path, spoil: Callable[[Path], dict[str, Any]]) -> None:
    def check() -> list[str]:
        config = ModelConfig(path=str(folder))
        return check_files(config, on_meta(config, bytes_tokenizer()))

    assert check() == []
    spoil(folder)
    with pytest.raises(ModelError, match=r"model\.path: "):
        check()


def test_layers_that_predict_further_tokens_are_said_to_be_lost(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    ones = torch.ones(4, 4)
    add_weights(folder, model_layers_2_weight=ones, mtp_fc_weight=ones.clone(), model_layers_0_inv__freq=ones.clone())
    model = load(path=str(folder))
    said = r"WARNING: 2 weights in '.*' are not part of LlamaForCausalLM, for instance model\.layers\.2"
    own = [record.getMessage() for record in caplog.records if record.name == "trainer.model.load"]
    assert len(own) == 1 and re.search(said, own[0])
    assert re.search(said, "".join(check_files(ModelConfig(path=str(folder)), model)))


def test_masks_of_old_files_are_no_loss(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    mask = torch.ones(1, 1, 8, 8)
    add_weights(folder, model_layers_0_self__attn_rotary__emb_inv__freq=torch.ones(4), h_0_attn_bias=mask)
    load(path=str(folder))
    assert not [record for record in caplog.records if record.name == "trainer.model.load"]


@pytest.mark.skipif(torch.cuda.is_available() and is_flash_attn_2_available(), reason="this machine has it")
def test_flash_attention_is_refused_where_it_is_missing() -> None:
    with pytest.raises(ModelError, match=r"model\.attention: flash_attention_2, but .* set model\.attention to sdpa"):
        load(random=LLAMA, attention="flash_attention_2")
    assert attention(ModelConfig(random=LLAMA), AutoConfig.for_model(**LLAMA)) == "sdpa"
    assert load(random=LLAMA, attention="eager").config._attn_implementation == "eager"


def test_every_family_has_a_kernel_by_default() -> None:
    """Some architectures (gemma2) lack sdpa."""
    for family, (_, fields) in FAMILIES.items():
        config = ModelConfig(random={"model_type": family, **COMMON, **fields})
        kernel = attention(config, AutoConfig.for_model(**config.random))
        assert kernel == ("eager" if family == "gemma2" else "sdpa"), family


def test_weights_that_are_read_straight_onto_the_device_are_the_same(tmp_path: Path) -> None:
    for tied in (False, True):
        tiny_llama(layers=2, vocab=300, tied=tied).save_pretrained(tmp_path / "model")
        config = ModelConfig(path=str(tmp_path / "model"), dtype="fp32")
        whole, placed = (
            models.load(config, bytes_tokenizer(), seed=0, deepspeed=settings(2), onto_device=workspace)
            for workspace in (False, True)
        )
        assert same(weights(whole), weights(placed))
        assert (placed.lm_head.weight is placed.model.embed_tokens.weight) == tied
        assert not hasattr(placed, "_hf_hook") and not any(p.device.type == "meta" for p in placed.parameters())


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_of_another_shape_are_named(tmp_path: Path, stage: int) -> None:
    folder = tmp_path / "model"
    tiny_llama(layers=2, vocab=300).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    (said,) = distributed.run(_mismatch, folder, stage, ranks=1)
    assert "model.layers.0.mlp.down_proj.weight" in said and said.startswith("model.path: "), said


def _mismatch(rank: int, folder: Path, stage: int) -> str:
    with pytest.raises(ModelError) as error:
        models.load(ModelConfig(path=str(folder)), bytes_tokenizer(), seed=0, deepspeed=settings(stage))
    return str(error.value)


@pytest.mark.parametrize(
    ("flags", "emulated"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile", False),
        ("flags\t\t: fpu avx2 amx_bf16", False),
        ("flags\t\t: fpu avx2 avx512f", True),
        ("Features\t: fp asimd bf16", False),
        ("Features\t: fp asimd", True),
        ("hart\t\t: 0", False),
    ],
)
def test_a_cpu_that_emulates_bf16_is_known_by_its_flags(tmp_path: Path, flags: str, emulated: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\nbugs\t\t: spectre bf16\n")
    assert emulates("bf16", tmp_path / "cpuinfo") is emulated
    assert not emulates("fp32", tmp_path / "cpuinfo")
    assert not emulates("bf16", tmp_path / "none")
