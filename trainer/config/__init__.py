"""The run configuration: one YAML file and dotted overrides in, one frozen `RunConfig` out, all problems at once.

Everything here runs before torch is imported. Its other modules: `schema` (models), `methods` (the published points),
`rules` (that tie keys together), `sources` (how data is named), `files`, `errors` (messages), `keys` (a listing),
`command_line`, `run_size` (numbers that follow), `deepspeed`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trainer.config.command_line import Command, help_text, parse_command_line
from trainer.config.errors import ConfigError, validation_problems
from trainer.config.files import dump, file_problems, parse_value, read_yaml, resolve_paths
from trainer.config.keys import union_members
from trainer.config.methods import METHODS, PARTS, expand_method
from trainer.config.rules import rule_problems
from trainer.config.run_size import Batch, resolve_batch, total_steps, warmup_steps
from trainer.config.schema import ModelConfig, RunConfig

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
    """The validated configuration of a YAML file (or of nothing) with overrides `a.b=value` laid over it.

    A relative data or model path points into the current directory or, where a file gives it and it is not there, into
    that file's folder. An override that names another member of a union starts that member afresh, with those of the
    file's keys that it also has; an override of `method` starts from that method's published point, without the file's
    substrate, selector, update, bank and always_on. Files are looked at if `check_files`. Raises ConfigError.
    """
    folders = [Path.cwd()] if path is None else [Path.cwd(), Path(path).absolute().parent]
    values, problems = _user_values(path, overrides, folders)
    if problems:  # What could not be read would be reported as missing as well.
        raise ConfigError(problems)
    config = None
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += validation_problems(error, RunConfig)
    problems += rule_problems(values)
    if check_files:
        problems += file_problems(expand_method(values), folders)
    if config is None or problems:
        raise ConfigError(problems)
    return config


def _user_values(
    path: str | None, overrides: Sequence[str], folders: Sequence[Path]
) -> tuple[dict[str, Any], list[str]]:
    """(what file and overrides say together, what of it could not be read)."""
    from_file: dict[str, Any] = {}
    problems: list[str] = []
    if path is not None:
        try:
            from_file = resolve_paths(read_yaml(path), folders)
        except ConfigError as error:
            problems += error.problems
    given, override_problems = parse_overrides(overrides)
    problems += override_problems + _key_problems(from_file, path or "")
    return merge(from_file, resolve_paths(given, folders[:1])), problems


def _key_problems(values: Any, where: str) -> list[str]:
    """YAML reads `on:` and `1:` as keys that are no text; pydantic would stop at the first of them."""
    if not isinstance(values, Mapping):
        return []
    wrong = [f"{where}: key {key!r} is not text; put it in quotes" for key in values if not isinstance(key, str)]
    return wrong + [problem for value in values.values() for problem in _key_problems(value, where)]


def parse_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Nested values of `a.b.c=value` settings (values in YAML, a later one wins), and what is wrong with them."""
    values: dict[str, Any] = {}
    problems = []
    for override in overrides:
        path, equals, text = override.partition("=")
        names = path.split(".")
        if not equals or not all(name.strip() == name and name for name in names):
            problems.append(f"override {override!r}: it must read key=value, such as selector.blocks=4")
            continue
        try:
            value = parse_value(text)
        except (yaml.YAMLError, ValueError):  # ValueError: a date that is none, such as 2024-13-45
            problems.append(f"{path}: got {text!r}, which is not YAML; put text with special characters in quotes")
            continue
        holder = values
        for name in names[:-1]:
            if not isinstance(holder.get(name), dict):
                holder[name] = {}
            holder = holder[name]
        holder[names[-1]] = value
    return values, problems


def merge(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of a file with overrides laid over them: see `load` for unions and methods."""
    kept = dict(values)
    method = overrides.get("method")
    if method is not None and method != values.get("method"):
        # A file's parts describe its own method (a saved run spells all of them out): the new one would be a name only.
        kept = {name: value for name, value in kept.items() if name not in PARTS}
    for name in PARTS:
        if isinstance(kept.get(name), Mapping) and isinstance(overrides.get(name), Mapping):
            kept[name] = _keys_of_member(name, kept[name], overrides[name])
    return _deep_merge(kept, overrides)


def _keys_of_member(part: str, given: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """The given keys of a part that are left when an override picks another member of its union."""
    chosen = override.get("name", given.get("name"))
    members = union_members(RunConfig.model_fields[part].annotation)
    if chosen == given.get("name") or chosen not in members:
        return dict(given)
    return {key: value for key, value in given.items() if key in members[chosen].model_fields}


def _deep_merge(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, value in overrides.items():
        below = merged.get(name)
        merged[name] = _deep_merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
