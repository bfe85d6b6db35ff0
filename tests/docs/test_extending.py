"""docs/extending.md: its files and changes, in a copy of the package, train through the launcher."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests import forked
from tests.docs.pages import ROOT, Block, blocks
from tests.launching import environment, free_port, launch, metrics, write_inputs

PAGE = ROOT / "docs" / "extending.md"
FILE = re.compile(r"`(trainer/[\w/]+\.py)`")


def _changed(source: str, diff: str) -> str:
    """Return `source` with the hunks of `diff`, which are separated by lines of @@ and found by their old lines."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.rstrip("\n").split("\n")
        old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        new = "\n".join(line[1:] for line in lines if not line.startswith("-"))
        assert source.count(old) == 1, f"found {source.count(old)} times:\n{old}"
        source = source.replace(old, new)
    return source


def _extend(copy: Path) -> None:
    """Do everything on the page in a copy of the checkout."""
    for name in ("trainer", "launch", "ds_configs"):
        shutil.copytree(ROOT / name, copy / name, symlinks=False)
    for block in blocks(PAGE):
        named = FILE.findall(block.before)
        if block.language == "diff":
            file = copy / named[-1]
            file.write_text(_changed(file.read_text(), block.text))
        elif block.language == "python" and named:
            (copy / named[-1]).write_text(block.text)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("extended")
    _extend(copy)
    return copy


def _command(extended: Path, workspace: Path, words: list[str]) -> str:
    variables = environment() | {"PYTHONPATH": str(extended), "OMP_NUM_THREADS": "1"}
    finished = launch(words, workspace, variables=variables)
    assert finished.code == 0, finished.everything
    return finished.everything


def test_each_addition_is_its_files_and_a_line_in_a_registry() -> None:
    """A selector is one file; a rule or a bank two, of which one imports no torch; each is named in one more. A
    method is only named."""
    touched: dict[str, list[str]] = {}
    for block in blocks(PAGE):
        named = FILE.findall(block.before)
        if named and block.language in ("python", "diff"):
            above = PAGE.read_text().splitlines()[: block.line]
            chapter = next(line[3:] for line in reversed(above) if line.startswith("## "))
            touched.setdefault(chapter, []).append(named[-1].removeprefix("trainer/"))
    assert touched == {
        "A selector": ["selectors/window.py", "selectors/__init__.py"],
        "An update rule": ["updates/lion.py", "settings/updates/lion.py", "settings/updates/__init__.py"],
        "A data format": ["data/formats/summary.py", "config/sources.py"],
        "A bank": ["engine/banks/host.py", "settings/banks/host.py", "settings/banks/__init__.py"],
        "A command": ["cli/size.py", "cli/main.py"],
        "A method": ["config/methods.py"],
    }


@pytest.mark.parametrize("block", blocks(PAGE, "diff"), ids=str)
def test_a_registry_gets_one_line_and_loses_none(block: Block) -> None:
    """And the import of a class, if the registry lists classes."""
    lines = block.text.splitlines()
    added = [line[1:] for line in lines if line.startswith("+")]
    imports = [line for line in added if line.startswith("from ")]
    assert len(added) - len(imports) == 1 and len(imports) <= 1
    assert not any(line.startswith("-") for line in lines)
    file = FILE.findall(block.before)[-1]
    assert bool(imports) == file.endswith("/__init__.py"), file


def test_the_changes_apply_to_the_package_as_it_is(tmp_path: Path) -> None:
    _extend(tmp_path)
    for path in (tmp_path / "trainer").rglob("*.py"):
        compile(path.read_text(), str(path), "exec")


@pytest.mark.slow
def test_a_method_from_the_page(extended: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    values = ["method=lisa_lora", "substrate.peft.r=2", "substrate.peft.target_modules=[q_proj]", "train.steps=2"]
    script = str(extended / "launch" / "train.py")
    said = _command(extended, tmp_path, [sys.executable, script, "tiny.yaml", *values, "schedule.warmup_steps=0"])
    assert "lisa_lora on a random llama (54,368 parameters, fp32), 1 rank, ZeRO stage 3\n" in said
    assert "2 of 4 blocks at a time (uniform, a new draw every 20 steps), with nothing else" in said
    assert (tmp_path / "runs" / "tiny" / "adapter").is_dir()


@pytest.mark.slow
def test_a_selector_a_rule_a_format_and_a_command_from_the_page(extended: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    rows = [{"document": f"Number {i} and {i % 7}. " * 3, "summary": f"{i}, {i % 7}"} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = ["selector={name: window, blocks: 2, interval: 2}", "update={name: lion}", "train.gradient_clipping=0"]
    values += ["data.max_length=64", "optimizer.lr=1e-3"]
    script = str(extended / "launch" / "train.py")
    said = _command(extended, tmp_path, [sys.executable, script, "tiny.yaml", *values, "--dry-run"])
    assert "2 of 4 blocks at a time (window, a new draw every 2 steps)" in said
    _command(
        extended, tmp_path, [sys.executable, "-m", "trainer", "plan", "tiny.yaml", *values, "--gpu-memory", "80GB"]
    )
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]
    _command(extended, tmp_path, [*launcher, script, "tiny.yaml", *values])
    lines = metrics(tmp_path / "runs" / "tiny")
    assert [line["active_blocks"] for line in lines if "loss" in line] == [[2, 3]] * 2 + [[1, 2]] * 2 + [[0, 1]] * 2
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[-1] < losses[0]
    assert "runs/tiny: " in _command(extended, tmp_path, [sys.executable, "-m", "trainer", "size", "runs/tiny"])
    usage = _command(extended, tmp_path, [sys.executable, "-m", "trainer", "--help"])
    assert re.search("^  size RUN +says how large a run folder is$", usage, re.MULTILINE)
    keys = _command(extended, tmp_path, [sys.executable, script, "--help"])
    assert "summary: {document, summary}, optionally system" in " ".join(keys.split())


@pytest.mark.slow
def test_a_bank_from_the_page(extended: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    script = str(extended / "launch" / "train.py")
    _command(extended, tmp_path, [sys.executable, script, "tiny.yaml", "bank.name=host", "output=runs/host"])
    assert forked.run(["tiny.yaml", "bank.name=cpu", "output=runs/cpu"], tmp_path, ranks=1).code == 0
    one, other = ([line.get("loss") for line in metrics(tmp_path / "runs" / bank)] for bank in ("cpu", "host"))
    assert one == other
