"""Export checkpoints: what is written is what was trained, with no more than a shard and a block in memory."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import forked
from tests.export.trained_run import SHARD, Trained, change_manifest, files, opened, same, write_base
from tests.launching import write_inputs
from tests.models import FAMILIES, tiny_model
from trainer.cli.main import main
from trainer.data.tokenizer import bytes_tokenizer
from trainer.export import from_checkpoint as export_run_module
from trainer.export import shards as shards_module
from trainer.export.shards import write_model


def test_shards_of_a_live_engine_hold_its_weights(trained: Trained, workspace: Path) -> None:
    assert same(opened(workspace / "live"), trained.weights[6])
    sizes = [path.stat().st_size for path in workspace.glob("live/model-*-of-*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < SHARD + 4096, "headers apart"
    assert len({path.stat().st_mode for path in workspace.glob("live/*.*")}) == 1
    index = json.loads((workspace / "live" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in trained.weights[6].values())


def test_a_checkpoint_becomes_the_model_that_was_trained(trained: Trained, workspace: Path) -> None:
    out = workspace / "newest"
    assert main(["export", str(workspace / "run"), str(out), "--shard-size", "0.04MB"]) == 0
    assert files(out) == files(workspace / "live"), "the same files as from the live engine"
    for step, which in ((2, ["--step", "2"]), (4, ["--best"])):
        assert main(["export", str(workspace / "run"), str(workspace / f"step-{step}"), *which]) == 0
        assert same(opened(workspace / f"step-{step}"), trained.weights[step])
        assert not same(trained.weights[step], trained.weights[6])


def test_runs_and_deltas_of_an_earlier_version_are_read(
    trained: Trained, workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, delta, out = tmp_path / "run", tmp_path / "delta", tmp_path / "out"
    shutil.copytree(workspace / "run", run)
    change_manifest(run, lambda body: body["state"].pop("identity"))
    assert main(["export", str(run), str(out)]) == 0
    assert main(["export", str(run), str(delta), "--delta"]) == 0
    info = json.loads((delta / "delta.json").read_text())
    (delta / "delta.json").write_text(json.dumps({k: v for k, v in info.items() if k not in ("identity", "files")}))
    caplog.clear()
    assert main(["apply", str(workspace / "base"), str(delta), str(tmp_path / "applied")]) == 0
    assert caplog.text.count("cannot be compared") == 1
    assert same(opened(out), trained.weights[6]) and same(opened(tmp_path / "applied"), trained.weights[6])


def test_one_of_two_exports_to_a_folder_stays(
    trained: Trained,
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second begins while the first writes, and is done before it."""
    run, out = str(workspace / "run"), tmp_path / "out"
    write, inner = export_run_module.write_model, []

    def write_model(*arguments: Any, **options: Any) -> list[str]:
        if not inner:
            inner.append(None)  # what it calls does not begin another
            inner.append(main(["export", run, str(out), "--step", "2"]))
        return write(*arguments, **options)

    monkeypatch.setattr(export_run_module, "write_model", write_model)
    assert main(["export", run, str(out)]) == 2
    assert (
        inner == [None, 0]
        and "was created by another process in the meantime; name another OUT" in capsys.readouterr().err
    )
    assert same(opened(out), trained.weights[2])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_flipped_bit_of_the_checkpoint_is_found(
    trained: Trained, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workspace / "run", tmp_path / "run")
    file = next((tmp_path / "run" / "checkpoints" / "pool").glob("00000006-head-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert f"the checkpoint after step 6 is damaged: {file}: its checksum does not match" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--step", "4"]) == 0


def test_what_is_wrong_is_said(
    trained: Trained, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, base, out = str(workspace / "run"), str(workspace / "base"), str(tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "target").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    for command, words in (
        (["export", run, out, "--step", "5"], "has no checkpoint after step 5; nearest: 6; there are 2, 4, 6"),
        (["export", str(tmp_path), out], f"{tmp_path} has no checkpoints; give a run folder"),
        (["export", run, str(tmp_path / "full")], "exists, and is not an empty folder"),
        (["export", run, out, "--base", str(tmp_path / "nowhere")], "the base model is not in"),
        (["export", run, out, "--shard-size", "five"], "got 'five'; allowed: a size such as 500MB or 5GB"),
        (["export", run, out, "--shard-size", "0GB"], "got '0GB'"),
        (["export", run, out, "--shard-size", "1B"], "got '1B'; allowed: a size such as 500MB or 5GB, at least 10KB"),
        (["export", run, out, "--shard-size", "9" * 400 + "GB"], "allowed: a size such as"),
        (["export", run, "."], ".: is the current folder, or contains it; name a new folder as OUT"),
        (["export", run, ".."], "..: is the current folder, or contains it"),
        (["export", run, f"{run}/.."], "is the current folder, or contains it"),
        (["export", run, f"{run}/model"], f"is inside {run}, which is only read"),
        (["export", run, f"{run}/checkpoints/pool/new"], f"is inside {run}, which is only read"),
        (["apply", base, str(tmp_path / "full"), f"{base}/out"], f"is inside {base}, which is only read"),
        (["export", run, str(tmp_path / "link")], "is a link; name a new folder as OUT"),
        (["export", run, str(tmp_path / "dangling")], "is a link; name a new folder as OUT"),
        (["export", run, str(tmp_path / "full" / "mine.txt" / "out")], "mine.txt is not a folder; name another OUT"),
        (["export", run, "a\0b"], "argument OUT: got 'a\\x00b'; allowed: a path"),
        (["export", "a\0b", out], "argument RUN: got 'a\\x00b'; allowed: a path"),
        (["export", run, "x" * 300], "argument OUT: got 'xxx"),
        (["export", run, str(tmp_path / ("x" * 250))], "a name of 250 bytes; allowed for OUT: 237"),
        (["export", run, out, "--base", "x" * 300], "argument --base: got 'xxx"),
        (["export", "~nobody-here/x", out], "argument RUN: got '~nobody-here/x'"),
        (["checkpoints", "x" * 300], "RUN: got 'xxx"),
        (["checkpoints", "~nobody-here/x"], "RUN: got '~nobody-here/x'"),
        (["export", run], "OUT"),
        (["export", run, out, "--step", "2", "--best"], "not allowed with"),
        (["apply", str(workspace / "base"), str(tmp_path / "full"), out], "delta.json: cannot be read"),
    ):
        assert main(command) == 2, command
        assert words in capsys.readouterr().err, command
    assert (tmp_path / "full" / "mine.txt").read_text() == "x" and not (tmp_path / "out").exists()
    assert not list((tmp_path / "target").iterdir()) and not (workspace / "run" / "model").exists()
    assert main(["export", "--help"]) == 0 and "--shard-size SIZE" in capsys.readouterr().out


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of all new tensors that are alive whenever a block is taken, and whenever a shard is written."""
    gc.collect()
    gc.freeze()  # `get_objects` then leaves out what was there before, and is quick
    seen: list[int] = []

    def note() -> None:
        storages = {}
        for found in gc.get_objects():
            if isinstance(found, torch.Tensor) and not found.is_meta:
                storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
        seen.append(sum(storages.values()))

    def watched(function: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            note()
            return function(*arguments, **options)

        return wrapper

    monkeypatch.setattr(shards_module, "_on_disk", watched(shards_module._on_disk))
    monkeypatch.setattr(shards_module, "save_file", watched(shards_module.save_file))
    note()
    yield seen
    gc.unfreeze()


@pytest.mark.parametrize("command", ["export", "apply"])
def test_no_more_than_a_shard_and_a_block_is_held(
    trained: Trained, workspace: Path, tmp_path: Path, command: str, request: pytest.FixtureRequest
) -> None:
    delta = tmp_path / "delta"
    if command == "apply":
        assert main(["export", str(workspace / "run"), str(delta), "--delta"]) == 0
    held = request.getfixturevalue("held")
    words = (
        ["export", str(workspace / "run")] if command == "export" else ["apply", str(workspace / "base"), str(delta)]
    )
    assert main([*words, str(tmp_path / "out"), "--shard-size", "0.04MB"]) == 0
    whole = sum(t.numel() for t in trained.weights[6].values()) * 2
    largest = max(
        trained.weights[6]["model.embed_tokens.weight"].numel() * 2,
        sum(t.numel() for name, t in trained.weights[6].items() if ".layers.0." in name) * 2,
    )
    assert len(held) > 8
    assert max(held) - held[0] <= SHARD + largest < whole


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_those_of_save_pretrained(tmp_path: Path, family: str) -> None:
    """Of models that were built, and of the same when they were loaded, which transformers names in another way."""
    built = tiny_model(family)
    built.save_pretrained(tmp_path / "theirs")
    for model in (built, AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")):
        write_model(
            model, bytes_tokenizer(), tmp_path / "ours", lambda piece: {n: t.clone() for n, t in piece.tensors.items()}
        )
        assert same(*(load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "theirs")))


ADAPTERS = {
    "lora": ["method=lora"],
    "lora-fa": ["method=lora", "substrate.frozen=[lora_A]", "deepspeed=zero2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lisa", *ADAPTERS])
def test_the_command_writes_what_the_run_wrote(tmp_path: Path, method: str) -> None:
    """LISA on a model that was built from a seed."""
    write_inputs(tmp_path)
    values = ADAPTERS.get(method, [])
    if values:
        write_base(tmp_path / "base")
        values = [*values, "model.path=base", "model.random=null"]
    finished = forked.run(["tiny.yaml", "checkpoint.every=3", *values], tmp_path)
    assert finished.code == 0, finished.everything
    run = tmp_path / "runs" / "tiny"
    exported = forked.command(["export", str(run), "out"], tmp_path)
    assert exported.code == 0, exported.everything
    name, weights = ("adapter", "adapter_model") if values else ("model", "model")
    ours, theirs = (load_file(folder / f"{weights}.safetensors") for folder in (tmp_path / "out", run / name))
    assert same(ours, theirs)
    if values:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        PeftModel.from_pretrained(base, str(tmp_path / "out"))
        ours, theirs = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "out", run / name))
        for config in (ours, theirs):
            config["target_modules"].sort()  # a set in PEFT
        assert ours == theirs
