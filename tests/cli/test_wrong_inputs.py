"""Every command refuses wrong inputs with exit code 2 and a message that names the value or file, not a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.cli.wrong_inputs import Wrong, cases, write_files
from tests.config.forks import in_fork
from tests.launching import Finished
from tests.mutations import make_pristine
from trainer.cli.main import COMMANDS, main
from trainer.config.text import in_short, printable

CASES = {command: list(cases(command)) for command in COMMANDS}
LONGEST_QUOTE = 40  # of a word that messages shorten


def _try_all(commands: list[str], workspace: Path, results: Path) -> None:
    """Run the cases of `commands` one after the other, each in a fork of this process."""
    import torch

    torch.set_num_threads(1)
    write_files(workspace)
    for command in commands:
        outcomes = [
            in_fork(lambda words=(command, *case.words): main(words), folder=workspace) for case in CASES[command]
        ]
        (results / f"{command}.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes]))


def _run_at_once(work: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
    """Call each function with its arguments in a process that has imported everything, and wait for all."""
    processes = [forked.context().Process(target=target, args=arguments) for target, arguments in work]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Finished]:
    """The outcome of every case, by command and kind. Two processes share the commands."""
    folder = tmp_path_factory.mktemp("wrong")
    pristine, results = folder / "pristine", folder / "results"
    pristine.mkdir()
    results.mkdir()
    _run_at_once([(make_pristine, (pristine,))])
    work: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
    for number in range(2):
        workspace = shutil.copytree(pristine, folder / str(number))
        work.append((_try_all, (list(COMMANDS)[number::2], workspace, results)))
    _run_at_once(work)
    found = {}
    for command, tried in CASES.items():
        recorded = json.loads((results / f"{command}.json").read_text())
        found |= {(command, case.kind): Finished(**each) for case, each in zip(tried, recorded, strict=True)}
    return found


def _forms(word: str) -> set[str]:
    """Return a word as messages may quote it."""
    forms = {word, printable(word, keep=""), repr(word)[1:-1], in_short(repr(word))[1:-1]}
    return {form[:LONGEST_QUOTE] for form in forms if form}


@pytest.mark.parametrize("command", COMMANDS)
def test_there_are_forty_kinds_for_each_command(command: str) -> None:
    assert len({case.words for case in CASES[command]}) == len({case.kind for case in CASES[command]}) >= 40


@pytest.mark.parametrize(
    ("command", "case"),
    [pytest.param(command, case, id=f"{command}-{case.kind}") for command in COMMANDS for case in CASES[command]],
)
def test_refused_by_name(command: str, case: Wrong, outcomes: dict[tuple[str, str], Finished]) -> None:
    outcome = outcomes[command, case.kind]
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.everything, outcome
    named = [form for word in case.named for form in _forms(word)]
    message = outcome.stderr.partition("\nusage:")[0]  # which names every option
    assert any(form in message for form in named), (named, outcome.stderr)
