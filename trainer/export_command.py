"""`python -m trainer export` and `python -m trainer apply`: their command lines."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.config import ConfigError
from trainer.entry import prepare_process, refuse

_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]?B", re.IGNORECASE)
_DEFAULT_SIZE = "5GB"


def export(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, or 2 with a message."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer export",
        description="Write the model of a run folder at one of its checkpoints as a Hugging Face folder, adapters in "
        "PEFT's format. What trained comes from the checkpoint, the rest from the base model, a block at a time; needs "
        "no accelerator. Checksums of all files that are used are compared, and what was written is read back.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; new, or empty")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint after step N (default: the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the least evaluation loss")
    parser.add_argument("--base", type=Path, metavar="PATH", help="where the base model is by now, if it was moved")
    parser.add_argument(
        "--delta", action="store_true", help="only the changed blocks, with fingerprints of the base; see `apply`"
    )
    _add_shard_size(parser)
    arguments = _parse(parser, argv)
    if isinstance(arguments, int):
        return arguments

    def work() -> str:
        from trainer.delta import write_delta
        from trainer.export_run import TrainedRun, export_run

        run = TrainedRun(
            arguments.run.expanduser(), step=arguments.step, best=arguments.best, base=_absolute(arguments.base)
        )
        write = write_delta if arguments.delta else export_run
        write(run, arguments.out.expanduser(), shard_size=arguments.shard_size)
        return f"{arguments.out}: {'what changed up to' if arguments.delta else 'after'} step {run.manifest.step}"

    return _do(work, arguments.out)


def apply(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, or 2 with a message."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer apply",
        description="Put a delta, as `export RUN DELTA --delta` writes it, on its base: writes a whole Hugging Face "
        "folder, a block at a time. Refused where the base is another one, or the delta was changed.",
    )
    parser.add_argument("base", metavar="BASE", type=Path, help="folder of the base model")
    parser.add_argument("delta", metavar="DELTA", type=Path, help="folder of the delta")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; new, or empty")
    _add_shard_size(parser)
    arguments = _parse(parser, argv)
    if isinstance(arguments, int):
        return arguments

    def work() -> str:
        from trainer.delta import apply_delta

        out = arguments.out.expanduser()
        apply_delta(_absolute(arguments.base), _absolute(arguments.delta), out, shard_size=arguments.shard_size)
        return f"{arguments.out}: {arguments.base} with {arguments.delta}"

    return _do(work, arguments.out)


def _add_shard_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-size",
        type=_shard_size,
        default=_DEFAULT_SIZE,
        metavar="SIZE",
        help="largest file of weights (%(default)s); memory needed is this and a block of the model",
    )


def _shard_size(text: str) -> str:
    if not _SIZE.fullmatch(text) or float(re.match(r"[\d.]+", text)[0]) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a size such as 500MB or 5GB")
    return text.upper().replace(" ", "")


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.expanduser().absolute()


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace | int:
    try:
        return parser.parse_args(argv)
    except SystemExit as done:  # after --help, or a message
        return int(done.code or 0)


def _do(work: Callable[[], str], out: Path) -> int:
    if out.expanduser().exists() and (not out.expanduser().is_dir() or any(out.expanduser().iterdir())):
        return refuse(f"{out}: is there already, and not an empty folder; name another OUT", rank=0)
    prepare_process()
    from safetensors import SafetensorError

    from trainer.adapters import AdapterError
    from trainer.blocks import BlockError
    from trainer.checkpoint.store import CheckpointError
    from trainer.data.errors import DataError
    from trainer.model import ModelError
    from trainer.shards import ExportError
    from trainer.weights import WeightsError

    try:
        print(work(), file=sys.stdout)
    except (ConfigError, DataError, ModelError, AdapterError, BlockError) as error:
        return refuse(str(error), rank=0)
    except (CheckpointError, ExportError, WeightsError) as error:
        return refuse(str(error), rank=0)
    except (OSError, SafetensorError) as error:
        return refuse(f"{type(error).__name__}: {error}", rank=0)
    return 0
