"""Values that no configuration can mean: refused in a sentence that names the key, and soon."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.config import ConfigError, RunConfig, dump, load

GIVEN = [
    "model.random={model_type: llama, hidden_size: 64, num_attention_heads: 4, num_key_value_heads: 2}",
    "train.steps=100",
    "train.global_batch_size=8",
    "data.train=train.jsonl",
]
LONG = "a" * 300
NOBODY = "~no-such-user-here"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    return tmp_path


def config(*overrides: str, path: str | None = None) -> RunConfig:
    return load(path, [*GIVEN, *overrides])


def problems(*overrides: str, path: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        config(*overrides, path=path)
    return error.value.problems


def in_file(folder: Path, text: str) -> list[str]:
    (folder / "run.yaml").write_text(text)
    return problems(path="run.yaml")


# --- values of another shape, paths that cannot be ---


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("selector.name=[x]", "selector.name: got ['x']; allowed: uniform"),
        ("selector.name={a: 1}", "selector.name: got {'a': 1}; allowed: uniform"),
        ("selector={name: [x], blocks: 2}", "selector.name: got ['x']; allowed: uniform"),
        ("substrate.name=[[1]]", "substrate.name: got [[1]]; allowed: full | adapter"),
        ("method=[lisa]", "method: got ['lisa']; allowed: lisa"),
        ("data.train=[{path: train.jsonl, 1: 2}]", "data: train: key 1 is not text"),
        ("model.random={1: 2}", "model: random: key 1 is not text"),
        (f"output={NOBODY}/x", f"output: got '{NOBODY}/x', but there is no home folder '{NOBODY}'"),
        (f"data.cache={NOBODY}", "data.cache: got"),
        (f"resume={NOBODY}/x", "resume: got"),
        (f"model.tokenizer={NOBODY}/x", "model.tokenizer: got"),
        (f"deepspeed={NOBODY}/x.json", "deepspeed: got"),
        (f"data.train={NOBODY}/x.jsonl", "data.train: got"),
        (f"data.train=[train.jsonl, {NOBODY}/x.jsonl]", "data.train[1]: got"),
        (f"output={LONG}", f"output: got '{LONG[:144]} ... {LONG[:49]}': File name too long"),
        (f"data.cache={LONG}", "data.cache: got"),
        (f"resume={LONG}", "resume: got"),
        (f"model.tokenizer=./{LONG}", "model.tokenizer: got"),
        (f"deepspeed={LONG}.json", "deepspeed: got"),
        (f"data.train={LONG}.jsonl", "data.train: got"),
        ("output=" + "b" * 230, "output: 'bbb"),
        ("output=loop/run", "output: got 'loop/run': Too many levels of symbolic links"),
        ("output=/", "output: '/' is the root of all folders"),
        ("output=/proc/x", "output: '/proc/x' cannot be written, '/proc' accepts no files"),
        ("data.cache=/proc/x", "data.cache: '/proc/x' cannot be written"),
        ("deepspeed=/dev/zero", "deepspeed: cannot read '/dev/zero': not a regular file"),
        ("deepspeed=pipe.json", "deepspeed: cannot read"),
        ("data.train=pipe.jsonl", "data.train: "),
        ("deepspeed=huge.json", "deepspeed: cannot read"),
    ],
)
@pytest.mark.timeout(60)
def test_refused(override: str, message: str, folder: Path) -> None:
    (folder / "loop").symlink_to("loop")
    for name in ("pipe.json", "pipe.jsonl"):
        os.mkfifo(folder / name)
    with open(folder / "huge.json", "wb") as file:
        file.truncate(2**40)  # of no blocks
    (found,) = problems(override)
    assert found.startswith(message)


@pytest.mark.parametrize("text", [r"a\0b", r"a\nb", r"a\tb", r"\e[31m", r"\x9b31m", r"a\u2028b", r"a\ud800b"])
@pytest.mark.parametrize(
    "key", ["output", "data.cache", "data.train", "deepspeed", "resume", "model.tokenizer", "model.blocks", "seed"]
)
def test_control_characters_in_a_value(key: str, text: str) -> None:
    (found,) = problems(f'{key}="{text}"')
    assert found.startswith(f"{key}: got ") and "without control characters" in found and found.isprintable()


def test_control_characters_in_a_key(folder: Path) -> None:
    (found,) = in_file(folder, 'model: {random: {"a\\e[2Jb": 1}}\n')
    assert found == r"model.random: key 'a\x1b[2Jb' contains control characters; take them out"
    (found,) = problems("a\x1b[2Jb=1")
    assert found.startswith(r"the configuration: key 'a\x1b[2Jb' contains")


def test_names_in_any_script_are_names() -> None:
    assert config("output=runs/名前 é").output == "runs/名前 é"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.timeout_minutes=1e308", "train.timeout_minutes: got 1e+308; allowed: number >= 0.1 and <= 10080"),
        ("train.timeout_minutes=1e-300", "train.timeout_minutes: got 1e-300; allowed: number >= 0.1"),
        ("optimizer.lr=1e38", "optimizer.lr: got 1e+38; allowed: 1e-30 to 1e+30"),
        ("optimizer.lr=1e-320", "optimizer.lr: got 1e-320; allowed: 1e-30 to 1e+30"),
        ("optimizer.eps=1e38", "optimizer.eps: got 1e+38"),
        ("optimizer.weight_decay=1e300", "optimizer.weight_decay: got 1e+300"),
        ("train.gradient_clipping=1e300", "train.gradient_clipping: got 1e+300"),
        ("data.train={path: train.jsonl, weight: 1e308}", "data.train[0].weight: got 1e+308"),
        ("train.steps=1000000000001", "train.steps: got 1000000000001; allowed: up to 1,000,000,000,000"),
        ("eval.max_samples=" + "9" * 40, "eval.max_samples: got 9999999999"),
        ("seed=" + "9" * 5000, "seed: got '99"),
        ("model.random.num_hidden_layers=100000", "model.random.num_hidden_layers: got 100000; allowed: up to 1,000"),
        ("model.random.n_layer=1000000000", "model.random.n_layer: got 1000000000; allowed: up to 1,000"),
        ("model.random.text_config={num_hidden_layers: 2000}", "model.random.text_config.num_hidden_layers: got 2000"),
        (
            "model.random.num_local_experts=1000000",
            "model.random.num_local_experts: got 1000000; allowed: up to 10,000",
        ),
        (
            "model.random.num_key_value_heads=3",
            "model.random.num_key_value_heads: 3 does not divide num_attention_heads",
        ),
    ],
)
def test_numbers_beyond_all_reason(override: str, message: str) -> None:
    (found,) = problems(override)
    assert found.startswith(message)


def test_the_largest_sensible_numbers_are_accepted() -> None:
    loaded = config(
        "train.steps=1000000000", "update={name: unmask, budget: 70000000000}", "train.timeout_minutes=10080"
    )
    assert loaded.update.budget == 70 * 10**9


@pytest.mark.parametrize("check_files", [True, False])
def test_a_folder_whose_config_cannot_be_built_is_named(folder: Path, check_files: bool) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").touch()
    (folder / "model" / "config.json").write_text('{"num_hidden_layers": 100000}')
    with pytest.raises(
        ConfigError, match="model.path: config.json.num_hidden_layers: got 100000; allowed: up to 1,000"
    ):
        load(None, [*GIVEN[1:], "model.path=model"], check_files=check_files)


# --- YAML ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x10", 16),
        ("+1", 1),
        ("-7", -7),
        ("2e-5", 2e-5),
        ("1.", 1.0),
        (".5", 0.5),
        ("+.5", 0.5),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        *(
            (word, word)
            for word in ("yes", "no", "on", "off", "y", "1:30", "1:30.5", "0b11", "1_000", "2024-01-01", "=")
        ),
        *((word, word) for word in ("+", ".", "0o8", "0x", "1e", "tRUE")),
    ],
)
def test_numbers_and_booleans_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = config(f"model.random.x={text}").model.random["x"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "text", ["1:30", "010", "0o17", "0b11", "1_000", "yes", "2024-01-01", "1e5", "null", "=", "~", ""]
)
def test_text_that_looks_like_something_else_is_written_so_that_it_stays_text(folder: Path, text: str) -> None:
    original = config(f"model.random.x={json.dumps(text)}")
    (folder / "config.yaml").write_text(dump(original))
    assert load("config.yaml", []).model.random["x"] == text


def test_sixty_seconds_to_the_minute_is_no_number_of_steps() -> None:
    assert problems("train.steps=1:30") == ["train.steps: got '1:30'; allowed: integer >= 1 | null"]
    assert problems("data.packing=yes") == ["data.packing: got 'yes'; allowed: true | false"]


def test_anchors_and_merge_keys_are_read(folder: Path) -> None:
    text = (
        "selector: &first {name: cyclic, blocks: 1}\nmodel: {random: {model_type: llama, x: {<<: *first, blocks: 2}}}\n"
    )
    (folder / "run.yaml").write_text(text)
    loaded = load("run.yaml", GIVEN[1:])
    assert loaded.selector.blocks == 1 and loaded.model.random["x"] == {"name": "cyclic", "blocks": 2}


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 64))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: !!int x\n", "run.yaml, line 1: not valid YAML: tag !!int is not read; write the value alone"),
        ("a: 1\nseed: !!bool maybe\n", "run.yaml, line 2: not valid YAML: tag !!bool is not read"),
        ("seed: !!python/object/apply:os.abort []\n", "run.yaml, line 1: not valid YAML: tag !!python/object"),
        ("seed: !x y\n", "run.yaml, line 1: not valid YAML: tag !x is not read"),
        ("seed: !!binary aGk=\n", "run.yaml, line 1: not valid YAML: tag !!binary"),
        ("seed: &a [1, *a]\n", "run.yaml, line 1: not valid YAML: alias *a is inside what it stands for"),
        ("data: &a\n  train: {b: *a}\n", "run.yaml, line 2: not valid YAML: alias *a is inside"),
        ("seed: *b\n", "run.yaml, line 1: not valid YAML: found undefined alias"),
        (BOMB, "run.yaml, line 14: not valid YAML: more than 50,000 values, aliases written out"),
        ("<<: &a {<<: [*a, *a]}\n", "run.yaml, line 1: not valid YAML: alias *a is inside"),
        ("seed: " + "[" * 5000, "run.yaml, line 1: not valid YAML: nested more than 32 deep"),
        ("seed: " + "[" * 5000 + "]" * 5000, "run.yaml, line 1: not valid YAML: nested more than 32 deep"),
        ("seed: " + "{a: " * 400 + "1" + "}" * 400, "run.yaml, line 1: not valid YAML: nested more than 32 deep"),
        ("seed: [" + "1," * 60_000 + "]\n", "run.yaml, line 1: not valid YAML: more than 50,000 values"),
        ("seed: " + "9" * 5000, "run.yaml, line 1: not valid YAML: an integer of 5000 digits; allowed: up to 100"),
        ("{[a]: 1}", "run.yaml, line 1: not valid YAML: found unhashable key"),
        ("a: 1\n---\nb: 2\n", "run.yaml, line 2: not valid YAML: but found another document"),
        ("# " + "x" * 2**20, "configuration file: cannot read 'run.yaml': larger than 1,048,576 bytes"),
    ],
)
@pytest.mark.timeout(60)
def test_files_that_mean_nothing_or_too_much(folder: Path, text: str, message: str) -> None:
    (found,) = in_file(folder, text)
    assert found.startswith(message)


@pytest.mark.parametrize("name", ["/dev/zero", "pipe.yaml", "."])
@pytest.mark.timeout(60)
def test_recipes_that_are_no_files(folder: Path, name: str) -> None:
    os.mkfifo(folder / "pipe.yaml")
    (found,) = problems(path=name)
    assert found.startswith(f"configuration file: cannot read {name!r}")


def test_in_a_folder_that_is_gone(folder: Path) -> None:
    (folder / "gone").mkdir()
    os.chdir(folder / "gone")
    (folder / "gone").rmdir()
    try:
        assert problems() == ["the current folder no longer exists: change into another one"]
    finally:
        os.chdir(folder)


# --- messages ---


@pytest.mark.timeout(60)
def test_thousands_of_problems_are_counted_and_the_first_are_listed(folder: Path) -> None:
    (folder / "run.yaml").write_text("".join(f"unknown_key_{i}: {'v' * 20}\n" for i in range(20_000)))
    started = time.process_time()
    with pytest.raises(ConfigError) as error:
        config(path="run.yaml")
    said = str(error.value)
    assert time.process_time() - started < 30, "the nearest key of each would take minutes"
    assert said.startswith("20000 problems in the configuration:\n  - unknown_key_0: unknown key")
    assert said.endswith("\n  and 19,970 more") and len(said) < 10_000


def test_a_long_value_is_cut_in_the_middle() -> None:
    (found,) = problems("train.steps=" + "x" * 100_000)
    assert (
        len(found) < 400
        and found.startswith("train.steps: got 'xxx")
        and found.endswith("allowed: integer >= 1 | null")
    )
    (found,) = problems("k" * 100_000 + "=1")
    assert len(found) <= 2000


def test_a_problem_is_one_line_of_what_a_terminal_shows() -> None:
    assert ConfigError(["a\x1b[2J\nb\u202ec"]).problems == [r"a\x1b[2J\nb\u202ec"]
