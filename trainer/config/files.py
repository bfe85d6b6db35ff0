"""Read and write configuration files, resolve relative paths, and check whether the named files can be used."""

import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.config import core_yaml
from trainer.config.architecture import architecture_problems
from trainer.config.core_yaml import YamlError
from trainer.config.deepspeed import presets
from trainer.config.errors import ConfigError, nearest
from trainer.config.reading import folder_obstacle, obstacle, read_file
from trainer.config.schema import RunConfig
from trainer.config.sources import DATA_SUFFIXES, hub_name, source_list
from trainer.config.text import quoted

MODEL_MARKER, ADAPTER_MARKER = "config.json", "adapter_config.json"
# An index of weights has a line for each tensor.
_MOST_JSON_BYTES = 2**28
# File systems allow 255 bytes, of which OUTPUT-2, OUTPUT-JOB.log and temporary names need some.
_LONGEST_NAME = 200
# The keys of folders that need not be listed.
_WRITTEN = ("output", "data.cache")


def dump(config: RunConfig) -> str:
    """Return YAML that `load` reads back to an equal configuration, with the parts of the method written out."""
    return core_yaml.write(config.model_dump(mode="json"))


def read_yaml(path: str) -> dict[str, Any]:
    """Read the mapping in a YAML file; an empty file is an empty mapping. Raises ConfigError with file and line."""
    try:
        values = core_yaml.read(read_file(path, most_bytes=core_yaml.MOST_BYTES).decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError([f"configuration file: {missing_file(path, [Path.cwd()])}"]) from None
    except OSError as error:
        raise ConfigError([f"configuration file: cannot read {path!r}: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{path}, line {line}: not UTF-8 text (byte 0x{error.object[error.start]:02x})"]) from None
    except YamlError as error:
        where = path if error.line is None else f"{path}, line {error.line}"
        raise ConfigError([f"{where}: not valid YAML: {error.problem}"]) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            [f"{path}: contains a {type(values).__name__}; it must contain keys and values, such as `seed: 0`"]
        )
    return values


def resolve_paths(values: Mapping[str, Any], bases: Sequence[Path]) -> dict[str, Any]:
    """Return `values` with every path to an existing file or folder made absolute; the first base that has it wins.

    Hub names, presets and paths that do not exist are kept as they are.
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
    if isinstance(named, str) and presets.is_path(named):
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
        if path and os.path.exists(base / expanded):
            return os.path.abspath(base / expanded)
    return path


def path_problems(values: Mapping[str, Any]) -> list[str]:
    """Find paths of a configuration that cannot be used: unknown home folders, impossible names, closed folders."""
    problems = []
    for key, path in _named_paths(values):
        expanded = os.path.expanduser(path)
        if expanded.startswith("~"):
            user = expanded.partition("/")[0]
            problems.append(f"{key}: got {quoted(path)}, but there is no home folder {quoted(user)}; write it in full")
        elif reason := obstacle(expanded) or (None if key in _WRITTEN else folder_obstacle(expanded)):
            problems.append(f"{key}: got {quoted(path)}: {reason}; name another")
    return problems


def _named_paths(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, path) of everything in a configuration that names a file or folder; wrong types are skipped."""
    data, model = _section(values, "data"), _section(values, "model")
    found = {
        "output": values.get("output"),
        "resume": values.get("resume"),
        "deepspeed": values.get("deepspeed"),
        "data.cache": data.get("cache"),
        "model.path": model.get("path"),
        "model.tokenizer": model.get("tokenizer"),
        "substrate.adapter": _section(values, "substrate").get("adapter"),
    }
    for name in ("train", "eval"):
        found |= {key: source.get("path") for key, source in _sources(data, name)}
    for key, path in found.items():
        if isinstance(path, str) and path and (key != "deepspeed" or presets.is_path(path)):
            yield key, path


def _sources(data: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (key, source) of those entries of `data.train` or `data.eval` that are mappings."""
    sources = source_list(data.get(name))
    for index, source in enumerate(sources if isinstance(sources, list) else []):
        if isinstance(source, Mapping):
            yield f"data.{name}" if len(sources) == 1 else f"data.{name}[{index}]", source


def file_problems(values: Mapping[str, Any], bases: Sequence[Path]) -> list[str]:
    """Find problems with the files and folders that a configuration names; values of a wrong type are skipped.

    `bases`: the folders in which relative paths were looked up (`resolve_paths`), searched for similar names.
    """
    data, model = _section(values, "data"), _section(values, "model")
    problems = []
    for name in ("train", "eval"):
        for key, source in _sources(data, name):
            if isinstance(source.get("path"), str) and source["path"]:
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


def model_size_problems(values: Mapping[str, Any]) -> list[str]:
    """Find impossible sizes in `model.random`, or in the config.json of the folder `model.path`.

    A file that cannot be read is ignored here and reported where it is needed.
    """
    model = _section(values, "model")
    problems = []
    if isinstance(model.get("random"), Mapping):
        problems += architecture_problems("model.random", model["random"])
    path = model.get("path")
    file = Path(os.path.expanduser(path)) / MODEL_MARKER if isinstance(path, str) and path else None
    if file is not None and os.path.isfile(file):
        with suppress(OSError, ValueError, RecursionError):
            fields = _read_json(file)
            problems += architecture_problems(f"model.path: {MODEL_MARKER}", fields) if isinstance(fields, dict) else []
    return problems


def missing_file(path: str, bases: Sequence[Path]) -> str:
    """Return `no such file: 'trian.jsonl'; nearest: 'train.jsonl'`, with a similar name from the same folder."""
    expanded = os.path.expanduser(path)
    # Each as it would be typed: a name in the same folder, or a full path into the YAML file's folder.
    similar: dict[str, str] = {}
    for base in bases:
        folder = (base / expanded).parent
        with suppress(OSError, ValueError):
            for name in os.listdir(folder):
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
    file = Path(os.path.expanduser(path))
    suffixes = " | ".join(DATA_SUFFIXES)
    if not file.exists():
        return [] if hub_name(path) else [f"{key}: {missing_file(path, bases)}"]
    if file.is_dir():
        found = any(name.endswith(DATA_SUFFIXES) for _, _, names in os.walk(file) for name in names)
        return [] if found else [f"{key}: {path!r} is a folder without a data file; allowed: {suffixes}"]
    if file.suffix not in DATA_SUFFIXES or not file.is_file():
        return [f"{key}: {path!r} does not have the name of a data file; allowed: {suffixes}"]
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
    return [*problems, f"{key}: {path!r} is empty; it must contain rows"] if empty else problems


def _model_problems(key: str, path: str, bases: Sequence[Path], *, marker: str | None = None) -> list[str]:
    folder = Path(os.path.expanduser(path))
    expected = "a Hugging Face folder, or a hub name such as owner/name"
    if not folder.exists():
        if not _looks_local(path):
            return []
        missing = missing_file(path, bases).replace("no such file", "no such folder", 1)
        return [f"{key}: {missing}; allowed: {expected}"]
    if not folder.is_dir():
        return [f"{key}: {path!r} is a file; allowed: {expected}"]
    if marker == MODEL_MARKER and os.path.isfile(folder / ADAPTER_MARKER):
        return [
            f"{key}: {path!r} contains an adapter ({ADAPTER_MARKER}), no model of its own; set model.path to the base "
            f"{_base_of(folder)}and, to continue training the adapter, substrate.adapter={path}"
        ]
    if marker and not os.path.isfile(folder / marker):
        return [f"{key}: folder {path!r} has no {marker}; allowed: {expected}"]
    if marker and (reason := _unreadable(folder / marker)):
        return [f"{key}: cannot read {str(folder / marker)!r}: {reason}; allow it, or name another folder"]
    return _weight_problems(key, path, folder) if marker else []


def _unreadable(file: Path) -> str | None:
    """Return why a regular file cannot be opened, or None."""
    try:
        file.open("rb").close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _base_of(adapter: Path) -> str:
    """Return `(owner/name) `, as PEFT recorded it, or an empty string."""
    try:
        base = _read_json(adapter / ADAPTER_MARKER).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    return f"({base}) " if isinstance(base, str) and base else ""


def _weight_problems(key: str, path: str, folder: Path) -> list[str]:
    """Find missing files of weights: all of them, or some that the index names."""
    for index in (*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")):
        try:
            named = set(_read_json(index)["weight_map"].values())
            missing = sorted(name for name in named if not os.path.isfile(folder / name))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return [f"{key}: cannot read {str(index)!r}, which says where the weights are"]
        if missing:
            return [f"{key}: folder {path!r} lacks {len(missing)} of {len(named)} weight files, such as {missing[0]}"]
        return []
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return [f"{key}: folder {path!r} has no weights (*.safetensors or *.bin)"]
    return []


def _read_json(file: Path) -> Any:
    return json.loads(read_file(file, most_bytes=_MOST_JSON_BYTES).decode("utf-8"))


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def _folder_problems(key: str, path: Any) -> list[str]:
    if not isinstance(path, str) or not path:
        return []
    folder = Path(os.path.expanduser(path))
    if key == "output" and not Path(os.path.abspath(folder)).name:
        return [f"{key}: {path!r} is the root of all folders; name one of its own"]
    if key == "output" and len(os.fsencode(folder.name)) > _LONGEST_NAME:
        return [
            f"{key}: {quoted(path)} ends in a name of {len(os.fsencode(folder.name))} bytes; allowed: up to "
            f"{_LONGEST_NAME}, because other names are made of it"
        ]
    # The nearest existing parent decides whether the rest can be created.
    existing = next((place for place in (folder, *folder.absolute().parents) if os.path.exists(place)), Path("/"))
    if not existing.is_dir():
        return [f"{key}: {path!r} cannot be a folder, {str(existing)!r} is a file; name another folder"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"{key}: {path!r} cannot be written, no permission for {str(existing)!r}; name another folder"]
    try:  # access() is always true for root, and /proc accepts no files
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        return [
            f"{key}: {path!r} cannot be written, {str(existing)!r} accepts no files ({reason}); name another folder"
        ]
    return []


def _deepspeed_problems(name: Any) -> list[str]:
    if not isinstance(name, str) or not name:
        return []
    try:
        presets.read(name)
    except ConfigError as error:
        return error.problems
    return []
