"""`python -m trainer submit`: launch/slurm.sbatch with the values of a job filled in, written down and submitted."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NoReturn

from trainer.config import ConfigError, RunConfig, load
from trainer.config.deepspeed import resolve

# What SLURM takes: minutes, minutes:seconds, hours:minutes:seconds, and days before any of these.
_TIME = re.compile(r"(\d+-)?\d+(:\d\d?){0,2}")
_NOTICE_SECONDS = 300
_EARLY_SECONDS = 60  # that SLURM may send it before (sbatch's --signal)
_LINE = re.compile(r"##?SBATCH --(?P<option>[\w-]+)(=.*)?")


def template() -> str:
    """The text of launch/slurm.sbatch."""
    return files("trainer.cluster").joinpath("slurm.sbatch").read_text(encoding="utf-8")


def filled_in(options: Mapping[str, str], command: Sequence[str], *, more: Sequence[str] = ()) -> str:
    """launch/slurm.sbatch with the values of `options` (sbatch's long names), and with `command` for its tasks.

    Options that are missing in `options` are left out where the file only shows them (##SBATCH), and stand otherwise.
    `more` are options as they are written, such as --exclusive.
    """
    lines = []
    for line in template().splitlines():
        found = _LINE.fullmatch(line)
        if found and found["option"] in options:
            line = f"#SBATCH --{found['option']}={shlex.quote(options[found['option']])}"
        elif line.startswith("##SBATCH"):
            continue
        elif line.startswith("command=("):
            line = f"command=({shlex.join(command)})"
        lines.append(line)
        if found and found["option"] == "requeue":  # the last, so that these stand
            lines += [f"#SBATCH {option}" for option in more]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Write the job's file and submit it; 0, or 2 where the request, or sbatch, refuses."""
    arguments = _parser().parse_intermixed_args(argv)
    recipe, settings = arguments.recipe, arguments.settings
    if arguments.notice + _EARLY_SECONDS >= _seconds(arguments.time):
        return _refuse(
            f"--notice: got {arguments.notice} seconds, and SLURM may be {_EARLY_SECONDS} early, which leaves nothing "
            f"of --time {arguments.time}: lower --notice, or raise --time"
        )
    try:
        config = load(recipe, settings)
        resolve(config, arguments.nodes * arguments.gpus)
        script = _script(arguments, config)
    except ConfigError as error:
        return _refuse(str(error))
    if arguments.print:
        print(script, end="")
        return 0
    if shutil.which("sbatch") is None:
        return _refuse("sbatch: no such command; submit from a login node of a SLURM cluster; --print shows the file")
    run = Path(config.output).expanduser()
    file = run.with_name(f"{run.name}.sbatch")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)  # SLURM writes no log where there is no folder
        file.write_text(script, encoding="utf-8")
    except OSError as error:
        return _refuse(f"output: {type(error).__name__}: {error}")
    answer = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True)
    if answer.returncode:
        return _refuse(f"sbatch refuses {file}: {answer.stderr.strip() or answer.stdout.strip()}")
    job = answer.stdout.strip().partition(";")[0]  # the cluster's name may follow
    print(f"Submitted job {job} ({file}); its log: {run}-{job}.log. Its state: squeue -j {job}. Its end: scancel {job}")
    return 0


def _script(arguments: argparse.Namespace, config: RunConfig) -> str:
    run = Path(config.output).expanduser()
    options = {
        "job-name": run.name,
        "nodes": str(arguments.nodes),
        "ntasks-per-node": str(arguments.gpus),
        "gpus-per-node": str(arguments.gpus),
        "chdir": str(Path.cwd()),
        "output": f"{str(run).replace('%', '%%')}-%j.log",  # sbatch's patterns begin with a percent sign
        "signal": f"USR1@{arguments.notice}",
    }
    for name in ("time", "partition", "account", "qos", "mem"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    if arguments.cpus is not None:
        options["cpus-per-task"] = str(arguments.cpus)
    command = [sys.executable, "-m", "trainer", "train", arguments.recipe, *arguments.settings]
    return filled_in(options, command, more=arguments.sbatch)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m trainer submit",
        description="Writes a job for SLURM beside the run folder (OUTPUT.sbatch) and submits it. The job trains with "
        "one task for each GPU, saves before its time limit or when it is preempted, and goes on by itself.",
        epilog="The file is launch/slurm.sbatch with these values filled in. Data is tokenised by the job, unless "
        "`python -m trainer prepare` was there before.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings laid over the recipe")
    parser.add_argument("--nodes", type=_count, default=1, metavar="N", help="nodes (default 1)")
    parser.add_argument("--gpus", type=_count, required=True, metavar="N", help="GPUs of each node, a rank for each")
    parser.add_argument("--time", type=_time, required=True, metavar="T", help="limit of an attempt, such as 12:00:00")
    for name in ("partition", "account", "qos", "mem"):
        parser.add_argument(f"--{name}", metavar="X", help="as sbatch's")
    parser.add_argument("--cpus", type=_count, metavar="N", help="cores of each rank (CPU offload computes on them)")
    parser.add_argument(
        "--notice",
        type=_count,
        default=_NOTICE_SECONDS,
        metavar="SECONDS",
        help="how long before the limit the run saves: longer than a step and a checkpoint take (default 300)",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="=OPTION",
        help="another option of sbatch, written --sbatch=--exclusive; may be repeated",
    )
    parser.add_argument("--print", action="store_true", help="show the file; write and submit nothing")
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as the other commands do."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_refuse(f"{message}\n\n{self.format_usage()}"))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: integer >= 1")
    return int(text)


def _time(text: str) -> str:
    if not _TIME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: hours:minutes:seconds, with days before: 2-00:00:00")
    return text


def _seconds(time: str) -> int:
    """Of SLURM's notation."""
    days, _, rest = time.rpartition("-")
    fields = [int(field) for field in rest.split(":")]
    if days:  # days-hours, days-hours:minutes, ...
        hours, minutes, seconds = (*fields, 0, 0)[:3]
    elif len(fields) == 3:
        hours, minutes, seconds = fields
    else:  # minutes, minutes:seconds
        hours, (minutes, seconds) = 0, (*fields, 0)[:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def _refuse(message: str) -> int:
    print(f"\n{message}", file=sys.stderr)
    return 2
