"""A run on a stream, killed in the middle of an epoch on two ranks and started again, comes to the same end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import forked
from tests.checkpoint.supervisor import supervise
from tests.checkpoint.test_launch_resume import assert_same
from tests.comparing import largest_difference
from tests.launching import metrics, write_inputs
from trainer.cli.main import main

# 40 rows in windows of 16, and four in a step: an epoch ends in the middle of an interval.
VALUES = [
    "tiny.yaml", "data.streaming=true", "data.shuffle_rows=16", "data.eval_fraction=0", "data.eval=eval.jsonl",
    "train.steps=16", "eval.every=8", "checkpoint.every=3", "selector.interval=3",
]  # fmt: skip
CASES = {
    "offloaded": ["deepspeed=zero3_offload", "bank.name=cpu"],
    "packed": ["deepspeed=zero2", "data.packing=true"],
    "weights": ["deepspeed=zero3_hpz", "data.train=[{path: train.jsonl, weight: 2}, {path: other.jsonl, weight: 1}]"],
    "adapters, probes of the stream": [
        "method=ist", "substrate.peft={peft_type: LORA, r: 2, target_modules: [q_proj]}", "selector.update_every=2",
        "selector.probe.batch_size=3",
    ],
}  # fmt: skip


def write(folder: Path) -> None:
    folder.mkdir()
    write_inputs(folder)
    said = [("user", f"{n}?") for n in range(25)]
    rows = [
        {"messages": [{"role": role, "content": text}, {"role": "assistant", "content": text}]} for role, text in said
    ]
    (folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "eval.jsonl").write_text("".join(lines[::5]))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_a_run_on_a_stream_that_is_killed_comes_to_the_same_end(tmp_path: Path, case: str) -> None:
    values = [*VALUES, *CASES[case]]
    folders = [tmp_path / name for name in ("undisturbed", "killed")]
    for folder in folders:
        write(folder)
    finished = forked.run(values, folders[0])
    assert finished.code == 0, finished.everything
    assert "train.jsonl: streamed (1 file, " in finished.everything and "on streamed samples" in finished.everything
    supervise(folders[1], folders[1] / "runs" / "tiny", values, kills=1, steps=14, seed=3)
    undisturbed, killed = (folder / "runs" / "tiny" for folder in folders)
    if case.startswith("adapters"):
        assert metrics(killed)[-1]["step"] == 16 and losses(killed) == losses(undisturbed)
    else:
        assert_same(killed, undisturbed)
    cached = [file.name for file in (folders[1] / "runs" / "cache").iterdir() if file.is_dir()]
    assert len(cached) == 1, "the rows to evaluate on, and nothing else"


def losses(run: Path) -> list[tuple[float, float]]:
    return [(line["step"], line["loss"]) for line in metrics(run) if "loss" in line]


@pytest.mark.slow
def test_one_rank_goes_on_where_two_were_and_a_bad_row_ends_both(tmp_path: Path) -> None:
    write(folder := tmp_path / "here")
    values = [*VALUES, "deepspeed=zero2", "bank.name=cpu", "checkpoint.keep=9"]
    finished = forked.run(values, folder)
    assert finished.code == 0, finished.everything
    checkpoint = folder / "runs" / "tiny" / "checkpoints" / "step-00000009.json"
    again = forked.run([*values, f"resume={checkpoint}", "output=runs/one"], folder, ranks=1)
    assert again.code == 0, again.everything
    ours, theirs = (load_file(folder / "runs" / name / "model" / "model.safetensors") for name in ("one", "tiny"))
    assert largest_difference(ours, theirs) < 1e-5

    # Behind the first window, so that it is found in the middle of the run.
    (folder / "train.jsonl").open("a").write("{\n")
    refused = forked.run([*values, "output=runs/bad", "data.shuffle_rows=40"], folder)
    assert refused.code == 2 and "Traceback" not in refused.everything
    assert "train.jsonl:41: not JSON" in refused.stderr


def test_prepare_and_the_dry_run_report_on_the_first_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder := tmp_path / "here")
    monkeypatch.chdir(folder)
    assert main(["prepare", *VALUES, "--show", "1"]) == 0
    said = capsys.readouterr().out
    assert said.count("train.jsonl, sample 1: 34 tokens") == 1
    assert "train.jsonl: streamed (1 file, " in said and ", of the first rows 16 samples (0 truncated" in said
    assert main(["train", *VALUES, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "train.jsonl: streamed (1 file, " in said and "steps: 16 of 4 sequences" in said
    assert main(["prepare", *VALUES, "train.steps=null", "train.epochs=2"]) == 2
    assert "train.epochs: 2, but with data.streaming no length is known" in capsys.readouterr().err
