"""The benchmark that is to run unattended on a lent card does so at toy size on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "seventy_b.py"


def measure(folder: Path, *words: str, code: int = 0) -> list[dict[str, Any]]:
    file = folder / "figures.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, *words, "--json", file], capture_output=True, text=True, timeout=600, cwd=folder
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert [path.name for path in folder.glob("*.json")] == ["figures.json"]
    return json.loads(file.read_text())


@pytest.mark.slow
def test_lisa_with_its_state_on_the_host_is_measured_at_each_length_and_its_blocks_are_saved(tmp_path: Path) -> None:
    words = ("--shape", "tiny", "--lengths", "128", "256", "--save", str(tmp_path / "saved"), "--peak-flops", "1e12")
    (run,) = measure(tmp_path, *words)
    assert run["outcome"] == "measured" and run["weight_bytes"] == 2 * run["parameters"] == run["measured"]["weights"]
    # What DeepSpeed holds on the host, and nothing of the state anywhere else; groups are padded to two elements.
    assert run["measured"]["state_on_card"] == 0
    assert run["measured"]["host"] == pytest.approx(run["plan"]["state_on_host"], rel=1e-3)
    assert [length["tokens"] for length in run["lengths"]] == [128, 256]
    for length in run["lengths"]:
        assert length["tokens_per_second"] > 0 and length["switch_seconds_median"] > 0
        assert length["share_of_peak_flops"] == pytest.approx(length["flops_per_second"] / 1e12)
    assert run["lengths"][0]["flops_per_step"] < run["lengths"][1]["flops_per_step"] / 2
    folder = tmp_path / "saved" / "tiny-lisa"
    blocks = [file for file in folder.iterdir() if file.name.startswith("block-")]
    assert 2 <= len(blocks) == run["saved"]["blocks"] and (folder / "embeddings.safetensors").exists()
    with safe_open(blocks[0], "pt") as opened:
        assert len(opened.keys()) == 9


@pytest.mark.slow
def test_adapters_with_their_state_on_the_card(tmp_path: Path) -> None:
    words = ("--shape", "tiny", "--method", "ist", "lora", "--offload", "never", "--lengths", "32", "--batch", "2")
    ist, lora = measure(tmp_path, *words)
    assert ist["lengths"][0]["steps"] == 10 and ist["lengths"][0]["probe_seconds_median"] > 0
    assert ist["lengths"][0]["flops_per_step"] < lora["lengths"][0]["flops_per_step"]
    assert lora["lengths"][0]["probe_seconds_median"] is None and lora["measured"]["host"] == 0
    assert ist["plan"]["trained_parameters"] * 4 == lora["plan"]["trained_parameters"]  # one block of four


@pytest.mark.slow
def test_single_weights_of_a_whole_mask_and_of_one_that_grows(tmp_path: Path) -> None:
    words = ("--shape", "tiny", "--method", "id3", "--offload", "never", "--lengths", "32", "--budget", "1000")
    (whole,) = measure(tmp_path, *words)
    (growing,) = measure(tmp_path, *words, "--growth-steps", "100")
    assert whole["environment"]["command"] == " ".join(["python benchmarks/seventy_b.py", *words])
    assert whole["plan"]["trained_parameters"] == 1000 and whole["unmasked"] == 1000
    assert growing["unmasked"] == 10 * (2 + 6 + 1)  # before, measured, and watched for its peak
    # A master and two moments of each, and where it lies.
    assert whole["measured"]["state_on_card"] == pytest.approx(1000 * (12 + 8), rel=1e-2)
    assert growing["measured"]["state_on_card"] == pytest.approx(90 * (12 + 8), rel=5e-2)


def test_what_does_not_fit_the_time_is_stopped_and_what_follows_is_not_started(tmp_path: Path) -> None:
    first, second = measure(tmp_path, "--shape", "tiny", "8b", "--seconds", "0.9", code=1)
    assert first["outcome"].startswith("stopped after 1 s")
    assert second["outcome"].startswith("not started: the longest so far took 1 s") and second["shape"] == "8b"
