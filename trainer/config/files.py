"""Configuration files: YAML in and out, where relative paths point, and whether the named files can be used."""

import importlib.util
import json
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer.config import deepspeed as deepspeed_config
from trainer.config.errors import ConfigError, nearest
from trainer.config.schema import RunConfig
from trainer.config.sources import DATA_SUFFIXES, hub_name, source_list

MODEL_MARKER, ADAPTER_MARKER = "config.json", "adapter_config.json"
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """PyYAML's YAML 1.1, but 2e-5 is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"key {key.value!r} given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as numbers."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def dump(config: RunConfig) -> str:
    """YAML that `load` reads back to an equal configuration, with the method's parts written out."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)


def parse_value(text: str) -> Any:
    """The value of an override, in YAML; yaml.YAMLError where it is not."""
    return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError names file and line. An empty file is an empty mapping."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
        values = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise ConfigError([f"configuration file: {missing_file(path, [Path.cwd()])}"]) from None
    except OSError as error:
        raise ConfigError([f"configuration file: cannot read {path!r}: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{path}, line {line}: not UTF-8 text (byte 0x{error.object[error.start]:02x})"]) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError([f"{path}, line {line}: not valid YAML: {error.problem}"]) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, such as 2024-13-45
        raise ConfigError([f"{path}: not valid YAML: {error}"]) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: holds a {type(values).__name__}; it must hold keys and values, such as `seed: 0`"])
    return values


def resolve_paths(values: Mapping[str, Any], bases: Sequence[Path]) -> dict[str, Any]:
    """`values` with every path to an existing file or folder made absolute; the first base that has it wins.

    Hub names, presets and what exists nowhere stay as they are.
    """
    resolved = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    data, model = resolved.get("data"), resolved.get("model")
    for name in ("train", "eval"):
        if isinstance(data, dict) and name in data:
            data[name] = _resolve_sources(data[name], bases)
    for name in ("path", "tokenizer"):
        if isinstance(model, dict) and isinstance(model.get(name), str) and model[name] != "bytes":
            model[name] = _resolve_path(model[name], bases)
    substrate = resolved.get("substrate")
    if isinstance(substrate, dict) and isinstance(substrate.get("adapter"), str):
        substrate["adapter"] = _resolve_path(substrate["adapter"], bases)
    named = resolved.get("deepspeed")
    if isinstance(named, str) and deepspeed_config.is_path(named):
        resolved["deepspeed"] = _resolve_path(named, bases)
    return resolved


def _resolve_sources(value: Any, bases: Sequence[Path]) -> Any:
    if isinstance(value, str):
        return _resolve_path(value, bases)
    if isinstance(value, list):
        return [_resolve_sources(source, bases) for source in value]
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        return {**value, "path": _resolve_path(value["path"], bases)}
    return value


def _resolve_path(path: str, bases: Sequence[Path]) -> str:
    expanded = os.path.expanduser(path)
    for base in bases:
        if path and (base / expanded).exists():
            return os.path.abspath(base / expanded)
    return path


def file_problems(values: Mapping[str, Any], bases: Sequence[Path]) -> list[str]:
    """What is wrong with the files and folders that a configuration names; values of a wrong type are passed over.

    `bases`: the folders in which relative paths were looked for (`resolve_paths`), searched for similar names.
    """
    data, model = _section(values, "data"), _section(values, "model")
    problems = []
    for name in ("train", "eval"):
        sources = source_list(data.get(name))
        for index, source in enumerate(sources if isinstance(sources, list) else []):
            key = f"data.{name}" if len(sources) == 1 else f"data.{name}[{index}]"
            if isinstance(source, Mapping) and isinstance(source.get("path"), str) and source["path"]:
                problems += _source_problems(key, source, bases)
    if isinstance(model.get("path"), str) and model["path"]:
        problems += _model_problems("model.path", model["path"], bases, marker=MODEL_MARKER)
    adapter = _section(values, "substrate").get("adapter")
    if isinstance(adapter, str) and adapter:
        problems += _model_problems("substrate.adapter", adapter, bases, marker=ADAPTER_MARKER)
    if isinstance(model.get("tokenizer"), str) and model["tokenizer"] not in ("", "bytes"):
        problems += _model_problems("model.tokenizer", model["tokenizer"], bases)
    problems += _folder_problems("output", values.get("output", RunConfig.model_fields["output"].default))
    problems += _folder_problems("data.cache", data.get("cache"))
    problems += _deepspeed_problems(values.get("deepspeed", RunConfig.model_fields["deepspeed"].default))
    if _section(values, "monitor").get("tensorboard") is True and importlib.util.find_spec("tensorboard") is None:
        problems.append("monitor.tensorboard: got true, but package tensorboard is missing; install it or set false")
    if model.get("quantization") is not None and importlib.util.find_spec("bitsandbytes") is None:
        problems.append(
            f"model.quantization: {model['quantization']}, but package bitsandbytes is missing; pip install "
            "'strata-trainer[4bit]', or set null"
        )
    if _section(values, "optimizer").get("name") == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        problems.append(
            "optimizer.name: adamw_8bit, but package bitsandbytes is missing; pip install "
            "'strata-trainer[8bit]', or set adamw"
        )
    return problems


def missing_file(path: str, bases: Sequence[Path]) -> str:
    """`no such file: 'trian.jsonl'; nearest: 'train.jsonl'`, with a similar name from the folder that it points to."""
    expanded = os.path.expanduser(path)
    # Each as it would be typed: beside the name that was typed, or as a full path into the YAML file's folder.
    similar: dict[str, str] = {}
    for base in bases:
        folder = (base / expanded).parent
        for name in os.listdir(folder) if folder.is_dir() else []:
            similar.setdefault(name, name if base == bases[0] else str(folder / name))
    match = nearest(os.path.basename(expanded), similar)
    if match:
        return f"no such file: {path!r}; nearest: {similar[match]!r}"
    return f"no such file: {path!r} (looked in {_listed(bases, expanded)})"


def _listed(bases: Sequence[Path], path: str) -> str:
    return " and ".join(dict.fromkeys(str((base / path).parent) for base in bases))


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _source_problems(key: str, source: Mapping[str, Any], bases: Sequence[Path]) -> list[str]:
    path = source["path"]
    file = Path(path).expanduser()
    suffixes = " | ".join(DATA_SUFFIXES)
    if not file.exists():
        return [] if hub_name(path) else [f"{key}: {missing_file(path, bases)}"]
    if file.is_dir():
        found = any(name.endswith(DATA_SUFFIXES) for _, _, names in os.walk(file) for name in names)
        return [] if found else [f"{key}: {path!r} is a folder without a data file; allowed: {suffixes}"]
    if file.suffix not in DATA_SUFFIXES or not file.is_file():
        return [f"{key}: {path!r} is no data file by its name; allowed: {suffixes}"]
    problems = [
        f"{key}: {name} {source[name]!r} of the file {path!r}; only Hub names and folders have one, set null"
        for name in ("split", "subset")
        if source.get(name) is not None
    ]
    try:
        with file.open("rb") as stream:
            empty = not stream.read(1)
    except OSError as error:
        return [*problems, f"{key}: cannot read {path!r}: {error.strerror}"]
    return [*problems, f"{key}: {path!r} is empty; it must hold rows"] if empty else problems


def _model_problems(key: str, path: str, bases: Sequence[Path], *, marker: str | None = None) -> list[str]:
    folder = Path(path).expanduser()
    expected = "a Hugging Face folder, or a hub name such as owner/name"
    if not folder.exists():
        if not _looks_local(path):
            return []
        missing = missing_file(path, bases).replace("no such file", "no such folder", 1)
        return [f"{key}: {missing}; allowed: {expected}"]
    if not folder.is_dir():
        return [f"{key}: {path!r} is a file; allowed: {expected}"]
    if marker == MODEL_MARKER and (folder / ADAPTER_MARKER).is_file():
        return [
            f"{key}: {path!r} holds an adapter ({ADAPTER_MARKER}), no model of its own; set model.path to the base "
            f"{_base_of(folder)}and, to go on training the adapter, substrate.adapter={path}"
        ]
    if marker and not (folder / marker).is_file():
        return [f"{key}: folder {path!r} has no {marker}; allowed: {expected}"]
    return _weight_problems(key, path, folder) if marker else []


def _base_of(adapter: Path) -> str:
    """`(owner/name) `, as PEFT noted it."""
    try:
        base = json.loads((adapter / ADAPTER_MARKER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return ""
    return f"({base}) " if isinstance(base, str) and base else ""


def _weight_problems(key: str, path: str, folder: Path) -> list[str]:
    """Files of weights that are not there: all of them, or some that the index names."""
    for index in (*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [f"{key}: cannot read {str(index)!r}, which says where the weights are"]
        missing = sorted(name for name in named if not (folder / name).is_file())
        if missing:
            return [f"{key}: folder {path!r} lacks {len(missing)} of {len(named)} weight files, such as {missing[0]}"]
        return []
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return [f"{key}: folder {path!r} has no weights (*.safetensors or *.bin)"]
    return []


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def _folder_problems(key: str, path: Any) -> list[str]:
    if not isinstance(path, str) or not path:
        return []
    folder = Path(path).expanduser()
    # The nearest thing that exists decides whether the rest can be created.
    existing = next((place for place in (folder, *folder.absolute().parents) if place.exists()), Path("/"))
    if not existing.is_dir():
        return [f"{key}: {path!r} cannot be a folder, {str(existing)!r} is a file; name another folder"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"{key}: {path!r} cannot be written, no permission for {str(existing)!r}; name another folder"]
    return []


def _deepspeed_problems(name: Any) -> list[str]:
    if not isinstance(name, str) or not name:
        return []
    try:
        deepspeed_config.read(name)
    except ConfigError as error:
        return error.problems
    return []
