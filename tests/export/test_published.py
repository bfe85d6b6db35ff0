"""Beside weights, what is written is the base's own: its files byte for byte, or with the keys that a run changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tests.models import tiny_model
from trainer.data.tokenizer import bytes_tokenizer, tokenizer_identity
from trainer.export.published import restore_published, restore_tokenizer
from trainer.export.shards import save_tokenizer, write_model

# As transformers 4 writes it, in the order of its keys and with one of nobody's.
PUBLISHED = {
    "architectures": ["LlamaForCausalLM"],
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 256,
    "torch_dtype": "float32",
    "transformers_version": "4.46.0",
    "use_cache": True,
    "vocab_size": 261,
    "made_by": "a lab",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder as it lies on the Hub: of transformers 4, with terms, a picture, and a tokenizer of an older format."""
    folder = tmp_path / "base"
    tiny_model("llama", **{k: v for k, v in PUBLISHED.items() if k.endswith(("_size", "_id"))}).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(PUBLISHED, indent=4))
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "eos_token_id": 257})
    )
    tokenizer = bytes_tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tokenizer.chat_template, "note": "ours"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=4))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|eos|>", "pad_token": "<|pad|>"}')
    (folder / "LICENSE.txt").write_text("terms")
    (folder / "README.md").write_text("about the base")
    (folder / "setup.py").write_text("raise SystemExit  # no code of the model's")
    return folder


def opened(base: Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(base, **options), AutoTokenizer.from_pretrained(base)


def written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    return write_model(
        model, tokenizer, folder, lambda piece: {n: t.detach().clone() for n, t in piece.tensors.items()}
    )


def test_files_are_the_base_s_byte_for_byte(base: Path, tmp_path: Path) -> None:
    model, tokenizer = opened(base)
    model.config.use_cache = False  # as while it trains
    assert written(model, tokenizer, tmp_path / "out") == []
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in base.iterdir()} - {"README.md", "setup.py"}
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name


def test_keys_that_the_run_changed_are_edited_and_said(base: Path, tmp_path: Path) -> None:
    model, tokenizer = opened(base, dtype=torch.bfloat16)
    model.config.pad_token_id = 5
    model.generation_config.temperature = 0.1
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    said = written(model, tokenizer, tmp_path / "out")
    assert said == [
        "config.json: pad_token_id is 5, was 256",
        "config.json: torch_dtype is bfloat16, was float32",
        "generation_config.json: temperature is 0.1, was 0.6",
        "chat template: is the run's, not the published one",
    ]
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(found.items()) == list((PUBLISHED | {"pad_token_id": 5, "torch_dtype": "bfloat16"}).items())
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["note"] == "ours" and settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    again, its_tokenizer = opened(tmp_path / "out")
    assert again.dtype == torch.bfloat16 and again.config.rope_parameters["rope_theta"] == 500000.0
    assert tokenizer_identity(its_tokenizer) == tokenizer_identity(tokenizer)


def test_a_vocabulary_that_grew_is_written_and_said(base: Path, tmp_path: Path) -> None:
    model, tokenizer = opened(base)
    tokenizer.add_tokens(["<|new|>"])
    model.resize_token_embeddings(len(tokenizer))
    first, second = written(model, tokenizer, tmp_path / "out")
    assert first == "config.json: vocab_size is 262, was 261"
    assert second.startswith("the tokenizer: as transformers writes it, not as in ") and "its vocabulary" in second
    again, its_tokenizer = opened(tmp_path / "out")
    assert its_tokenizer("<|new|>")["input_ids"] == [261]
    assert again.get_input_embeddings().weight.shape[0] == 262


def test_nothing_invents_generation_settings_that_the_base_lacks(base: Path, tmp_path: Path) -> None:
    (base / "generation_config.json").unlink()
    model, tokenizer = opened(base)
    assert written(model, tokenizer, tmp_path / "out") == []
    assert not (tmp_path / "out" / "generation_config.json").exists()
    model.generation_config.temperature = 0.1
    model.generation_config.do_sample = True
    written(model, tokenizer, tmp_path / "other")
    assert json.loads((tmp_path / "other" / "generation_config.json").read_text())["temperature"] == 0.1


def test_a_base_that_is_gone_or_broken_leaves_what_transformers_writes(base: Path, tmp_path: Path) -> None:
    model, tokenizer = opened(base)
    model.config.use_cache = False  # as while it trains
    (base / "config.json").write_text("{")
    said = written(model, tokenizer, tmp_path / "out")
    assert said[0].startswith(f"config.json: as transformers writes it, not as in {base} (")
    assert all("as transformers writes it" in line for line in said)
    shutil.rmtree(base)
    assert written(model, tokenizer, tmp_path / "other") == []
    for name in ("out", "other"):
        config = AutoModelForCausalLM.from_pretrained(tmp_path / name).config
        assert config.rope_parameters["rope_theta"] == 500000.0 and config.use_cache


def test_code_of_the_model_s_own_comes_along(base: Path, tmp_path: Path) -> None:
    """Copied, not run."""
    (base / "config.json").write_text(json.dumps(PUBLISHED | {"auto_map": {"AutoConfig": "setup.Config"}}))
    model, tokenizer = opened(base, trust_remote_code=False)
    folder = tmp_path / "out"
    folder.mkdir()
    model.save_pretrained(folder, state_dict={})
    save_tokenizer(tokenizer, folder)
    assert restore_published(model, tokenizer, folder) == []
    assert (folder / "setup.py").read_bytes() == (base / "setup.py").read_bytes()


def test_special_tokens_and_settings_of_the_run_are_edited(base: Path, tmp_path: Path) -> None:
    model, tokenizer = opened(base)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = 77
    said = written(model, tokenizer, tmp_path / "out")
    assert said[0] == 'tokenizer: pad_token is "<|eos|>", was "<|pad|>"' and len(said) == 3
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["note"] == "ours"
    assert json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())["pad_token"] == "<|eos|>"
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (again.pad_token_id, again.padding_side, again.model_max_length) == (257, "left", 77)


@pytest.mark.parametrize(
    ("parameters", "theta", "scaling"),
    [
        ({"rope_theta": 1e6, "rope_type": "default"}, 1e6, None),
        ({"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}, 1e6, {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_rotary_embeddings_that_the_run_changed_are_written_as_the_base_writes_them(
    base: Path, tmp_path: Path, parameters: dict[str, Any], theta: float, scaling: dict[str, Any] | None
) -> None:
    model, tokenizer = opened(base)
    model.config.rope_parameters = dict(parameters)
    (said,) = written(model, tokenizer, tmp_path / "out")
    assert said.startswith("config.json: rope_parameters is ")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "rope_parameters" not in found and (found["rope_theta"], found["rope_scaling"]) == (theta, scaling)


def test_weights_that_are_not_quantised_any_more_do_not_say_so(base: Path, tmp_path: Path) -> None:
    model, tokenizer = opened(base)
    mxfp4 = PUBLISHED | {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(mxfp4))
    said = written(model, tokenizer, tmp_path / "out")
    assert [line.partition(" is ")[0] for line in said] == ["config.json: dtype", "config.json: quantization_config"]
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in found and found["dtype"] == found["torch_dtype"] == "float32"


def test_a_tokenizer_that_the_base_s_type_would_read_as_another_class_is_said_to_be(base: Path, tmp_path: Path) -> None:
    """GPT-2's, which names no class of its own, beside a model of type qwen2."""
    vocabulary = {character: number for number, character in enumerate(bytes_tokenizer().get_vocab())}
    workspace = tmp_path / "gpt2"
    workspace.mkdir()
    (workspace / "vocab.json").write_text(json.dumps(vocabulary | {"<|endoftext|>": len(vocabulary)}))
    (workspace / "merges.txt").write_text("#version: 0.2\n")
    (workspace / "tokenizer_config.json").write_text("{}")
    (workspace / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = AutoTokenizer.from_pretrained(workspace)
    tiny_model("qwen2", vocab_size=300).save_pretrained(tmp_path / "qwen2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen2")
    first, second = written(model, tokenizer, tmp_path / "out")
    assert first.startswith("the tokenizer: as transformers writes it")
    assert "reads the tokenizer as Qwen2Tokenizer, which encodes texts in another way" in second
    shutil.copytree(workspace, tmp_path / "delta", ignore=lambda *_: ["config.json"])
    save_tokenizer(tokenizer, tmp_path / "delta")
    restore_tokenizer(tokenizer, tmp_path / "delta")
    assert tokenizer_identity(AutoTokenizer.from_pretrained(tmp_path / "delta")) == tokenizer_identity(tokenizer)


def test_files_that_cannot_be_read_lose_no_model(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = opened(base)
    copied = shutil.copyfile

    def copyfile(source: Any, target: Any) -> Any:
        if Path(source).name in ("LICENSE.txt", "special_tokens_map.json"):
            raise PermissionError(13, "Permission denied")
        return copied(source, target)

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    first, second = written(model, tokenizer, tmp_path / "out")
    assert first == f"LICENSE.txt: could not be copied from {base} (Permission denied)"
    assert second.startswith("the tokenizer: as transformers writes it, not as in ")
    assert tokenizer_identity(AutoTokenizer.from_pretrained(tmp_path / "out")) == tokenizer_identity(tokenizer)
    monkeypatch.setattr(Path, "is_dir", lambda path: (_ for _ in ()).throw(OSError(116, "Stale file handle")))
    assert restore_published(model, tokenizer, tmp_path / "out") == []


@pytest.mark.parametrize("published", [True, False])
def test_a_model_without_generation_settings(base: Path, tmp_path: Path, published: bool) -> None:
    """As of models with code of their own that do not generate."""
    if not published:
        (base / "generation_config.json").unlink()
    model, tokenizer = opened(base)
    del model.generation_config
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(type(model), "can_generate", lambda *_: False)
    try:
        assert written(model, tokenizer, tmp_path / "out") == []
    finally:
        monkeypatch.undo()
    assert (tmp_path / "out" / "generation_config.json").exists() == published
