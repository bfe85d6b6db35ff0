"""Run no code of folders from somebody else, and fetch nothing that they name."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.export.trained_run import Trained, change_manifest, rewrite
from trainer.cli.main import main


def test_a_template_cannot_be_written_elsewhere(
    trained: Trained, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a delta whose checksums fit, or that has none."""
    delta = tmp_path / "delta"
    assert main(["export", str(workspace / "run"), str(delta), "--delta"]) == 0
    (delta / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": "x"}, {"name": "../../../evil", "template": "y"}]
    rewrite(delta / "tokenizer_config.json", chat_template=templates)
    rewrite(delta / "delta.json", files=None, identity=None)
    assert main(["apply", str(workspace / "base"), str(delta), str(tmp_path / "out")]) == 2
    assert "a chat template named '../../../evil', which cannot be the name of a file" in capsys.readouterr().err
    assert not list(tmp_path.rglob("evil*")) and not list(tmp_path.parent.glob("evil*"))


# What a folder from somebody else would do, if it could.
CODE = """\
from pathlib import Path
from transformers import LlamaForCausalLM, LlamaConfig
Path({marker!r}).touch()
class Config(LlamaConfig):
    model_type = {kind!r}
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.mark.parametrize("kind", ["llama", "of_somebody"])
def test_code_of_a_folder_runs_only_where_the_command_line_says_so(
    trained: Trained, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Whatever the manifest allows; of a type that transformers has too, and of another."""
    base, run, marker = tmp_path / "base", tmp_path / "run", tmp_path / "marker"
    shutil.copytree(workspace / "base", base)
    shutil.copytree(workspace / "run", run)
    (base / "code.py").write_text(CODE.format(marker=str(marker), kind=kind))
    places = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    rewrite(base / "config.json", auto_map=places, model_type=kind)

    def allow(body: dict[str, Any]) -> None:
        body["state"]["run"]["config"]["model"].update(path=str(base), trust_remote_code=True)
        del body["state"]["identity"]

    change_manifest(run, allow)
    for more in ([], ["--delta"], ["--base", str(base)]):
        assert main(["export", str(run), str(tmp_path / "out"), *more]) == 2
        assert "--trust-remote-code" in capsys.readouterr().err and not marker.exists()
    assert main(["export", str(run), str(tmp_path / "out"), "--trust-remote-code"]) == 0
    assert marker.exists()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name].float(), weights) for name, weights in trained.weights[6].items())


def test_code_of_a_tokenizer_does_not_run(
    trained: Trained, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, delta, marker = tmp_path / "base", tmp_path / "delta", tmp_path / "marker"
    shutil.copytree(workspace / "base", base)
    assert main(["export", str(workspace / "run"), str(delta), "--delta"]) == 0
    rewrite(delta / "delta.json", files=None, identity=None)
    for folder in (base, delta):
        (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Mine: pass\n")
        auto_map = {"AutoTokenizer": ["code.Mine", None]}
        rewrite(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Mine")
    out = str(tmp_path / "out")
    main(["export", str(workspace / "run"), out, "--tokenizer", str(base)])
    shutil.rmtree(out, ignore_errors=True)
    main(["apply", str(workspace / "base"), str(delta), out])
    assert not marker.exists()


class Pickled:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_a_pickle_is_not_opened(
    trained: Trained, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, marker = tmp_path / "base", tmp_path / "marker"
    shutil.copytree(workspace / "base", base)
    (base / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Pickled(marker)}, base / "pytorch_model.bin")
    delta = tmp_path / "delta"
    assert main(["export", str(workspace / "run"), str(delta), "--delta"]) == 0
    run, out = str(workspace / "run"), str(tmp_path / "out")
    for command in (["export", run, out, "--base", str(base)], ["apply", str(base), str(delta), out]):
        assert main(command) == 2
        assert "has no file named model.safetensors" in capsys.readouterr().err
    assert not marker.exists()


def test_a_name_of_the_hub_is_not_fetched(
    trained: Trained,
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    def refuse(*address: Any, **options: Any) -> Any:
        asked.append(str(address))
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for key, option in (("path", "--base NAME"), ("tokenizer", "--tokenizer NAME")):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(workspace / "run", tmp_path / "run")
        change = {key: "owner/name"}
        change_manifest(tmp_path / "run", lambda body: body["state"]["run"]["config"]["model"].update(change))  # noqa: B023
        assert main(["export", "run", "out"]) == 2
        assert f"fetch it from the Hub with {option}" in capsys.readouterr().err and not asked
    assert main(["export", "run", "out", "--tokenizer", "owner/name"]) == 2 and asked, "somebody asked"
