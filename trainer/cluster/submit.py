"""`python -m trainer submit`: fill in launch/slurm.sbatch for a job, write the file and submit it."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from trainer.config import ConfigError, RunConfig, load, parse_command_line
from trainer.config.arguments import Parser, count
from trainer.config.deepspeed.resolve import resolve
from trainer.config.text import has_control_characters, printable, quoted
from trainer.errors import refusals

# SLURM's notation: minutes, minutes:seconds, hours:minutes:seconds, or with days before the hours: 2-00:00:00.
_TIME = re.compile(r"([0-9]{1,6}-)?[0-9]{1,9}(:[0-9]{1,2}){0,2}")
_NOTICE_SECONDS = 300
_EARLY_SECONDS = 60  # SLURM may send the signal this much earlier (see sbatch's --signal)
# Words that sbatch searches for anywhere in a line of a job's file, and blanks out.
_OWN_WORDS = re.compile("hetjob|packjob", re.IGNORECASE)
# sbatch's option -> what a user changes to change its value: a key of the recipe, or an option of this command.
_SOURCES = {"job-name": "output", "output": "output", "chdir": "the current folder"} | {
    name: f"--{name}" for name in ("time", "partition", "account", "qos", "mem")
}
_LINE = re.compile(r"##?SBATCH --(?P<option>[\w-]+)(=.*)?")


def template() -> str:
    """Return the text of launch/slurm.sbatch."""
    return files("trainer.cluster").joinpath("slurm.sbatch").read_text(encoding="utf-8")


def filled_in(options: Mapping[str, str], command: Sequence[str], *, more: Sequence[str] = ()) -> str:
    """Return launch/slurm.sbatch with the values of `options` (sbatch's long names) and `command` filled in.

    The template's other options keep their values, or are left out if they are only examples (##SBATCH). `more` are
    added verbatim, such as --exclusive.
    """
    lines = []
    for line in template().splitlines():
        match = _LINE.fullmatch(line)
        if match and match["option"] in options:
            line = f"#SBATCH --{match['option']}={shlex.quote(options[match['option']])}"
        elif line.startswith("##SBATCH"):
            continue
        elif line.startswith("command=("):
            line = f"command=({shlex.join(command)})"
        lines.append(line)
        if match and match["option"] == "requeue":  # the last one; a later option has precedence
            lines += [f"#SBATCH {option}" for option in more]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Write the job's file, submit it and return 0; return 2 if the arguments are wrong or sbatch refuses the job."""
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.notice + _EARLY_SECONDS >= _seconds(arguments.time):
        return _refuse(
            f"--notice: got {arguments.notice} seconds, and SLURM may signal {_EARLY_SECONDS} earlier, which leaves "
            f"no time to train within --time {arguments.time}: lower --notice, or raise --time"
        )
    with refusals() as refused:
        # Read as the job will read them.
        command = parse_command_line([arguments.recipe, *arguments.settings], options=())
        if command.config_path is None:
            return _refuse(f"RECIPE.yaml: missing; {quoted(arguments.recipe)} is a setting")
        config = load(command.config_path, command.overrides)
        resolve(config, arguments.nodes * arguments.gpus)
        script = _script(arguments, config)
    if refused:
        return _refuse(refused[0])
    if arguments.print:
        print(script, end="")
        return 0
    if shutil.which("sbatch") is None:
        return _refuse("sbatch: no such command; submit from a login node of a SLURM cluster; --print shows the file")
    run = _run_folder(config)
    file = run.with_name(f"{run.name}.sbatch")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)  # SLURM does not create the log's folder
        file.write_text(script, encoding="utf-8")
    except OSError as error:
        return _refuse(f"output: {type(error).__name__}: {error}")
    result = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True)
    if result.returncode:
        return _refuse(f"sbatch refuses {file}: {result.stderr.strip() or result.stdout.strip()}")
    job = result.stdout.strip().partition(";")[0]  # the cluster's name may follow
    log = f"{run}-{job}.log"
    print(
        printable(f"Submitted job {job} ({file}); log: {log}. To see it: squeue -j {job}. To cancel it: scancel {job}")
    )
    return 0


def _run_folder(config: RunConfig) -> Path:
    """Return `output` as it is written, or as a full path if it has no name to extend (`.`, `..`)."""
    run = Path(os.path.expanduser(config.output))
    return run.resolve() if run.name in ("", "..") else run


def _script(arguments: argparse.Namespace, config: RunConfig) -> str:
    run = _run_folder(config)
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
    more = [option if isinstance(option, str) else "--" for option in arguments.sbatch]  # argparse drops a lone --
    problems = [problem for name, value in options.items() if (problem := _misread(_SOURCES.get(name, name), value))]
    problems += [
        f"{quoted(word)}: contains control characters (line ends, tabs, changes of direction); take them out"
        for word in (*command, *more)
        if has_control_characters(word)
    ]
    problems += [
        f"--sbatch: got {quoted(option)}; allowed: an option of sbatch with its dashes, such as --sbatch=--exclusive"
        for option in more
        if not re.match(r"--?[A-Za-z]", option)
    ]
    if problems:
        raise ConfigError(problems)
    return filled_in(options, command, more=more)


def _misread(source: str, value: str) -> str | None:
    """Return why sbatch would read `value`, in quotes in the job's file, as something else; None if it would not."""
    if has_control_characters(value):
        return f"{source}: got {quoted(value)}, with control characters (line ends, ...); take them out"
    if not value:
        return f"{source}: got nothing; leave the option out"
    if "\\" in value:  # it escapes the next character, in quotes too, and disables %j in the name of a log
        return f"{source}: got {quoted(value)}, whose backslash sbatch would read as an escape character; take it out"
    if _OWN_WORDS.search(value):
        return (
            f"{source}: got {quoted(value)}, in which sbatch reads hetjob or packjob as a keyword; choose another name"
        )
    return None


def _parser() -> Parser:
    parser = Parser(
        prog="python -m trainer submit",
        description="Write a job for SLURM beside the run folder (OUTPUT.sbatch) and submit it. The job trains with "
        "one task for each GPU, saves before its time limit or when it is preempted, and then resumes by itself.",
        epilog="The file is launch/slurm.sbatch with these values filled in. The job tokenises the data, unless "
        "`python -m trainer prepare` has done so.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings that override the recipe")
    parser.add_argument("--nodes", type=count, default=1, metavar="N", help="nodes (default 1)")
    parser.add_argument("--gpus", type=count, required=True, metavar="N", help="GPUs per node; one rank runs on each")
    parser.add_argument(
        "--time", type=_time, required=True, metavar="T", help="time limit of each attempt, such as 12:00:00"
    )
    for name in ("partition", "account", "qos", "mem"):
        parser.add_argument(f"--{name}", metavar="X", help="passed to sbatch")
    parser.add_argument("--cpus", type=count, metavar="N", help="cores of each rank (CPU offload computes on them)")
    parser.add_argument(
        "--notice",
        type=count,
        default=_NOTICE_SECONDS,
        metavar="SECONDS",
        help="time before the limit at which the run saves: longer than a step and a checkpoint take (default 300)",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="=OPTION",
        help="any other option of sbatch, such as --sbatch=--exclusive; may be repeated",
    )
    parser.add_argument("--print", action="store_true", help="show the file; write and submit nothing")
    return parser


def _time(text: str) -> str:
    if not _TIME.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"got {quoted(text)}; allowed: hours:minutes:seconds, with days as in 2-00:00:00"
        )
    return text


def _seconds(time: str) -> int:
    """Return the seconds of a time in SLURM's notation."""
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
    print(f"\n{printable(message)}", file=sys.stderr)
    return 2
