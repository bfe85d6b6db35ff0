"""Wrong command lines and files for every command of `python -m trainer`, as tables: kinds times commands.

A case is the words after the command's name, and words of which the refusal must contain one. Files that the tables
name are made by `write_files`, beside the run, base and delta of `tests.mutations.make_pristine`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.mutations import BASE, DELTA, RUN

JOB = ("--gpus", "1", "--time", "1:00:00", "--print")
RECIPE = "recipe.yaml"

# --- Paths, in the place of each path that a command takes. A tuple has what the refusal names instead of the path.
PATHS: dict[str, str | tuple[str, str]] = {
    "missing": "missing",
    "an empty folder": "empty-folder",
    "binary garbage": "garbage",
    "JSON of another kind": "list.json",
    "cut JSON": "cut.json",
    "a huge file": "huge",
    "below a file": "garbage/x",
    "a dangling link": "dangling",
    "a loop of links": "loop",
    "a pipe": "pipe",
    "a device": "/dev/zero",
    "a name with NUL": ("a\0b", "\\x00"),
    "a long name": "n" * 300,
    "a long path": "a/" * 3000,
    "nobody's home": "~no-such-user/x",
    "control characters": ("a\x1b[31mb", "\\x1b"),
    "a line end": ("two\nlines", "two\\nlines"),
    "change of direction": ("a\u202eb", "\\u202e"),
    "a name that is not UTF-8": ("\udcff.yaml", "\\udcff"),
    "a name in other letters": "名前",
}
if os.geteuid():  # root may read everything
    PATHS |= {"no permission": "unreadable"}

# --- Words after a command line that is right.
WORDS: dict[str, tuple[str, ...]] = {
    "an unknown option": ("--no-such",),
    "an unknown option with a value": ("--no-such=3",),
    "an unknown short option": ("-x",),
    "an option of another program": ("--verbose", "3"),
    "an option in capitals": ("--PRINT",),
    "an option with control characters": ("--\x1b]0;title\a",),
    "a very long option": ("--" + "x" * 5000,),
    "an option that is not UTF-8": ("--\udcff",),
    "words too many": ("one", "two", "three"),
}

# --- Settings of a recipe.
SETTINGS: dict[str, tuple[str, ...]] = {
    "an unknown key": ("steps=3",),
    "a key with a slip": ("selector.block=3",),
    "a key below a value": ("train.steps.x=3",),
    "no key": ("=3",),
    "no value": ("train.steps=",),
    "a value of another type": ("train.steps=many",),
    "a fraction": ("train.steps=2.5",),
    "a list": ("train.steps=[3]",),
    "a mapping": ("train.steps={a: 3}",),
    "a section that is a number": ("train=3",),
    "zero": ("train.steps=0",),
    "below zero": ("optimizer.lr=-1e-3",),
    "not a number": ("optimizer.lr=.nan",),
    "infinity": ("optimizer.lr=.inf",),
    "too large for a number": ("optimizer.lr=1e999",),
    "too many digits": ("seed=" + "9" * 5000,),
    "out of range": ("optimizer.betas=[0.9, 1.5]",),
    "an unknown name": ("selector.name=unifrom",),
    "an unknown method": ("method=lora2",),
    "an unknown type of weights": ("model.dtype=fp8",),
    "an unknown preset": ("deepspeed=zero9",),
    "contradictory keys": ("train.epochs=2",),
    "a batch that does not divide": ("train.global_batch_size=3", "train.micro_batch_size=2"),
    "YAML that is cut": ("selector=[1",),
    "a tag of YAML": ("seed=!!python/object/apply:os.system [true]",),
    "an alias of itself": ("seed=&a [*a]",),
    "deep nesting": ("seed=" + "[" * 60 + "]" * 60,),
    "control characters in a value": ('output="a\\eb"',),
    "the root as output": ("output=/",),
    "a file as output": ("output=garbage",),
    "a folder that takes no files": ("output=/proc/x",),
    "a model that is a file": ("model.path=garbage",),
    "a model that is an empty folder": ("model.path=empty-folder",),
}

# --- Files: text of recipes, and of DeepSpeed's JSON (`deepspeed=FILE`).
RECIPES: dict[str, bytes] = {
    "tabs": b"train:\n\tsteps: 3\n",
    "a key twice": b"seed: 1\nseed: 2\n",
    "no text": b"seed: \xff\n",
    "a word": b"recipe\n",
    "a key that is a number": b"1: 2\n",
}
DEEPSPEED: dict[str, bytes] = {
    "cut": b'{"zero_optimization": {"stage": 2',
    "NaN": b'{"gradient_clipping": NaN}',
    "a list": b"[]",
    "a key twice": b'{"bf16": {}, "bf16": {}}',
    "an unknown key": b'{"zero_optimisation": {"stage": 2}}',
    "a stage that is text": b'{"zero_optimization": {"stage": "two"}}',
}
# --- Data of train and prepare.
ROWS: dict[str, bytes] = {
    "garbage.jsonl": bytes(range(256)) * 4,
    "empty.jsonl": b"",
    "cut.jsonl": b'{"question": "a", "answer": "b"}\n{"question": "c", "ans',
    "columns.jsonl": b'{"one": 1}\n' * 4,
    "numbers.jsonl": b"1\n2\n3\n",
    "types.jsonl": b'{"question": {"a": [1]}, "answer": 3}\n' * 4,
    "garbage.parquet": b"PAR1" + bytes(100) + b"PAR1",
    "empty-rows.json": b"[]",
    "ragged.csv": b"question,answer\na\nb,c,d\n",
}
# --- Numbers in options that count; the option goes before.
COUNTS = ("0", "-1", "1.5", "nan", "many", "", "9" * 5000, "٣")

OPTIONS: dict[str, list[tuple[str, ...]]] = {
    "train": [("--deepspeed_config",), ("--local_rank",), ("--deepspeed_config", "garbage"), ("--dry-run=yes",)],
    "prepare": [("--dry-run",), ("--show",), *(("--show=" + number,) for number in COUNTS if number)],
    "plan": [
        *(("--gpus", number) for number in COUNTS),
        *(("--gpu-memory", size) for size in ("many", "-80GB", "0", "nan", "1e400", "80XB")),
        *(("--flops", speed) for speed in ("fast", "nan", "inf", "0", "-1")),
        ("--samples", "-3"),
        ("--bandwidth",),
        ("--samples", "100"),
        ("--bandwidth", "50GB"),
        ("--host-bandwidth", "25GB"),
        ("--short", "--flops", "measured"),
        ("--short", "--json"),
    ],
    "submit": [
        *(("--nodes", number) for number in COUNTS),
        *(("--time", time) for time in ("soon", "-1", "1:2:3:4", "", "0", "nan")),
        ("--notice", "7200"),
        ("--partition", ""),
        ("--partition", "a\nb"),
        ("--mem", "a\\b"),
        ("--sbatch=x",),
        ("--sbatch=--x\n#SBATCH --y",),
        ("--account",),
    ],
    "checkpoints": [
        *(
            ("--step", "3"),
            ("--best",),
            ("key=value",),
            ("--",),
            ("",),
            (RUN,),
            ("--step=3", "--step=4"),
            ("~",),
            (".", ".."),
        ),
    ],
    "export": [
        *(("--step", number) for number in ("99", "-1", "1.5", "nan", "many", "", "9" * 5000)),
        ("--step", "4", "--best"),
        *(("--shard-size", size) for size in ("0", "-5GB", "nan", "many", "1B", "5PB", "")),
        ("--base", "missing"),
        ("--base", "garbage"),
        ("--base", "empty-folder"),
        ("--base", "a\0b"),
        ("--tokenizer", "garbage"),
        ("--tokenizer", "empty-folder"),
        ("--base",),
    ],
    "apply": [
        *(("--shard-size", size) for size in ("0", "-5GB", "nan", "many", "1B", "5PB", "")),
        ("--shard-size",),
        ("--step", "3"),
        ("--delta",),
    ],
    "doctor": [
        *(("--nodes", number) for number in COUNTS),
        *(("--gpus", number) for number in COUNTS),
        *((option, word) for option in ("--partition", "--account") for word in ("", "a\nb", "\x1b[2J", "\udcff")),
        *((option,) for option in ("--nodes", "--gpus", "--partition", "--account", "--folder")),
        ("--on-cluster=yes",),
    ],
}
# OUT of export and apply.
OUTS = (".", "..", "/", "garbage", BASE, "garbage/out", "dangling", "n" * 300)
# Files of a run, base and delta, made wrong in copies: (what of it is cut, emptied, made a list or garbage).
DAMAGED = {
    "run": (RUN, ("checkpoints/step-*.json", "checkpoints/pool/*")),
    "base": (BASE, ("config.json", "model.safetensors")),
    "delta": (DELTA, ("delta.json", "*.safetensors")),
}
DAMAGES = {"cut": 0.5, "emptied": 0.0}


@dataclass(frozen=True)
class Wrong:
    """A command line that must be refused, and words of which the message must contain one."""

    kind: str
    words: tuple[str, ...]
    named: tuple[str, ...]


def cases(command: str) -> Iterator[Wrong]:
    """Yield all cases of a command."""
    right = {
        "checkpoints": (RUN,),
        "export": (RUN, "out"),
        "apply": (BASE, DELTA, "out"),
        "doctor": (),
        "submit": (RECIPE, *JOB),
    }.get(command, (RECIPE,))
    for kind, words in WORDS.items():
        yield Wrong(kind, (*right, *words), words)
    for words in OPTIONS[command]:
        named = [part for word in words for part in (word, word.partition("=")[2]) if part]
        yield Wrong(" ".join(words)[:40], (*right, *words), (*named, "''"))
    if command != "doctor":
        yield Wrong("nothing", (), ("train.global_batch_size: missing", "are required", "got nothing"))
        yield Wrong("an empty path", ("", *right[1:]), ("''",))
        for slot in range(2 if command == "apply" else 1):
            for kind, path in PATHS.items():
                word, named = path if isinstance(path, tuple) else (path, path)
                yield Wrong(f"{kind} ({slot})", (*right[:slot], word, *right[slot + 1 :]), (named,))
    else:
        for kind in ("a loop of links", "a long name", "a long path", "nobody's home", "control characters"):
            path = PATHS[kind]
            word, named = path if isinstance(path, tuple) else (path, path)
            yield Wrong(kind, ("--folder", word), (named,))
    if command in ("train", "prepare", "plan", "submit"):
        yield from _recipe_cases(command, right[1:])
    if command in ("export", "apply"):
        for out in (*OUTS, f"{right[0]}/new"):
            yield Wrong(f"OUT is {out[:20]}", (*right[:-1], out), (out,))
        yield Wrong("OUT cannot be made", (*right[:-1], "/proc/x/out"), ("/proc/x",))
        yield from _damaged_cases(command)


def _recipe_cases(command: str, options: tuple[str, ...]) -> Iterator[Wrong]:
    for kind, words in SETTINGS.items():
        if command != "plan" or not words[0].startswith("output=") or "\\" in words[0]:  # which writes nothing
            yield Wrong(kind, (RECIPE, *words, *options), tuple(part for word in words for part in _parts(word)))
    for kind in RECIPES:
        file = f"recipe-{kind}.yaml"
        yield Wrong(f"a recipe: {kind}", (file, *options), (file,))
    for kind in DEEPSPEED if command != "prepare" else ():  # which has no part in it
        yield Wrong(
            f"DeepSpeed's file: {kind}", (RECIPE, f"deepspeed=./ds-{kind}.json", *options), (f"ds-{kind}.json",)
        )
    if command in ("train", "prepare"):
        for file in ROWS:
            yield Wrong(f"data: {file}", (RECIPE, f"data.train={file}"), (file,))
    if command == "train":
        for damage in DAMAGES:
            for file in ("config.json", "model.safetensors"):
                words = (RECIPE, f"model.path=base-{file}-{damage}", "output=runs/other")
                yield Wrong(f"a model: {file} {damage}", words, (f"base-{file}-{damage}", "model.path"))


def _damaged_cases(command: str) -> Iterator[Wrong]:
    for name, (_, patterns) in DAMAGED.items():
        for pattern in patterns:
            for damage in DAMAGES:
                copy = _copy_name(name, pattern, damage)
                words = {
                    ("export", "run"): (copy, "out"),
                    ("export", "base"): (RUN, "out", "--base", copy),
                    ("apply", "base"): (copy, DELTA, "out"),
                    ("apply", "delta"): (BASE, copy, "out"),
                }.get((command, name))
                if words is not None:
                    yield Wrong(f"{name}: {pattern} {damage}", words, (copy,))


def _parts(setting: str) -> tuple[str, ...]:
    key, _, value = setting.partition("=")
    return tuple(part for part in (key, key.rpartition(".")[0], value) if part)


def _copy_name(name: str, pattern: str, damage: str) -> str:
    return f"{name}-{pattern.replace('/', '-').replace('*', '')}-{damage}"


def write_files(workspace: Path) -> None:
    """Write what the cases name into `workspace`, which contains a run, its base and its delta."""
    (workspace / "empty-folder").mkdir()
    (workspace / "garbage").write_bytes(bytes(range(256)) * 8)
    (workspace / "list.json").write_text("[1, 2]")
    (workspace / "cut.json").write_text(json.dumps({"format": 1, "step": 2, "units": {}})[:-5])
    (workspace / "loop").symlink_to("loop")
    (workspace / "dangling").symlink_to("nowhere")
    os.mkfifo(workspace / "pipe")
    (workspace / "unreadable").touch(0)
    with open(workspace / "huge", "wb") as file:
        file.truncate(2**40)
    for kind, content in RECIPES.items():
        (workspace / f"recipe-{kind}.yaml").write_bytes(content)
    for kind, content in DEEPSPEED.items():
        (workspace / f"ds-{kind}.json").write_bytes(content)
    for name, content in ROWS.items():
        (workspace / name).write_bytes(content)
    for name, (original, patterns) in DAMAGED.items():
        for pattern in patterns:
            for damage, share in DAMAGES.items():
                copy = workspace / _copy_name(name, pattern, damage)
                shutil.copytree(workspace / original, copy)
                for file in copy.glob(pattern):
                    os.truncate(file, int(file.stat().st_size * share))
    for damage, share in DAMAGES.items():
        for name in ("config.json", "model.safetensors"):
            copy = workspace / f"base-{name}-{damage}"
            if not copy.exists():
                shutil.copytree(workspace / BASE, copy)
                os.truncate(copy / name, int((copy / name).stat().st_size * share))
