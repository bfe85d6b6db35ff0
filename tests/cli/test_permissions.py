"""Every command refuses files and folders of another user that are closed to it, with a message and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tests import forked
from tests.config.forks import import_everything, in_fork
from tests.launching import Finished, write_inputs
from trainer.cli.main import main

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, and make files for one")

NOBODY = 65534
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
OWN = ("tiny.yaml", "model.random=null", "model.path=model")
# The words of each command before and after a recipe and its settings.
RECIPE_COMMANDS = {
    "train": ("--dry-run",),
    "prepare": (),
    "plan": (),
    "submit": ("--gpus=1", "--time=1:00:00", "--print"),
}
# What is closed: (words, permissions by path, what the refusal names).
CLOSED: dict[str, tuple[tuple[str, ...], dict[str, int], str]] = {
    "a model": (OWN, {"model": 0o700}, "model.path"),
    "a model that can be listed and not entered": (OWN, {"model": 0o744}, "model.path"),
    "a model that can be entered and not listed": (OWN, {"model": 0o711}, "model.path"),
    "a model's configuration": (OWN, {"model/config.json": 0o600}, "model.path"),
    "the folder around a model": ((*OWN, "model.path=set/model"), {"set": 0o700}, "model.path"),
    "an adapter": ((*OWN, "method=lora", "substrate.adapter=adapter"), {"adapter": 0o700}, "substrate.adapter"),
    "a tokenizer": ((*OWN, "model.tokenizer=tokenizer"), {"tokenizer": 0o700}, "model.tokenizer"),
    "a recipe": (OWN, {"tiny.yaml": 0o600}, "tiny.yaml"),
    "a recipe in a folder": (("set/tiny.yaml", *OWN[1:]), {"set": 0o700}, "set/tiny.yaml"),
    "data": (OWN, {"train.jsonl": 0o600}, "data.train"),
    "a folder of data": ((*OWN, "data.train=set"), {"set": 0o700}, "data.train"),
    "DeepSpeed's file": ((*OWN, "deepspeed=./ds.json"), {"ds.json": 0o600}, "deepspeed"),
    "a run to resume": ((*OWN, "resume=runs/run"), {"runs/run": 0o700}, "resume"),
    "a place for the run": ((*OWN, "output=set/run"), {"set": 0o700}, "output"),
    "a place for the cache": ((*OWN, "data.cache=set/cache"), {"set": 0o700}, "data.cache"),
}
NEEDS_NO_DATA = ("data", "a folder of data")  # which `plan` does not open
OTHERS: dict[str, tuple[tuple[str, ...], dict[str, int], str]] = {
    "checkpoints": (("checkpoints", "runs/run"), {"runs/run": 0o700}, "runs/run"),
    "export": (("export", "runs/run", "out"), {"runs/run": 0o700}, "runs/run"),
    "export into it": (("export", "runs/run", "set/out"), {"set": 0o700}, "set/out"),
    "apply a delta": (("apply", "model", "delta", "out"), {"delta": 0o700}, "delta"),
    "doctor": (("doctor", "--folder", "set/x"), {"set": 0o700}, "set/x"),
}
CASES = {
    (command, kind): ((command, *words, *RECIPE_COMMANDS[command]), modes, named)
    for command in RECIPE_COMMANDS
    for kind, (words, modes, named) in CLOSED.items()
    if command != "plan" or kind not in NEEDS_NO_DATA
} | {(words[0], kind): (words, modes, named) for kind, (words, modes, named) in OTHERS.items()}


def _write_files(workspace: Path) -> None:
    write_inputs(workspace)
    for folder in ("model", "adapter", "tokenizer", "set/model", "runs/run/checkpoints", "delta"):
        (workspace / folder).mkdir(parents=True)
    for folder in ("model", "set/model"):
        (workspace / folder / "config.json").write_text(json.dumps(MODEL))
        (workspace / folder / "model.safetensors").touch()
    (workspace / "adapter" / "adapter_config.json").write_text("{}")
    (workspace / "delta" / "delta.json").write_text("{}")
    (workspace / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    for name in ("tiny.yaml", "train.jsonl"):
        shutil.copy(workspace / name, workspace / "set")
    for path in [workspace, *workspace.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)


def _as_nobody(words: tuple[str, ...]) -> int:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    return main(words)


def _try_all(results: Path) -> None:
    """Run each case in a fork that becomes another user. Its parent imports everything first: Python itself may be in
    a folder that is closed to that user."""
    import_everything()
    import torch

    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        workspace = Path(folder)
        _write_files(workspace)
        cases = [(words, modes) for words, modes, _ in CASES.values()]
        cases += [((command, *OWN, *more), {}) for command, more in RECIPE_COMMANDS.items()]
        for words, modes in cases:
            before = {name: (workspace / name).stat().st_mode for name in modes}
            for name, mode in modes.items():
                (workspace / name).chmod(mode)
            found.append(asdict(in_fork(lambda words=words: _as_nobody(words), folder=workspace)))
            for name, mode in before.items():
                (workspace / name).chmod(mode)
    results.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Finished]]:
    """The outcome of every case, and of every command with nothing closed to it."""
    results = tmp_path_factory.mktemp("closed") / "results.json"
    process = forked.context().Process(target=_try_all, args=(results,))
    process.start()
    process.join()
    assert process.exitcode == 0
    names = [*CASES, *((command, "nothing") for command in RECIPE_COMMANDS)]
    recorded = [Finished(**each) for each in json.loads(results.read_text())]
    yield dict(zip(names, recorded, strict=True))


@pytest.mark.parametrize(("command", "kind"), CASES)
def test_what_is_closed_is_refused_by_name(command: str, kind: str, outcomes: dict[tuple[str, str], Finished]) -> None:
    outcome = outcomes[command, kind]
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.everything, outcome
    assert "Permission denied" in outcome.stderr and CASES[command, kind][2] in outcome.stderr, outcome.stderr


@pytest.mark.parametrize("command", RECIPE_COMMANDS)
def test_what_is_open_is_not(command: str, outcomes: dict[tuple[str, str], Finished]) -> None:
    assert outcomes[command, "nothing"].code == 0, outcomes[command, "nothing"]
