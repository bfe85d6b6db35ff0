"""Exports from checkpoints, and deltas: what is written is what was trained, and no more than a block is held."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import trainer.config
from tests import distributed
from tests.engine.parity import Cell, deepspeed_config, full_weights, make_engine, train_step
from tests.launching import deepspeed, launch, write_inputs
from tests.models import FAMILIES, tiny_model
from trainer import build
from trainer import model as models
from trainer import shards as shards_module
from trainer.__main__ import main
from trainer.checkpoint import Checkpoints
from trainer.checkpoint.fingerprint import Fingerprint
from trainer.data.tokenizer import bytes_tokenizer
from trainer.export import export
from trainer.shards import write_model

SHARD = 40_000  # bytes; a block of the model below has 15 488 in bf16, the embeddings 16 896
SETTINGS = [
    "output=run",
    "model.path=base",
    "model.tokenizer=bytes",
    "model.dtype=bf16",
    "deepspeed=zero3",
    "selector={name: uniform, blocks: 1, interval: 2}",
    "bank.name=cpu",
    "always_on.norm=false",
    "train.global_batch_size=4",
    "train.steps=6",
    "data.train=owner/name",
]


def write_base(folder: Path, **fields: Any) -> None:
    """In fp32, so that it is not the dtype of training."""
    tiny_model("llama", vocab_size=len(bytes_tokenizer()), **fields).save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)


@dataclass(frozen=True)
class Trained:
    """The weights on rank 0 after 2, 4 and 6 steps."""

    weights: dict[int, dict[str, Tensor]]


def train(rank: int, place: Path) -> Trained:
    """Six steps with a checkpoint every two, and an export of the end in shards; runs in each rank."""
    cell = Cell(stage=3, ranks=2, dtype="bf16", steps=6)
    config = trainer.config.load(None, [setting.replace("=base", f"={place}/base") for setting in SETTINGS])
    model = models.load(config.model, bytes_tokenizer(), seed=0, deepspeed=deepspeed_config(cell, micro_batch=2))
    sparse = build.prepare_model(config, model.train(), 6)
    engine = make_engine(cell, model, sparse)
    sparse.attach(engine)
    checkpoints = Checkpoints(sparse, place / "run", keep=9, asynchronous=False)
    weights = {}
    for step in range(6):
        train_step(cell, engine, step, rank)
        if step % 2:
            checkpoints.is_best(step + 1, abs(step - 3.0))
            checkpoints.save(step + 1, {"config": config.model_dump(mode="json")})
            weights[step + 1] = full_weights(engine)
    checkpoints.finish()
    export(engine, bytes_tokenizer(), place / "live", shard_size=SHARD)
    engine.destroy()
    return Trained(weights)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export_run")
    write_base(place / "base")
    return place


@pytest.fixture(scope="module")
def trained(place: Path) -> Trained:
    return distributed.run(train, place, ranks=2)[0]


def opened(folder: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    return {name: parameter.detach().float() for name, parameter in model.named_parameters()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def files(folder: Path, but: str = "") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != but}


def test_shards_of_a_live_engine_hold_its_weights(trained: Trained, place: Path) -> None:
    assert same(opened(place / "live"), trained.weights[6])
    sizes = [path.stat().st_size for path in place.glob("live/model-*-of-*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < SHARD + 4096, "headers apart"
    assert len({path.stat().st_mode for path in place.glob("live/*.*")}) == 1
    index = json.loads((place / "live" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in trained.weights[6].values())


def test_a_checkpoint_becomes_the_model_that_was_trained(trained: Trained, place: Path) -> None:
    out = place / "newest"
    assert main(["export", str(place / "run"), str(out), "--shard-size", "0.04MB"]) == 0
    assert files(out) == files(place / "live"), "the same files as from the live engine"
    for step, which in ((2, ["--step", "2"]), (4, ["--best"])):
        assert main(["export", str(place / "run"), str(place / f"step-{step}"), *which]) == 0
        assert same(opened(place / f"step-{step}"), trained.weights[step])
        assert not same(trained.weights[step], trained.weights[6])


def test_a_delta_and_its_base_make_the_model(trained: Trained, place: Path) -> None:
    """Of another place than the base was in."""
    moved = place / "moved"
    shutil.copytree(place / "base", moved)
    assert main(["export", str(place / "run"), str(place / "delta"), "--delta", "--base", str(moved)]) == 0
    changed = load_file(place / "delta" / "delta.safetensors")
    assert 0 < sum(name.endswith("q_proj.weight") for name in changed) < 4 and "model.norm.weight" not in changed
    assert main(["apply", str(moved), str(place / "delta"), str(place / "applied"), "--shard-size", "0.04MB"]) == 0
    tokenizer = "tokenizer_config.json"  # says where it was loaded from
    assert files(place / "applied", but=tokenizer) == files(place / "live", but=tokenizer)


def test_another_base_is_refused_with_the_block(
    trained: Trained, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(place / "run"), str(tmp_path / "delta"), "--delta"]) == 0
    changed = load_file(tmp_path / "delta" / "delta.safetensors")
    trains = next(i for i in range(4) if f"model.layers.{i}.mlp.up_proj.weight" in changed)
    frozen = next(i for i in range(4) if f"model.layers.{i}.mlp.up_proj.weight" not in changed)
    for block, refusing in ((frozen, ("export", "delta", "apply")), (trains, ("delta", "apply"))):
        other = tmp_path / f"other-{block}"
        shutil.copytree(place / "base", other)
        weights = load_file(other / "model.safetensors")
        weights[f"model.layers.{block}.mlp.up_proj.weight"][0, 0] += 1
        save_file(weights, other / "model.safetensors", {"format": "pt"})
        run, out = str(place / "run"), str(tmp_path / "out")
        commands = {
            "export": ["export", run, out, "--base", str(other)],
            "delta": ["export", run, out, "--delta", "--base", str(other)],
            "apply": ["apply", str(other), str(tmp_path / "delta"), out],
        }
        for name in refusing:
            if name == "delta" and block == frozen:
                continue  # it reads what changed alone
            assert main(commands[name]) == 2, name
            said = capsys.readouterr().err
            assert f"the base model in {other} is another one than when the run began: block-{block:03d} has" in said
            assert not list(tmp_path.glob("out*"))


def test_a_changed_delta_is_refused(
    trained: Trained, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    delta = tmp_path / "delta"
    assert main(["export", str(place / "run"), str(delta), "--delta"]) == 0
    weights = load_file(delta / "delta.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, delta / "delta.safetensors")
    assert main(["apply", str(place / "base"), str(delta), str(tmp_path / "out")]) == 2
    assert "delta.safetensors: lm_head.weight was changed: its SHA-256 is not that in" in capsys.readouterr().err
    del weights["lm_head.weight"]
    save_file(weights, delta / "delta.safetensors")
    assert main(["apply", str(place / "base"), str(delta), str(tmp_path / "out")]) == 2
    assert "do not fit: lm_head.weight is in only one of them" in capsys.readouterr().err


def test_a_flipped_bit_of_the_checkpoint_is_found(
    trained: Trained, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    file = next((tmp_path / "run" / "checkpoints" / "pool").glob("00000006-head-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert f"the checkpoint after step 6 is damaged: {file}: its checksum does not fit" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--step", "4"]) == 0


def test_what_is_wrong_is_said(
    trained: Trained, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(place / "run"), str(tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    for command, words in (
        (["export", run, out, "--step", "5"], "has no checkpoint after step 5; nearest: 6; there are 2, 4, 6"),
        (["export", str(tmp_path), out], f"{tmp_path} has no checkpoints; give a run folder"),
        (["export", run, str(tmp_path / "full")], "is there already, and not an empty folder"),
        (["export", run, out, "--base", str(tmp_path / "nowhere")], "the base model is not in"),
        (["export", run, out, "--shard-size", "five"], "got 'five'; allowed: a size such as 500MB or 5GB"),
        (["export", run, out, "--shard-size", "0GB"], "got '0GB'"),
        (["export", run], "OUT"),
        (["export", run, out, "--step", "2", "--best"], "not allowed with"),
        (["apply", str(place / "base"), str(tmp_path / "full"), out], "delta.json: cannot be read"),
    ):
        assert main(command) == 2, command
        assert words in capsys.readouterr().err, command
    assert (tmp_path / "full" / "mine.txt").read_text() == "x" and not (tmp_path / "out").exists()
    assert main(["export", "--help"]) == 0 and "--shard-size SIZE" in capsys.readouterr().out


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of all tensors that are alive whenever a block is taken, and whenever a shard is written."""
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


@pytest.mark.parametrize("command", ["export", "apply"])
def test_no_more_than_a_shard_and_a_block_is_held(
    trained: Trained, place: Path, tmp_path: Path, command: str, request: pytest.FixtureRequest
) -> None:
    delta = tmp_path / "delta"
    if command == "apply":
        assert main(["export", str(place / "run"), str(delta), "--delta"]) == 0
    gc.collect()
    held = request.getfixturevalue("held")
    words = ["export", str(place / "run")] if command == "export" else ["apply", str(place / "base"), str(delta)]
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


def test_fingerprints_do_not_depend_on_how_a_tensor_is_cut() -> None:
    weights = torch.randn(1000, dtype=torch.bfloat16)
    whole, parts = Fingerprint(), Fingerprint()
    whole.add("x", weights)
    for start in (700, 0, 300):
        parts.add("x", weights[start : {0: 300, 300: 700, 700: 1000}[start]], start)
    other = Fingerprint()
    other.add("y", weights)
    assert str(whole) == str(parts) != str(other) and len(str(whole)) == 16


ADAPTERS = {
    "lora": ["method=lora"],
    "lora-fa": ["method=lora", "substrate.frozen=[lora_A]", "deepspeed=zero2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lisa", *ADAPTERS])
def test_the_command_writes_what_the_run_wrote(tmp_path: Path, method: str) -> None:
    """Under the real launcher; LISA on a model that was built from a seed."""
    write_inputs(tmp_path)
    values = ADAPTERS.get(method, [])
    if values:
        write_base(tmp_path / "base")
        values = [*values, "model.path=base", "model.random=null"]
    finished = launch(deepspeed("tiny.yaml", "checkpoint.every=3", *values), tmp_path)
    assert finished.code == 0, finished.everything
    run = tmp_path / "runs" / "tiny"
    exported = launch(["python", "-m", "trainer", "export", str(run), "out"], tmp_path)
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
