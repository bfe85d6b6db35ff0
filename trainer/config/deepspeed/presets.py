"""Read the JSON of a preset or of a file, and refuse keys that DeepSpeed does not know."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.deepspeed.keys import BLOCKS
from trainer.config.errors import MOST_SHOWN, ConfigError, hint
from trainer.config.reading import read_file
from trainer.config.text import has_control_characters, in_short, quoted
from trainer.settings.nested import get

PRESET_FOLDER = Path(__file__).resolve().parent.parent.parent / "ds_configs"
# What each preset in that folder does, for the help of `deepspeed` and docs/memory-and-machines.md.
PRESETS = {
    "zero0": "every rank stores everything (in fp32 only, as the reference)",
    "zero1": "optimizer state is partitioned over the ranks",
    "zero1_offload": "as zero1, with optimizer state in host memory",
    "zero2": "optimizer state and gradients are partitioned over the ranks",
    "zero2_offload": "as zero2, with optimizer state in host memory",
    "zero3": "optimizer state, gradients and weights are partitioned over the ranks",
    "zero3_hpz": "as zero3, with a second copy of the weights on each node, from which its ranks gather them",
    "zero3_nvme": "as zero3, with optimizer state on NVMe",
    "zero3_offload": "as zero3, with optimizer state in host memory",
}
_MISSING = object()
# Blocks into which a run writes without checking all of their keys.
_ALSO_FILLED = ("fp16", "timers", "timers.throughput")
# Far above what any configuration of DeepSpeed needs.
_MOST_BYTES, _MOST_DIGITS, _DEEPEST = 2**20, 18, 32


def presets() -> list[str]:
    """Return the names of the presets in ds_configs/."""
    return sorted(file.stem for file in PRESET_FOLDER.glob("*.json"))


def is_path(name: str) -> bool:
    """Return whether `deepspeed: name` means a file rather than a preset."""
    return name.endswith(".json") or "/" in name


def read(name: str) -> dict[str, Any]:
    """Read the JSON object of a preset or file. Raises ConfigError: missing, unreadable, invalid, unknown keys."""
    file = Path(os.path.expanduser(name)) if is_path(name) else PRESET_FOLDER / f"{name}.json"
    if not is_path(name) and name not in presets():
        known = presets()
        allowed = f"{' | '.join(known)} | path of a JSON file"
        raise ConfigError([f"deepspeed: got {quoted(name)}; allowed: {allowed}{hint(name, known)}"])
    try:
        text = read_file(file, most_bytes=_MOST_BYTES).decode("utf-8")
        values = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_read_float,
            parse_int=_read_int,
        )
    except FileNotFoundError:
        names = [place.name for place in file.parent.glob("*.json")]
        raise ConfigError([f"deepspeed: no such file: {name!r}{hint(file.name, names)}"]) from None
    except OSError as error:
        raise ConfigError([f"deepspeed: cannot read {name!r}: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"deepspeed: {name!r} is not UTF-8 text (byte {error.start})"]) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError([f"deepspeed: {name!r} is not valid JSON: {where}: {error.msg}"]) from None
    except _JsonError as error:
        raise ConfigError([f"deepspeed: {name!r} {error}"]) from None
    except RecursionError:
        raise ConfigError([f"deepspeed: {name!r} is nested too deeply; allowed: up to {_DEEPEST} levels"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"deepspeed: {name!r} contains a {type(values).__name__}; it must contain a JSON object"])
    if _depth(values) > _DEEPEST:
        raise ConfigError([f"deepspeed: {name!r} is nested too deeply; allowed: up to {_DEEPEST} levels"])
    problems = _key_problems(values, file_name(name))
    if problems:
        raise ConfigError(problems)
    return values


class _JsonError(Exception):
    """Raised for what JSON or its reader in Python allows, but no configuration of DeepSpeed can mean."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _JsonError(f"gives key {key!r} twice")
        if has_control_characters(key) or (isinstance(value, str) and has_control_characters(value)):
            raise _JsonError(f"has control characters in {quoted(key)}: {quoted(value)}; take them out")
        values[key] = value
    return values


def _refuse_constant(text: str) -> float:
    raise _JsonError(f"contains {text}, which is not a number in JSON; write a finite one")


def _read_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise _JsonError(f"contains {in_short(text)}, which is too large for a number; write a finite one")
    return value


def _read_int(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise _JsonError(f"contains an integer of {len(text)} digits; allowed: up to {_MOST_DIGITS}")
    return int(text)


def _depth(values: Any) -> int:
    """Count the levels of objects and lists, without recursion."""
    depth, level = 0, [values]
    while level:
        depth += 1
        inside = [list(value.values()) if isinstance(value, dict) else value for value in level]
        level = [item for items in inside if isinstance(items, list) for item in items if isinstance(item, dict | list)]
    return depth


def file_name(name: str) -> str:
    return Path(name).name if is_path(name) else f"{name}.json"


def _key_problems(values: Mapping[str, Any], source: str) -> list[str]:
    problems = []
    for block in (*BLOCKS, *_ALSO_FILLED):
        known = BLOCKS.get(block)
        found = get(values, block, _MISSING) if block else values
        if found is _MISSING:
            continue
        if not isinstance(found, Mapping):
            problems.append(
                f"deepspeed: {block} is {json.dumps(found)} in {source}; it must be an object of keys and values"
            )
            continue
        if known is None:
            continue
        prefix = f"{block}." if block else ""
        unknown = [key for key in found if key not in known]
        problems += [
            # Searching for keys similar to thousands of others would take minutes, and they are not shown.
            f"deepspeed: {prefix}{in_short(key)} in {source}: unknown key{hint(key, known) if i < MOST_SHOWN else ''}"
            for i, key in enumerate(unknown)
        ]
    return problems
