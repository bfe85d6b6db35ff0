"""Whole runs on a folder of a multimodal model, with images and text mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoProcessor

from tests import forked
from tests.launching import deepspeed, launch
from tests.multimodal import write_folder, write_images
from tests.run.whole_runs import numbers
from trainer.cli.main import main

RECIPE = """\
method: lisa
output: run
model: {path: model, dtype: fp32, vision: train}
always_on: {projector: true}
selector: {blocks: 2, interval: 2}
optimizer: {lr: 5.0e-3}
train: {steps: 7, global_batch_size: 4, micro_batch_size: 1, guard_every: 1}
eval: {every: 4, micro_batch_size: 3}
data: {train: images.jsonl, eval_fraction: 0.2, max_length: 64}
checkpoint: {every: 3, keep: 9}
"""


@pytest.mark.slow
def test_a_run_with_images_resumes_in_the_middle_of_an_epoch_bit_for_bit(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", "gemma3")
    write_images(tmp_path)
    (tmp_path / "images.yaml").write_text(RECIPE)
    first = launch(deepspeed("images.yaml"), tmp_path)
    assert first.code == 0, first.everything
    assert "13 samples have images" in first.everything and "norm, projector, vision, for" in first.everything
    resumed = launch(deepspeed("images.yaml", "output=again", "resume=run/checkpoints/step-00000003.json"), tmp_path)
    assert resumed.code == 0, resumed.everything
    after = [line for line in numbers(tmp_path / "run") if line.get("step", 0) > 3]
    assert [line for line in numbers(tmp_path / "again") if line.get("step", 0) > 3] == after and len(after) > 3
    files = ("model.safetensors", "config.json", "processor_config.json")
    for name in files:
        assert (tmp_path / "again" / "model" / name).read_bytes() == (tmp_path / "run" / "model" / name).read_bytes()
    for name in files[1:]:
        assert (tmp_path / "run" / "model" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


@pytest.mark.slow
def test_a_model_with_new_tokens_keeps_its_processor_in_all_that_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "model"
    write_folder(base, "gemma3")
    write_images(tmp_path)
    (tmp_path / "images.yaml").write_text(RECIPE)
    words = ["images.yaml", "model.add_tokens=['<new>']", "always_on.embeddings=new_rows", "train.steps=2"]
    done = forked.run([*words, "train.micro_batch_size=2", "checkpoint.every=2"], tmp_path, ranks=1)
    assert done.code == 0, done.everything
    run, out, delta, applied = (str(tmp_path / name) for name in ("run", "out", "delta", "applied"))
    for command in (
        ["export", run, out, "--base", str(base)],
        ["export", run, delta, "--delta", "--base", str(base)],
        ["apply", str(base), delta, applied],
    ):
        assert main(command) == 0, capsys.readouterr().err
    for folder in (tmp_path / "run" / "model", tmp_path / "out", tmp_path / "applied"):
        file = "processor_config.json"
        assert (folder / file).read_bytes() == (base / file).read_bytes(), folder
        processor = AutoProcessor.from_pretrained(folder)
        assert len(processor.tokenizer.tokenize("a<new>b")) == 3


def test_what_reads_text_only_refuses_the_keys_and_the_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "model", "gemma3")
    write_images(tmp_path)
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "hi?", "answer": "yes"}) + "\n")
    (tmp_path / "images.yaml").write_text(RECIPE)
    dry = ["train", "images.yaml", "--dry-run"]
    random = [f"model.random={json.dumps(text)}", "model.path=null", "data.eval_fraction=0", "eval.every=null"]
    for more, said in (
        (
            [*random, "data.train=rows.jsonl", "model.vision=frozen"],
            "always_on.projector: true, but this model reads text",
        ),
        (
            [*random, "data.train=rows.jsonl", "always_on.projector=false"],
            "model.vision: train, but this model reads text",
        ),
        ([*random, "model.tokenizer=bytes"], "images.jsonl:1: has an image, and the model reads text only"),
        (
            [*random, "model.tokenizer=model", "model.vision=frozen", "always_on.projector=false"],
            "data.train: has rows wi",
        ),
        (["method=lora", "always_on.projector=true"], "always_on.projector: true, but with adapters"),
    ):
        assert main([*dry, *more]) == 2, said
        assert said in capsys.readouterr().err
    assert main([*dry, "data.train=rows.jsonl", "data.eval_fraction=0", "eval.every=null"]) == 0
    assert "WARNING: model.vision: train, but no row of the data has an image" in capsys.readouterr().out
    assert main(dry) == 0
    said = capsys.readouterr().out
    assert "always on: vision, " in said and "always on: projector, 528" in said
    assert "images: the plan is that of text" in said
