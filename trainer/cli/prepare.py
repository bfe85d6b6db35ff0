"""`python -m trainer prepare`: tokenise the data of a recipe before anything is trained on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from trainer.cli.process import refuse, set_up_process
from trainer.config import load, parse_command_line
from trainer.config.text import printable
from trainer.errors import refusals

EXIT_INTERRUPTED = 130  # as of a process that SIGINT has ended

USAGE = """Usage: python -m trainer prepare RECIPE.yaml [key=value ...] [--show N]

Tokenises the data of a recipe into its cache (data.cache), where training with the same data, tokenizer and settings
finds it, and reports on every source. --show N prints the first N samples of each, with the tokens that are trained on
in green, or in ⟦brackets⟧ if the output is no terminal (FORCE_COLOR=1 forces colours).
`python -m trainer train --help` lists the settings.
"""


def main(argv: Sequence[str]) -> int:
    """Tokenise the data of the recipe in `argv` and report on it. Returns the exit code: 0, 2 after a message, or 130
    after control-C."""
    with refusals() as refused:
        command = parse_command_line(argv, options=("--show", "--help"))
        if command.show_help:
            print(USAGE, end="")
            return 0
        config = load(command.config_path, command.overrides)
    if refused:
        return refuse(refused[0], rank=0)

    set_up_process()
    from trainer.data.cache import tokenise_run
    from trainer.data.show import describe, shown
    from trainer.data.tokenizer import load_run_tokenizer

    try:
        with refusals() as refused:
            tokenizer = load_run_tokenizer(config.model)
            data = tokenise_run(config, tokenizer)
    except KeyboardInterrupt:
        print("\nStopped; the source that was being tokenised is not stored.", file=sys.stderr)
        return EXIT_INTERRUPTED
    if refused:
        return refuse(refused[0], rank=0)
    colour = sys.stdout.isatty() or "FORCE_COLOR" in os.environ
    print("\n".join(shown(data, tokenizer, command.show, colour=colour)), end="\n" if command.show else "")
    print(printable("\n".join(describe(data, config.data.max_length))))
    return 0
