"""`python -m trainer prepare`: tokenise the data of a recipe before anything is trained on it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.cli.process import refuse, set_up_process
from trainer.config import load, parse_command_line
from trainer.config.text import printable, quoted
from trainer.errors import refusals

EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143  # as of processes that SIGINT and SIGTERM have ended
ON_A_PAGE = 20  # samples of each source
USAGE = """Usage: python -m trainer prepare RECIPE.yaml [key=value ...] [--show N] [--html FILE]

Tokenises the data of a recipe into its cache (data.cache), where training with the same data, tokenizer and settings
finds it, and reports on every source. --show N prints the first N samples of each, with the tokens that are trained on
in green, or in ⟦brackets⟧ if the output is no terminal (FORCE_COLOR=1 forces colours). --html FILE writes them to a
page for a browser instead; N is then 20 unless --show is given.
`python -m trainer train --help` lists the settings.
"""


def main(argv: Sequence[str]) -> int:
    """Tokenise the data of the recipe in `argv` and report on it. Returns the exit code: 0, 2 after a message, 130
    after control-C, or 143 after SIGTERM."""
    with refusals() as refused:
        command = parse_command_line(argv, options=("--show", "--html", "--help"))
        if command.show_help:
            print(USAGE, end="")
            return 0
        config = load(command.config_path, command.overrides)
    if refused:
        return refuse(refused[0], rank=0)
    page_file = None if command.html is None else Path(command.html).expanduser()
    if page_file is not None and (problem := _page_problem(page_file)):  # before anything takes long
        return refuse(f"--html: got {quoted(str(command.html))}, {problem}", rank=0)

    set_up_process()
    from trainer.data.cache import tokenise_run
    from trainer.data.show import describe, samples, shown
    from trainer.data.show_page import page
    from trainer.data.tokenizer import describe_new_tokens, load_run_tokenizer

    try:
        with _stopped_by_sigterm(), refusals() as refused:
            tokenizer = load_run_tokenizer(config.model)
            data = tokenise_run(config, tokenizer)
    except KeyboardInterrupt as stop:
        print("\nStopped; the source that was being tokenised is not stored.", file=sys.stderr)
        return EXIT_TERMINATED if isinstance(stop, _Terminated) else EXIT_INTERRUPTED
    if refused:
        return refuse(refused[0], rank=0)
    about = [*describe(data, config.data.max_length), *describe_new_tokens(tokenizer, config.model.add_tokens)]
    summary = [printable(line) for line in about]
    if page_file is None:
        colour = sys.stdout.isatty() or "FORCE_COLOR" in os.environ
        print("\n".join(shown(data, tokenizer, command.show, colour=colour)), end="\n" if command.show else "")
    else:
        with refusals() as refused:
            page_file.write_text(page(samples(data, tokenizer, command.show or ON_A_PAGE), summary), encoding="utf-8")
        if refused:
            return refuse(f"--html: {refused[0]}", rank=0)
        print(f"Samples: {printable(str(page_file))}")
    print("\n".join(summary))
    return 0


class _Terminated(KeyboardInterrupt):
    """Raised by SIGTERM, so that what is unfinished is removed as after control-C."""


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # another one must not end the removal
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _page_problem(file: Path) -> str | None:
    if file.suffix.lower() not in (".html", ".htm"):
        return "another kind of file; allowed: a name that ends in .html"
    if not file.parent.is_dir() or file.is_dir():
        return f"but {file.parent} is no folder; make it first" if not file.is_dir() else "a folder; name a file in it"
    return None
