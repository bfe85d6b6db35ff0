"""Refuse manifests and files with valid checksums and odd contents."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.export.trained_run import HEAD, Trained, change_manifest
from trainer.cli.main import main

ODD_MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a step that is text": lambda body: body.update(step="6"),
    "a step below 0": lambda body: body.update(step=-6),
    "another format": lambda body: body.update(format="1"),
    "units in a list": lambda body: body.update(units=[1]),
    "a unit of nothing": lambda body: body["units"].update(head=[]),
    "a unit of no file": lambda body: body["units"].update(head="x"),
    "a unit of this name": lambda body: body["units"].update({"../x": body["units"]["head"]}),
    "a block too many": lambda body: body["units"].update({"block-099": body["units"]["head"]}),
    "another unit's files": lambda body: body["units"].update(embeddings=body["units"]["head"]),
    "half a unit": lambda body: body["units"]["head"].pop(),
    "a file twice": lambda body: body["units"]["head"].append(body["units"]["head"][0]),
    "negative bytes": lambda body: body["units"]["head"][0].update(bytes=-1),
    "bytes that are text": lambda body: body["units"]["head"][0].update(bytes="1"),
    "a file elsewhere": lambda body: body["units"]["head"][0].update(name="../../../etc/passwd"),
    "a name with NUL": lambda body: body["units"]["head"][0].update(name="a\0b"),
    "a name too long": lambda body: body["units"]["head"][0].update(name="x" * 300),
    "a key too many": lambda body: body["units"]["head"][0].update(mode=7),
    "state that is text": lambda body: body.update(state="x"),
    "no state": lambda body: body.pop("state"),
    "a best that is a map": lambda body: body["state"].update(best={"a": 1}),
    "ranks below 1": lambda body: body["state"].update(ranks=0),
    "fingerprints that are numbers": lambda body: body["state"].update(base={"rest": 3}),
    "an identity of another kind": lambda body: body["state"].update(identity={"config": 3}),
    "a configuration that is text": lambda body: body["state"]["run"].update(config="x"),
    "a configuration with a key too many": lambda body: body["state"]["run"]["config"].update(new=1),
    "a path that is a map": lambda body: body["state"]["run"]["config"]["model"].update(path={"a": 1}),
    "no run": lambda body: body["state"].update(run={}),
}


@pytest.mark.parametrize("name", ODD_MANIFESTS)
def test_an_odd_manifest_with_a_right_checksum_is_refused(
    trained: Trained, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    shutil.copytree(workspace / "run", tmp_path / "run")
    change_manifest(tmp_path / "run", ODD_MANIFESTS[name])
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") <= 12 and not (tmp_path / "out").exists()
    assert main(["checkpoints", str(tmp_path / "run")]) in (0, 1)


def change_file(run: Path, unit: str, change: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> None:
    """Give the file of rank 0 for `unit` other tensors and metadata, under the checksums that it then has."""

    def replace(body: dict[str, Any]) -> None:
        record = body["units"][unit][0]
        path = run / "checkpoints" / "pool" / record["name"]
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = {key: json.loads(text) for key, text in file.metadata().items()}
        change(tensors, metadata)
        save_file(tensors, path, {key: json.dumps(value) for key, value in metadata.items()})
        data = path.read_bytes()
        record.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    change_manifest(run, replace)


ODD_FILES: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], Any]] = {
    "overlapping ranges": lambda tensors, said: (
        said["ranges"].update({HEAD: [0, said["ranges"][HEAD][1] + 8]}),
        [tensors.update({k: torch.cat([t, t[:8]])}) for k, t in tensors.items() if k.endswith(HEAD)],
    ),
    "a range of more than there is": lambda tensors, said: said["ranges"].update({HEAD: [0, 10**12]}),
    "a range below 0": lambda tensors, said: said["ranges"].update({HEAD: [-4, said["ranges"][HEAD][1] - 4]}),
    "a range backwards": lambda tensors, said: said["ranges"].update({HEAD: [4, 0]}),
    "a range that is text": lambda tensors, said: said["ranges"].update({HEAD: "all"}),
    "ranges in a list": lambda tensors, said: said.update(ranges=[1]),
    "no ranges": lambda tensors, said: said.pop("ranges"),
    "a step count of NaN": lambda tensors, said: said["scalars"].update({HEAD: {"step": float("nan")}}),
    "a step count of infinity": lambda tensors, said: said["scalars"].update({HEAD: {"step": 1e999}}),
    "a step count below 0": lambda tensors, said: said["scalars"].update({HEAD: {"step": -1.0}}),
    "a step count that is text": lambda tensors, said: said["scalars"].update({HEAD: {"step": "1"}}),
    "masters in fp64": lambda tensors, said: tensors.update({f"master:{HEAD}": tensors[f"master:{HEAD}"].double()}),
    "masters in int8": lambda tensors, said: tensors.update({f"master:{HEAD}": tensors[f"master:{HEAD}"].char()}),
    "masters in two dimensions": lambda tensors, said: tensors.update(
        {f"master:{HEAD}": tensors[f"master:{HEAD}"].view(2, -1)}
    ),
    "no masters": lambda tensors, said: tensors.pop(f"master:{HEAD}"),
    "nothing": lambda tensors, said: (tensors.clear(), said.update(ranges={}, scalars={})),
    "another name": lambda tensors, said: (
        tensors.update({k.replace("lm_head", "lm_feet"): t.clone() for k, t in tensors.items()}),
        said["ranges"].update({"lm_feet.weight": said["ranges"][HEAD]}),
    ),
    "entries outside": lambda tensors, said: tensors.update(
        {f"entries.indices:{HEAD}": torch.tensor([10**9]), f"entries.weight:{HEAD}": torch.ones(1)}
    ),
    "an entry twice": lambda tensors, said: tensors.update(
        {f"entries.indices:{HEAD}": torch.tensor([3, 3]), f"entries.weight:{HEAD}": torch.ones(2)}
    ),
    "fewer values than entries": lambda tensors, said: tensors.update(
        {f"entries.indices:{HEAD}": torch.tensor([3, 4]), f"entries.weight:{HEAD}": torch.ones(1)}
    ),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_an_odd_file_with_a_right_checksum_is_refused(
    trained: Trained, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    shutil.copytree(workspace / "run", tmp_path / "run")
    change_file(tmp_path / "run", "head", ODD_FILES[name])
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "lm_" in (said := capsys.readouterr().err) or "00000006-head" in said
    assert not (tmp_path / "out").exists()
