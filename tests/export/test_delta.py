"""Write deltas, and apply them to the right base and to others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.export.trained_run import HEAD, Trained, files, rewrite
from trainer.cli.main import main


def test_a_delta_and_its_base_make_the_model(trained: Trained, workspace: Path) -> None:
    """Of another workspace than the base was in."""
    moved = workspace / "moved"
    shutil.copytree(workspace / "base", moved)
    assert main(["export", str(workspace / "run"), str(workspace / "delta"), "--delta", "--base", str(moved)]) == 0
    changed = load_file(workspace / "delta" / "delta.safetensors")
    assert 0 < sum(name.endswith("q_proj.weight") for name in changed) < 4 and "model.norm.weight" not in changed
    assert (
        main(["apply", str(moved), str(workspace / "delta"), str(workspace / "applied"), "--shard-size", "0.04MB"]) == 0
    )
    tokenizer = "tokenizer_config.json"  # says where it was loaded from
    assert files(workspace / "applied", but=tokenizer) == files(workspace / "live", but=tokenizer)


def test_another_base_is_refused_with_the_block(
    trained: Trained, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(workspace / "run"), str(tmp_path / "delta"), "--delta"]) == 0
    changed = load_file(tmp_path / "delta" / "delta.safetensors")
    trains = next(i for i in range(4) if f"model.layers.{i}.mlp.up_proj.weight" in changed)
    frozen = next(i for i in range(4) if f"model.layers.{i}.mlp.up_proj.weight" not in changed)
    for block, refusing in ((frozen, ("export", "delta", "apply")), (trains, ("delta", "apply"))):
        other = tmp_path / f"other-{block}"
        shutil.copytree(workspace / "base", other)
        weights = load_file(other / "model.safetensors")
        weights[f"model.layers.{block}.mlp.up_proj.weight"][0, 0] += 1
        save_file(weights, other / "model.safetensors", {"format": "pt"})
        run, out = str(workspace / "run"), str(tmp_path / "out")
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
            assert f"the base model in {other} is not the one that the run began with: block-{block:03d} has" in said
            assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        ("config.json", {"rms_norm_eps": 0.5}, "config.json: rms_norm_eps is 0.5, and was 1e-06"),
        (
            "config.json",
            {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
            "config.json: rope_parameters.rope_theta is 500.0, and was 10000.0",
        ),
        ("generation_config.json", {"temperature": 0.25}, "generation_config.json: temperature is 0.25, and was "),
        ("tokenizer_config.json", {"padding_side": "left"}, "tokenizer: padding_side is 'left', and was 'right'"),
        ("tokenizer_config.json", {"eos_token": "<|pad|>"}, "tokenizer: special.eos_token is '<|pad|>', and was '<|"),
    ],
)
def test_another_configuration_of_the_base_is_refused_with_the_key(
    trained: Trained,
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    fields: dict[str, Any],
    words: str,
) -> None:
    run, out, delta, other = (str(tmp_path / name) for name in ("run", "out", "delta", "other"))
    shutil.copytree(workspace / "run", run)
    shutil.copytree(workspace / "base", other)
    assert main(["export", run, delta, "--delta"]) == 0
    rewrite(Path(other) / file, **fields)
    of_tokenizer = file == "tokenizer_config.json"
    elsewhere = ["--tokenizer", other] if of_tokenizer else ["--base", other]
    commands = [["export", run, out, *elsewhere], ["export", run, out, "--delta", *elsewhere]]
    commands += [] if of_tokenizer else [["apply", other, delta, out]]
    for command in commands:
        assert main(command) == 2, command
        assert words in capsys.readouterr().err
        assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_changed_tokenizer_of_a_delta_is_refused(
    trained: Trained, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    delta, out = tmp_path / "delta", str(tmp_path / "out")
    assert main(["export", str(workspace / "run"), str(delta), "--delta"]) == 0
    (delta / "added_tokens.json").write_text('{"<|new|>": 261}')  # not of the delta, and not read
    (delta / name).write_text((delta / name).read_text().replace("user", "usar"))
    assert main(["apply", str(workspace / "base"), str(delta), out]) == 2
    assert f"{delta / name}: was changed: its SHA-256 is not that in delta.json" in capsys.readouterr().err
    (delta / name).unlink()
    assert main(["apply", str(workspace / "base"), str(delta), out]) == 2
    assert f"{delta / name}: cannot be read" in capsys.readouterr().err


ODD_DELTAS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a format that is text": lambda info: info.update(format="1"),
    "another dtype": lambda info: info.update(dtype="bf17"),
    "a dtype that is a list": lambda info: info.update(dtype=["bf16"]),
    "blocks that are not there": lambda info: info.update(blocks="model.leyers"),
    "blocks that are null": lambda info: info.update(blocks=None),
    "no fingerprints": lambda info: info.update(fingerprints={}),
    "fingerprints that are numbers": lambda info: info.update(fingerprints=dict.fromkeys(info["fingerprints"], 3)),
    "checksums in a list": lambda info: info.update(sha256=list(info["sha256"])),
    "a checksum that is null": lambda info: info["sha256"].update({HEAD: None}),
    "a file elsewhere": lambda info: info["files"].update({"../../x": "0" * 64}),
    "a file in the root": lambda info: info["files"].update({"/etc/passwd": "0" * 64}),
    "a file with NUL": lambda info: info["files"].update({"a\0": "0" * 64}),
    "a file that is missing": lambda info: info["files"].update({"x.json": "0" * 64}),
    "a key too many": lambda info: info.update(run="sh"),
    "an identity of another kind": lambda info: info.update(identity=[1]),
    "a step of NaN": lambda info: info.update(step=float("nan")),
}


@pytest.mark.parametrize("name", ODD_DELTAS)
def test_an_odd_delta_is_refused(
    trained: Trained, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    delta = tmp_path / "delta"
    assert main(["export", str(workspace / "run"), str(delta), "--delta"]) == 0
    info = json.loads((delta / "delta.json").read_text())
    ODD_DELTAS[name](info)
    (delta / "delta.json").write_text(json.dumps(info))
    assert main(["apply", str(workspace / "base"), str(delta), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip() and not (tmp_path / "out").exists()


def test_a_changed_delta_is_refused(
    trained: Trained, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    delta = tmp_path / "delta"
    assert main(["export", str(workspace / "run"), str(delta), "--delta"]) == 0
    weights = load_file(delta / "delta.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, delta / "delta.safetensors")
    assert main(["apply", str(workspace / "base"), str(delta), str(tmp_path / "out")]) == 2
    assert "delta.safetensors: lm_head.weight was changed: its SHA-256 is not that in" in capsys.readouterr().err
    del weights["lm_head.weight"]
    save_file(weights, delta / "delta.safetensors")
    assert main(["apply", str(workspace / "base"), str(delta), str(tmp_path / "out")]) == 2
    assert "do not match: lm_head.weight is in only one of both" in capsys.readouterr().err
