"""Give an exported folder the files of its base as they were published, in place of those that transformers writes.

transformers writes configurations and tokenizers in its own newest format, which other versions, vLLM or llama.cpp may
not know, or read with defaults in silence. What the run changed is edited into the published files, key by key. What
results is read again; unless it gives what was trained, the files stay as transformers has written them.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

from trainer.checkpoint.identity import CALL_SETTINGS, plain_settings
from trainer.data.errors import in_short
from trainer.data.tokenizer import new_ids, tokenizer_identity
from trainer.model.partitions import created_whole

_TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_TEMPLATES = "additional_chat_templates"
# Of tokenizers and processors, besides those that a tokenizer names itself.
_TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt "
    "tokenizer.model spiece.model sentencepiece.bpe.model tekken.json chat_template.json chat_template.jinja"
).split()
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# Terms that have to go with what is made of the model.
_TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_SHORT = 60


def restore_published(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, tokenizer_folder: Path | None = None
) -> list[str]:
    """Replace the files that transformers wrote into `folder` by those of the model's base and of its tokenizer.

    Returns a line for each key that the run changed, and for each file that stays as transformers wrote it because the
    published one does not give the same. Models without a base, or whose base is gone, keep what was written.
    """
    said = []
    commit = getattr(model.config, "_commit_hash", None)
    base = _published_folder(model.config._name_or_path, (CONFIG_NAME,), commit)
    if base is not None:
        said += _or_as_written(folder, [CONFIG_NAME], CONFIG_NAME, base, lambda: _config(model, base, folder))
        name = GENERATION_CONFIG_NAME
        said += _or_as_written(folder, [name], name, base, lambda: _generation(model, base, folder))
        code = base.glob("*.py") if getattr(model.config, "auto_map", None) else ()
        said += _copied(base, folder, sorted([*code, *(file for pattern in _TERMS for file in base.glob(pattern))]))
    said += restore_tokenizer(tokenizer, folder, published=tokenizer_folder)
    if base is not None:  # a tokenizer with tokens of the run's own is not that of a folder with a processor
        said += _copied(base, folder, _lacking(folder, base, _PROCESSOR_FILES))
    return said


def restore_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, *, published: Path | None = None) -> list[str]:
    """Replace the tokenizer's files in `folder` by those in `published`, or where it was loaded from. Special tokens,
    settings and a chat template of the run's own are edited into them. Returns lines as `restore_published` does."""
    names = (*_TOKENIZER_FILES, *_PROCESSOR_FILES, *tokenizer.vocab_files_names.values())
    commit = tokenizer.init_kwargs.get("_commit_hash")
    base = published or _published_folder(tokenizer.name_or_path, (_TOKENIZER_CONFIG, "tokenizer.json"), commit)
    if base is None:
        return []
    if (ids := new_ids(tokenizer)) and published is None:  # published files cannot have them
        added = f"the tokenizer: with {len(ids)} new token{'s' * (len(ids) > 1)}, as transformers writes it"
        code = [file.name for file in base.glob("*.py")] if "auto_map" in tokenizer.init_kwargs else []
        copied = _copied(base, folder, _lacking(folder, base, [*_PROCESSOR_FILES, *code]))
        return [added, *copied, *_misread(tokenizer, base, folder)]
    said = _or_as_written(
        folder, names, "the tokenizer", base, lambda: _tokenizer(tokenizer, base, folder, names), _TEMPLATES
    )
    return said + _misread(tokenizer, base, folder)


def _copied(base: Path, folder: Path, files: Iterable[Path]) -> list[str]:
    """Copy files of `base`. Returns a line for each that could not be copied."""
    said = []
    for file in files:
        try:
            _copy(base, folder, file)
        except OSError as error:  # no reason to lose a model
            said.append(f"{file.name}: could not be copied from {base} ({error.strerror})")
    return said


def _lacking(folder: Path, base: Path, names: Iterable[str]) -> list[Path]:
    return [base / name for name in names if not (folder / name).exists()]


def _published_folder(name_or_path: str | None, files: Iterable[str], commit: str | None) -> Path | None:
    """Return the folder, or the local copy of a name on the Hub at `commit`, in which one of `files` is, or None."""
    if not name_or_path:
        return None
    try:
        if (path := Path(name_or_path)).is_dir():
            return path if any((path / file).is_file() for file in files) else None
        options = {"revision": commit, "local_files_only": True, "_raise_exceptions_for_missing_entries": False}
        found = [file for file in (cached_file(name_or_path, file, **options) for file in files) if file is not None]
    except Exception:  # a file system that is gone, not in the cache, or no name at all
        return None
    return Path(found[0]).parent if found else None


def _or_as_written(
    folder: Path, names: Iterable[str], what: str, base: Path, work: Callable[[], list[str]], subfolder: str = ""
) -> list[str]:
    """Return what `work` does, or put back the files that it may have replaced and say so: whatever a published file
    makes of transformers, no run loses its model over it."""

    def present() -> list[Path]:
        listed = [folder / name for name in dict.fromkeys(names)]
        return [path for path in [*listed, *(folder / (subfolder or "-")).glob("*")] if path.is_file()]

    written = {path: path.read_bytes() for path in present()}
    try:
        return work()
    except Exception as error:
        for path in present():
            path.unlink()
        for path, content in written.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        return [f"{what}: as transformers writes it, not as in {base} ({in_short(error)})"]


def _config(model: PreTrainedModel, base: Path, folder: Path) -> list[str]:
    published = _mapping(base / CONFIG_NAME)
    now = plain_settings(model.config)
    edited = copy.deepcopy(published)
    lines = [*_edit(edited, plain_settings(_as_built(model, published)), now), *_edit_kind(edited, model)]
    if plain_settings(_as_built(model, edited)) != now:
        raise ValueError("with what the run changed, it is read as another model")
    _write(folder / CONFIG_NAME, edited, base / CONFIG_NAME if edited == published else None)
    return [f"{CONFIG_NAME}: {line}" for line in lines]


def _as_built(model: PreTrainedModel, settings: Mapping[str, Any]) -> PretrainedConfig:
    """Return a configuration as a model that is built from it leaves it: some write into theirs."""
    config = type(model.config).from_dict(copy.deepcopy(dict(settings)))
    try:
        with torch.device("meta"), created_whole():
            return type(model)(copy.deepcopy(config)).config
    except Exception:  # code that needs weights
        return config


def _edit(published: dict[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Write into `published` what differs between two readings, and yield a line for each key."""
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key == "rope_parameters" and key not in published and isinstance(new, dict):
            _edit_rope(published, new)
            yield f"{key} is {_short(new)}, was {_short(old)}"
        elif isinstance(old, dict) and isinstance(new, dict) and isinstance(published.get(key), dict):
            yield from (f"{key}.{line}" for line in _edit(published[key], old, new))
        elif key in now:
            published[key] = new
            yield f"{key} is {_short(new)}, was {_short(old)}"
        else:
            published.pop(key, None)
            yield f"{key} is gone, was {_short(old)}"


def _edit_rope(published: dict[str, Any], parameters: dict[str, Any]) -> None:
    """Write rotary embeddings as transformers 4 does, which has two keys for them. Every version reads these."""
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ValueError("rope_parameters of several kinds of layers have no place in it")
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    published["rope_theta"] = parameters["rope_theta"]
    published["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling


def _edit_kind(published: dict[str, Any], model: PreTrainedModel) -> Iterator[str]:
    """Write what says how weights are stored, and the class if the published file names others only."""
    dtype = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
    # If there is none yet, the key that every version reads.
    for key in [key for key in ("dtype", "torch_dtype") if key in published] or ["torch_dtype"]:
        if published.get(key) != dtype:
            was = published.get(key)
            published[key] = dtype
            yield f"{key} is {dtype}" + (f", was {was}" if was else "")
    if "quantization_config" in published and not hasattr(model.config, "quantization_config"):
        was = published.pop("quantization_config")
        yield f"quantization_config is gone, was {_short(was)}"
    kind = type(model).__name__
    if kind not in (published.get("architectures") or []):
        was = published.get("architectures")
        published["architectures"] = [kind]
        yield f"architectures is {kind}" + (f", was {', '.join(map(str, was))}" if was else "")


def _generation(model: PreTrainedModel, base: Path, folder: Path) -> list[str]:
    path, target = base / GENERATION_CONFIG_NAME, folder / GENERATION_CONFIG_NAME
    settings = getattr(model, "generation_config", None)  # models with code of their own may have none
    if not path.is_file():
        derived = GenerationConfig.from_model_config(_as_built(model, _mapping(base / CONFIG_NAME)))
        if settings is None or plain_settings(derived) == plain_settings(settings):
            target.unlink(missing_ok=True)
        return []
    if settings is None:
        _copy(base, folder, path)
        return []
    published = _mapping(path)
    edited = copy.deepcopy(published)
    now = plain_settings(settings)
    lines = list(_edit(edited, plain_settings(GenerationConfig.from_dict(copy.deepcopy(published))), now))
    if plain_settings(GenerationConfig.from_dict(copy.deepcopy(edited))) != now:
        raise ValueError("with what the run changed, it is read as other settings")
    _write(target, edited, path if edited == published else None)
    return [f"{GENERATION_CONFIG_NAME}: {line}" for line in lines]


def _tokenizer(tokenizer: PreTrainedTokenizerBase, base: Path, folder: Path, names: Iterable[str]) -> list[str]:
    custom = type(tokenizer).__module__.startswith("transformers_modules.")  # which runs already
    published = AutoTokenizer.from_pretrained(base, trust_remote_code=custom)
    path = base / _TOKENIZER_CONFIG
    settings = _mapping(path) if path.is_file() else {}
    for name in names:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / _TEMPLATES, ignore_errors=True)
    files = [base / name for name in names] + sorted(base.glob(f"{_TEMPLATES}/*.jinja"))
    for file in [*files, *(sorted(base.glob("*.py")) if "auto_map" in settings else ())]:
        _copy(base, folder, file)
    lines = list(_edit_tokenizer(tokenizer, published, settings, folder))
    if lines:
        _write(folder / _TOKENIZER_CONFIG, settings, None)
    # Code is not loaded from a folder that is about to be renamed.
    again = published if custom and not lines else AutoTokenizer.from_pretrained(folder, trust_remote_code=custom)
    if _identity(again) != _identity(tokenizer):
        raise ValueError("the published files are read as another tokenizer, or the run changed its vocabulary")
    return lines


def _misread(tokenizer: PreTrainedTokenizerBase, base: Path, folder: Path) -> list[str]:
    """Say if the files in `folder` are read as another tokenizer: the type of a model may decide the class."""
    if type(tokenizer).__module__.startswith("transformers_modules."):
        return []
    try:
        found = AutoTokenizer.from_pretrained(folder)
        if tokenizer_identity(found) == tokenizer_identity(tokenizer):
            return []
        as_what = f"as {type(found).__name__}, which encodes texts in another way"
    except Exception as error:
        as_what = f"not at all ({in_short(error)})"
    return [f"WARNING: beside this config.json transformers reads the tokenizer {as_what}: load it from {base}"]


def _edit_tokenizer(
    tokenizer: PreTrainedTokenizerBase, published: PreTrainedTokenizerBase, settings: dict[str, Any], folder: Path
) -> Iterator[str]:
    """Write into `settings`, and the file of special tokens, what differs from the published tokenizer."""
    before, now = published.special_tokens_map, tokenizer.special_tokens_map
    path = folder / _SPECIAL_TOKENS
    special = _mapping(path) if path.is_file() else None
    for key in sorted(key for key in {*before, *now} if str(before.get(key)) != str(now.get(key))):
        value = now.get(key)
        if isinstance(value, list | tuple):  # additional ones are entries of the vocabulary
            continue
        for values in [settings, *([] if special is None else [special])]:
            values[key] = None if value is None else str(value)
        yield f"tokenizer: {key} is {_short(None if value is None else str(value))}, was {_short(str(before.get(key)))}"
    if special is not None and special != _mapping(path):
        _write(path, special, None)
    for key in CALL_SETTINGS:
        old, new = getattr(published, key, None), getattr(tokenizer, key, None)
        if old != new:
            settings[key] = new
            yield f"tokenizer: {key} is {_short(new)}, was {_short(old)}"
    if published.chat_template != tokenizer.chat_template:
        _put_template(tokenizer.chat_template, settings, folder)
        yield "chat template: is the run's, not the published one"


def _put_template(template: str | dict[str, str] | None, settings: dict[str, Any], folder: Path) -> None:
    """Put the template into `settings`, where every version looks for it if there is no file."""
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / _TEMPLATES, ignore_errors=True)
    settings.pop("chat_template", None)
    if isinstance(template, dict):
        settings["chat_template"] = [{"name": name, "template": text} for name, text in template.items()]
    elif template is not None:
        settings["chat_template"] = template


def _identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return tokenizer_identity(tokenizer) | {key: getattr(tokenizer, key, None) for key in CALL_SETTINGS}


def _copy(base: Path, folder: Path, file: Path) -> None:
    """Copy the content: in the Hub's cache files are links."""
    if file.is_file():
        copied = folder / file.relative_to(base)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copied)


def _write(path: Path, content: Mapping[str, Any], published: Path | None) -> None:
    """Write `content`, byte for byte as published if there is such a file."""
    if published is not None:
        shutil.copyfile(published, path)
    else:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _mapping(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHORT else text[:_SHORT] + "..."
