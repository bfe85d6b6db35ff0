"""Load the run configuration: one YAML file and dotted overrides in, one frozen `RunConfig` out, all problems at once.

Everything here runs before torch is imported. The other modules: `schema` (models), `methods` (the published points),
`rules` (that tie keys together), `sources` (how data is named), `files`, `core_yaml`, `reading`, `text` (what may be
printed), `errors` (messages), `keys` (a listing), `command_line`, `run_size` (numbers that follow), `deepspeed`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.config import core_yaml
from trainer.config.command_line import Command, help_text, parse_command_line
from trainer.config.core_yaml import YamlError
from trainer.config.errors import ConfigError, validation_problems
from trainer.config.files import dump, file_problems, model_size_problems, path_problems, read_yaml, resolve_paths
from trainer.config.keys import fields, union_members
from trainer.config.methods import METHODS, PARTS, expand_method
from trainer.config.rules import rule_problems
from trainer.config.run_size import Batch, resolve_batch, total_steps, warmup_steps
from trainer.config.schema import EXPANDED, ModelConfig, RunConfig
from trainer.config.text import in_short, quoted, text_problems

__all__ = [
    "METHODS",
    "Batch",
    "Command",
    "ConfigError",
    "ModelConfig",
    "RunConfig",
    "dump",
    "help_text",
    "load",
    "parse_command_line",
    "resolve_batch",
    "total_steps",
    "warmup_steps",
]


def load(path: str | None, overrides: Sequence[str] = (), *, check_files: bool = True) -> RunConfig:
    """Load and validate the configuration in a YAML file (or an empty one), after applying overrides `a.b=value`.

    A relative data or model path is resolved against the current directory and then, if the YAML file gives it, against
    that file's folder. An override that names another member of a union starts from that member's defaults, with those
    of the file's keys that it also has. An override of `method` starts from that method's published point, without the
    file's substrate, selector, update, bank and always_on. The named files are checked if `check_files`. Raises
    ConfigError with all problems.
    """
    try:
        folders = [Path.cwd()] if path is None else [Path.cwd(), Path(path).absolute().parent]
    except FileNotFoundError:
        raise ConfigError(["the current folder no longer exists: change into another one"]) from None
    values, problems = _user_values(path, overrides, folders)
    problems += text_problems(values) or path_problems(values)
    if problems:  # else what could not be read would also be reported as missing
        raise ConfigError(problems)
    config = None
    expanded = expand_method(values)
    try:
        config = RunConfig.model_validate(expanded, context=EXPANDED)
    except ValidationError as error:
        problems += validation_problems(error, RunConfig)
    problems += rule_problems(expanded) + model_size_problems(values)
    if check_files:
        problems += file_problems(expanded, folders)
    if config is None or problems:
        raise ConfigError(problems)
    return config


def _user_values(
    path: str | None, overrides: Sequence[str], folders: Sequence[Path]
) -> tuple[dict[str, Any], list[str]]:
    """Return the merged values of file and overrides, and the problems of those that could not be read."""
    from_file: dict[str, Any] = {}
    problems: list[str] = []
    if path is not None:
        try:
            from_file = resolve_paths(read_yaml(path), folders)
        except ConfigError as error:
            problems += error.problems
    given, override_problems = parse_overrides(overrides)
    problems += override_problems + _key_problems(from_file, path or "") + _key_problems(given, "")
    return merge(from_file, resolve_paths(given, folders[:1])), problems


def _key_problems(values: Any, where: str) -> list[str]:
    """Find keys below `where` that are not text, as YAML reads `1:` and `true:`. pydantic would stop at the first."""
    if isinstance(values, list):
        return [problem for value in values for problem in _key_problems(value, where)]
    if not isinstance(values, Mapping):
        return []
    wrong = [f"{where}: key {quoted(key)} is not text; put it in quotes" for key in values if not isinstance(key, str)]
    return wrong + [
        problem
        for key, value in values.items()
        for problem in _key_problems(value, f"{where}: {key}" if where else key)
    ]


def parse_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the nested values of `a.b.c=value` settings (values in YAML, a later one wins), and their problems."""
    values: dict[str, Any] = {}
    problems = []
    for override in overrides:
        path, equals, text = override.partition("=")
        names = path.split(".")
        if not equals or not all(name.strip() == name and name for name in names):
            problems.append(f"override {quoted(override)}: it must read key=value, such as selector.blocks=4")
            continue
        try:
            value = core_yaml.read(text)
        except YamlError as error:
            problems.append(
                f"{in_short(path)}: got {quoted(text)}, which is not YAML that can be read ({error.problem}); put text "
                "with special characters in quotes"
            )
            continue
        holder = values
        for name in names[:-1]:
            if not isinstance(holder.get(name), dict):
                holder[name] = {}
            holder = holder[name]
        holder[names[-1]] = value
    return values, problems


def merge(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` of a file with overrides applied: see `load` for unions and methods."""
    kept = dict(values)
    method = overrides.get("method")
    if method is not None and method != values.get("method"):
        # A file's parts describe its own method (a saved run lists all of them) and would override the new one's.
        kept = {name: value for name, value in kept.items() if name not in PARTS}
    for name in PARTS:
        if isinstance(kept.get(name), Mapping) and isinstance(overrides.get(name), Mapping):
            kept[name] = _keys_of_member(name, kept[name], overrides[name])
    return _deep_merge(kept, overrides)


def _keys_of_member(part: str, given: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Return those keys of a part that remain when an override chooses another member of its union."""
    chosen = override.get("name", given.get("name"))
    members = union_members(RunConfig.model_fields[part].annotation)
    if chosen == given.get("name") or not isinstance(chosen, str) or chosen not in members:
        return dict(given)
    return {key: value for key, value in given.items() if key in fields(members[chosen])}


def _deep_merge(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, value in overrides.items():
        below = merged.get(name)
        merged[name] = _deep_merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
