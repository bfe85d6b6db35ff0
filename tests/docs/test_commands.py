"""The `bash` blocks of the pages, run one after the other in one folder, as a reader does; training is cut short.

Commands in `console` blocks name models and machines that are not here: `test_pages.py` checks their words.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import forked
from tests.docs.pages import ROOT, blocks
from tests.docs.test_pages import commands

pytestmark = pytest.mark.slow
# After warm-up, with a checkpoint and an evaluation.
SHORT = ["train.steps=12", "schedule.warmup_steps=2", "eval.every=6", "checkpoint.every=6"]
# Run by other tests: of the launchers, the machine, the examples and the benchmarks.
ELSEWHERE = ("make", "pip", "source", "doctor", "examples/", "benchmarks/", "runs/own_loop")


def arguments(words: list[str]) -> tuple[list[str], int]:
    """What follows `python -m trainer`, and the number of ranks."""
    ranks = int(words[words.index("--num_accelerators") + 1]) if "--num_accelerators" in words else 1
    if "trainer" in words:
        return words[words.index("trainer") + 1 :], ranks
    after = words[words.index("launch/train.py") + 1 :]
    recipe = [] if any(word.endswith(".yaml") for word in after) else ["launch/recipes/quickstart.yaml"]
    return ["train", *recipe, *after], ranks


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder beside the checkout's `launch/`, in which the quick start has run."""
    folder = tmp_path_factory.mktemp("reader") / "checkout"
    folder.mkdir()
    (folder / "launch").symlink_to(ROOT / "launch")
    assert forked.run(["launch/recipes/quickstart.yaml", *SHORT], folder).code == 0
    return folder


# Two pages may have the same command.
HERE = {
    tuple(words): str(block)
    for block, words in commands()
    if block.language == "bash" and not any(part in word for part in ELSEWHERE for word in words)
}


@pytest.mark.parametrize(
    "words", list(map(list, HERE)), ids=[f"{workspace} {words[-1]}" for words, workspace in HERE.items()]
)
def test_commands_do_what_the_page_says(words: list[str], workspace: Path) -> None:
    (command, *after), ranks = arguments(words)
    if command == "train" and not {"--help", "--dry-run"} & set(after):
        short = [setting for setting in SHORT if not any(setting.partition("=")[0] in word for word in after)]
        again = [] if any(word.startswith("output=") for word in after) else ["output=runs/again"]
        done = forked.run([*after, *short, *again], workspace, ranks=ranks)
        assert "\nTrained 12 steps" in done.stdout or "\nTrained 20 steps" in done.stdout, done.everything
    else:
        done = forked.command([command, *after], workspace)
    assert done.code == 0, done.everything
    assert "Traceback" not in done.everything


@pytest.mark.parametrize("page", ["getting-started.md", "metrics.md", "export.md"])
def test_code_about_a_finished_run(page: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    if not (workspace / "runs" / "exported").exists():
        assert forked.command(["export", "runs/quickstart", "runs/exported"], workspace).code == 0
    ran = 0
    for block in blocks(ROOT / "docs" / page, "python"):
        if "/models/" not in block.text:  # that of an adapter: tests/export/test_from_engine.py opens one
            exec(compile(block.text, str(block), "exec"), {})
            ran += 1
    assert ran == 1
