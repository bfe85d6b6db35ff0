"""What a run computes beside its weights: recorded, and refused with the key where it is another one at a resume."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import trainer
from tests import distributed
from tests.engine.parity import Cell, make_engine, make_selector, train_step
from tests.models import tiny_llama
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.identity import Identity, differences, identity_of
from trainer.checkpoint.store import CheckpointError, Store
from trainer.data.tokenizer import bytes_tokenizer

CELL = Cell(stage=3, ranks=1, steps=4)


def build(change: str | None = None) -> tuple[LlamaForCausalLM, Any]:
    """The model and the tokenizer, as they were or with one thing that is no weight changed."""
    model, tokenizer = tiny_llama(vocab=64), bytes_tokenizer()
    model.register_buffer("correction", torch.ones(3))
    config = json.loads(model.config.to_json_string())
    if change == "rope_theta":
        config["rope_parameters"]["rope_theta"] = 500.0
    elif change == "rms_norm_eps":
        config["rms_norm_eps"] = 0.1
    elif change == "buffer":
        model.correction[1] = 7
    elif change == "temperature":
        model.generation_config.temperature = 0.3
    elif change == "chat_template":
        tokenizer.chat_template = tokenizer.chat_template.replace("Tools: ", "Tools : ")
    elif change == "eos_token":
        tokenizer.eos_token = "<|user|>"
    elif change == "padding_side":
        tokenizer.padding_side = "left"
    elif change == "bookkeeping":
        config |= {"use_cache": True, "_name_or_path": "elsewhere", "architectures": None, "output_attentions": True}
    if change in ("rope_theta", "rms_norm_eps", "bookkeeping"):
        other = LlamaForCausalLM(type(model.config)(**config, attn_implementation="eager"))
        other.register_buffer("correction", torch.ones(3))
        other.load_state_dict(model.state_dict())
        model = other
    if change and change.startswith("alpha"):
        target = LoraConfig(r=2, lora_alpha=int(change[5:]), target_modules=["q_proj"])
        model = get_peft_model(model, target)
    return model, tokenizer


def checkpoints(folder: Path, change: str | None) -> tuple[Any, trainer.Sparse, Checkpoints]:
    """An engine of a model with a change, and the checkpoints that record it."""
    model, tokenizer = build(change)
    adapters = "adapter" if change and change.startswith("alpha") else "full"
    sparse = trainer.prepare(model.train(), selector=make_selector(CELL), substrate=adapters)
    engine = make_engine(CELL, model, sparse)
    sparse.attach(engine)
    identity = identity_of(model, tokenizer, blocks=sparse.structure.path)
    return engine, sparse, Checkpoints(sparse, folder, keep=2, asynchronous=False, identity=identity)


CHANGED = ("rms_norm_eps", "temperature", "chat_template", "eos_token", "padding_side")


def save_and_resume(rank: int, workspace: Path) -> dict[str, str]:
    """Return what resuming says to each change; empty if it resumes."""
    for name, change in (("full", None), ("adapters", "alpha4")):
        engine, _, saving = checkpoints(workspace / name, change)
        for step in range(2):
            train_step(CELL, engine, step, rank)
        saving.save(2, {})
        saving.finish()
        engine.destroy()
    said = {}
    engine, sparse, unchanged = checkpoints(workspace / "full", None)
    for change in CHANGED:  # refused before anything is loaded: one engine is enough
        other = identity_of(*build(change), blocks=sparse.structure.path)
        resuming = Checkpoints(
            sparse, workspace / "full", keep=2, asynchronous=False, base=unchanged.base, identity=other
        )
        with pytest.raises(CheckpointError) as refusal:
            resuming.resume(Store(workspace / "full"), 2)
        said[change] = str(refusal.value)
        assert sparse.steps == 0, "nothing was loaded"
    engine.destroy()
    for change in (None, "rope_theta", "buffer", "bookkeeping", "alpha4", "alpha8", "earlier version"):
        name = "adapters" if change and change.startswith("alpha") else "full"
        if change == "earlier version":
            path = workspace / name / "checkpoints" / "step-00000002.json"
            manifest = Store(workspace / name).read(2)
            del manifest.state["identity"]
            path.unlink()
            Store(workspace / name).publish(manifest)
        engine, sparse, resuming = checkpoints(workspace / name, change)
        told: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, told=told: told.append(record.getMessage())
        logging.getLogger("trainer.checkpoint").addHandler(handler)
        try:
            resuming.resume(Store(workspace / name), 2)
            said[str(change)] = " ".join(told)
            assert sparse.steps == 2
        except CheckpointError as error:
            said[str(change)] = str(error)
            assert sparse.steps == 0, "nothing was loaded"
        logging.getLogger("trainer.checkpoint").removeHandler(handler)
        engine.destroy()
    return said


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return distributed.run(save_and_resume, tmp_path_factory.mktemp("identity"), ranks=1)[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("rope_theta", "config.json: rope_parameters.rope_theta is 500.0, and was 10000.0 when the run began"),
        ("rms_norm_eps", "config.json: rms_norm_eps is 0.1, and was 1e-06"),
        ("buffer", "the model's buffer correction is '"),
        ("temperature", "generation_config.json: temperature is 0.3, and was "),
        ("chat_template", "tokenizer: template is 'sha256:"),
        ("eos_token", "tokenizer: special.eos_token is '<|user|>', and was '<|eos|>'"),
        ("padding_side", "tokenizer: padding_side is 'left', and was 'right'"),
        ("alpha8", "adapter configuration: default.lora_alpha is 8, and was 4"),
    ],
)
def test_another_model_or_tokenizer_is_refused_with_the_key(said: dict[str, str], change: str, words: str) -> None:
    assert said[change].startswith("this is not the model that the run began with: ") and words in said[change]


@pytest.mark.parametrize("change", ["None", "alpha4", "bookkeeping"])
def test_the_same_goes_on(said: dict[str, str], change: str) -> None:
    assert said[change] == ""


def test_a_checkpoint_without_the_record_goes_on_and_says_so_once(said: dict[str, str]) -> None:
    assert said["earlier version"].count("cannot be compared") == 1


def test_a_new_default_of_another_version_is_no_difference() -> None:
    now = identity_of(tiny_llama(), blocks="model.layers")
    assert Identity.model_validate(json.loads(json.dumps(now.model_dump()))) == now
    config = {key: value for key, value in now.config.items() if key != "attention_bias"}
    for versions, told in ((now.versions, True), (now.versions | {"transformers": "5.0.0"}, False)):
        before = now.model_copy(update={"config": config, "versions": versions})
        assert bool(differences(before, now)) == told
        before = now.model_copy(update={"config": config | {"attention_bias": True}, "versions": versions})
        lines = differences(before, now)
        assert lines[0] == "config.json: attention_bias is False, and was True when the run began"
        assert (len(lines) == 2) == (not told)


def test_another_shape_of_a_key_is_a_difference() -> None:
    now = identity_of(tiny_llama(), blocks="model.layers")
    assert not differences(now, now)
    for value in (float("nan"), {}, [1], None):
        before = now.model_copy(update={"config": now.config | {"rms_norm_eps": value}})
        assert differences(before, now)
