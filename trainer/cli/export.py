"""`python -m trainer export` and `python -m trainer apply`: their command lines."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.cli.process import refuse, set_up_process
from trainer.config.argument_paths import path_argument
from trainer.config.arguments import Parser
from trainer.config.text import printable
from trainer.errors import refusals

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)B", re.IGNORECASE | re.ASCII)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_DEFAULT_SIZE = "5GB"
# Bytes: file systems have 255, and `trainer/export/unfinished.py` adds to the name while the folder is written.
_LONGEST_NAME = 255 - len("..01234567.partial")
_SMALLEST_SIZE = 10_000  # below, any useful model becomes one file for each tensor


def export(argv: Sequence[str]) -> int:
    """Export a model as `argv` says. Returns the exit code: 0, or 2 after a message."""
    parser = Parser(
        prog="python -m trainer export",
        description="Write the model of a run folder at one of its checkpoints as a Hugging Face folder, adapters in "
        "PEFT's format. Trained weights are read from the checkpoint, all others from the base model, a block at a "
        "time. Needs no GPU. Compares the checksums of all files that it reads, and reads back what it wrote.",
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        type=path_argument,
        help="run folder; with --base also a folder of engine.save_checkpoint or checkpoint-N of transformers.Trainer",
    )
    parser.add_argument("out", metavar="OUT", type=path_argument, help="folder to write; new, or empty")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint after step N (default: the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the lowest evaluation loss")
    parser.add_argument(
        "--base",
        type=_folder_or_name,
        metavar="PATH|NAME",
        help="the base model, if it is no longer where the run found it; a name is fetched from the Hub",
    )
    parser.add_argument(
        "--tokenizer",
        type=_folder_or_name,
        metavar="PATH|NAME",
        help="the tokenizer, if it is no longer where the run found it",
    )
    parser.add_argument(
        "--delta", action="store_true", help="write only the changed blocks, with fingerprints of the base; see `apply`"
    )
    _add_common(parser)
    arguments = _parse(parser, argv)
    if isinstance(arguments, int):
        return arguments

    def work(out: Path) -> str:
        from trainer.export.base import Permissions
        from trainer.export.delta import write_delta
        from trainer.export.from_checkpoint import TrainedRun, export_run

        allowed = Permissions(arguments.base, arguments.tokenizer, arguments.trust_remote_code)
        run = TrainedRun(arguments.run, step=arguments.step, best=arguments.best, permissions=allowed)
        write = write_delta if arguments.delta else export_run
        changed = write(run, out, shard_size=arguments.shard_size)
        written = f"{arguments.out}: {'what changed up to' if arguments.delta else 'after'} step {run.manifest.step}"
        return _with_changes(written, changed)

    return _write(work, arguments.out, arguments.run)


def apply(argv: Sequence[str]) -> int:
    """Apply a delta as `argv` says. Returns the exit code: 0, or 2 after a message."""
    parser = Parser(
        prog="python -m trainer apply",
        description="Apply a delta, as `export RUN DELTA --delta` writes it, to its base, and write a whole Hugging "
        "Face folder, a block at a time. Refuses another base, and a delta that was changed.",
    )
    parser.add_argument("base", metavar="BASE", type=path_argument, help="folder of the base model")
    parser.add_argument("delta", metavar="DELTA", type=path_argument, help="folder of the delta")
    parser.add_argument("out", metavar="OUT", type=path_argument, help="folder to write; new, or empty")
    _add_common(parser)
    arguments = _parse(parser, argv)
    if isinstance(arguments, int):
        return arguments

    def work(out: Path) -> str:
        from trainer.export.delta import apply_delta

        changed = apply_delta(
            arguments.base.absolute(),
            arguments.delta.absolute(),
            out,
            shard_size=arguments.shard_size,
            trust_remote_code=arguments.trust_remote_code,
        )
        return _with_changes(f"{arguments.out}: {arguments.base} with {arguments.delta}", changed)

    return _write(work, arguments.out, arguments.base, arguments.delta)


def _with_changes(written: str, changed: Sequence[str]) -> str:
    """Return the lines to print: what was written, and what differs there from the base's files."""
    return "\n".join([written, *(f"  changed there: {line}" for line in changed)])


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-size",
        type=_shard_size,
        default=_DEFAULT_SIZE,
        metavar="SIZE",
        help="largest file of weights (default %(default)s); needs this much memory and that of a block of the model",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let the base model and the tokenizer run their own Python code, whatever the run allowed: read that code "
        "first",
    )


def _shard_size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < _SMALLEST_SIZE:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a size such as 500MB or 5GB, at least 10KB")
    return size


def _folder_or_name(text: str) -> str:
    """Return `text` if it can be a folder, or a name on the Hub. Raises `ArgumentTypeError` for what no path can be."""
    path_argument(text)
    return text


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace | int:
    try:
        return parser.parse_args(argv)
    except SystemExit as done:  # after --help, or a message
        return int(done.code or 0)


def _write(work: Callable[[Path], str], named: Path, *inputs: Path) -> int:
    """Call `work` with the folder to write, `named` on the command line. Print its result, or why it is refused."""
    try:
        problem = _out_problem(named, inputs)
    except OSError as error:
        problem = f"{named}: {error.strerror or error}; name another OUT"
    if problem is not None:
        return refuse(problem, rank=0)
    set_up_process()
    with refusals() as refused:
        from trainer.model.quiet import quiet_libraries

        quiet_libraries()
        print(printable(work(named.parent.resolve() / named.name)), file=sys.stdout)
    return refuse(refused[0] + _about_code(refused[0]), rank=0) if refused else 0


def _about_code(message: str) -> str:
    """Return a line that names our option, if a message of transformers names its own."""
    return "\nHere that is --trust-remote-code: read the code first" * ("trust_remote_code" in message)


def _out_problem(out: Path, inputs: Sequence[Path]) -> str | None:
    target = out.parent.resolve() / out.name
    if out.name in ("", "..") or Path.cwd().is_relative_to(target):
        return f"{out}: is the current folder, or contains it; name a new folder as OUT"
    if out.is_symlink():
        return f"{out}: is a link; name a new folder as OUT, or the folder to which it points"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return f"{out}: exists, and is not an empty folder; name another OUT"
    above = next(path for path in target.parents if path.exists())
    if not above.is_dir():
        return f"{out}: {above} is not a folder; name another OUT"
    for path in inputs:
        ours = any(os.path.exists(path / name) for name in ("checkpoints", "latest", "config.json", "delta.json"))
        if ours and target.is_relative_to(path.resolve()):
            return f"{out}: is inside {path}, which is only read; name another OUT"
    if len(os.fsencode(out.name)) > _LONGEST_NAME:
        return f"{out.name[:40]}...: a name of {len(os.fsencode(out.name))} bytes; allowed for OUT: {_LONGEST_NAME}"
    return None
