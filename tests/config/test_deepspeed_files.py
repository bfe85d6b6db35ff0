"""trainer/config/deepspeed/presets.py: JSON files that cannot be read, unknown keys, and values of a wrong type."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.config.deepspeed_runs import problems, resolve_json, write
from trainer.config import ConfigError
from trainer.config.deepspeed.presets import read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n "zero_optimization": {,}\n}', "is not valid JSON: line 2, column 24"),
        (b'{"bf16": {}, "bf16": {}}', "gives key 'bf16' twice"),
        (b"[]", "contains a list"),
        (b'{"a": "\xff"}', "is not UTF-8 text (byte 7)"),
        (b'{"bf16": true}', "bf16 is true in ds.json; it must be an object"),
        (b'{"zero_optimization": null}', "zero_optimization is null in ds.json; it must be an object"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "ds.json").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read(str(tmp_path / "ds.json"))
    assert message in error.value.problems[0]


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text("{}")
    with pytest.raises(ConfigError, match="no such file: '.*/zeor.json'; nearest: 'zero.json'"):
        read(str(tmp_path / "zeor.json"))
    with pytest.raises(ConfigError, match="got 'zero3_ofload'; allowed: zero0 .*; nearest: 'zero3_offload'"):
        read("zero3_ofload")
    with pytest.raises(ConfigError, match="cannot read"):
        read(f"{tmp_path}/")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_batchsize": 3}, "train_batchsize in ds.json: unknown key; nearest: 'train_batch_size'"),
        ({"zero_optimization": {"stag": 1}}, "zero_optimization.stag in ds.json: unknown key; nearest: 'stage'"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": 1}}},
            "zero_optimization.offload_optimizer.devise in ds.json",
        ),
        ({"bf16": {"enable": True}}, "bf16.enable in ds.json: unknown key; nearest: 'enabled'"),
        ({"zzzzz": 1}, "zzzzz in ds.json: unknown key"),
    ],
)
def test_unknown_keys(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(write(tmp_path, values))
    (found,) = error.value.problems
    assert found.startswith(f"deepspeed: {message}")


# --- what Python's reader of JSON takes, and no configuration can mean ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"gradient_clipping": NaN}', "contains NaN, which is not a number in JSON"),
        ('{"gradient_clipping": -Infinity}', "contains -Infinity, which is not a number in JSON"),
        ('{"gradient_clipping": 1e999}', "contains 1e999, which is too large"),
        ('{"steps_per_print": ' + "9" * 5000 + "}", "contains an integer of 5000 digits; allowed: up to 18"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "gives key 'stage' twice"),
        ("[" * 5000, "is nested too deeply; allowed: up to 32 levels"),
        ("[" * 100_000 + "]" * 100_000, "is nested too deeply; allowed: up to 32 levels"),
        ('{"aio": ' * 900 + "1" + "}" * 900, "is nested too deeply; allowed: up to 32 levels"),
        ('{"tensorboard": {"output_path": "a\\u0000b"}}', r"has control characters in 'output_path': 'a\x00b'"),
        ('{"a\\u001b[2J": 1}', r"has control characters in 'a\x1b[2J': 1"),
        ('{"\\ud800": 1}', r"has control characters in '\ud800': 1"),
        ("\ufeff{}", "is not valid JSON"),
    ],
)
def test_json_that_means_nothing(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read(str(file))
    (found,) = error.value.problems
    assert found.startswith(f"deepspeed: {str(file)!r} ") and message in found and found.isprintable()


@pytest.mark.timeout(60)
def test_thousands_of_unknown_keys_are_counted_and_the_first_are_listed(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({f"unknown_key_{i}": i for i in range(20_000)}))
    with pytest.raises(ConfigError) as error:
        read(str(file))
    said = str(error.value)
    assert said.startswith("20000 problems") and said.endswith("and 19,970 more") and len(said) < 10_000


def problem_of(tmp_path: Path, path: str, value: Any) -> str:
    """Return the one problem of a stage 2 configuration with `value` at `path`, of names joined by dots."""
    values: dict[str, Any] = {"zero_optimization": {"stage": 2}}
    *blocks, name = path.split(".")
    holder = values
    for block in blocks:
        holder = holder.setdefault(block, {})
    holder[name] = value
    (found,) = problems(tmp_path, values)
    return found


@pytest.mark.parametrize("value", [None, 1, "auto", [], True])
@pytest.mark.parametrize(
    "path",
    [
        "zero_optimization",
        "zero_optimization.offload_optimizer",
        "bf16",
        "fp16",
        "data_types",
        "timers",
        "timers.throughput",
    ],
)
def test_a_block_that_is_no_object(tmp_path: Path, path: str, value: Any) -> None:
    found = problem_of(tmp_path, path, value)
    assert found == f"deepspeed: {path} is {json.dumps(value)} in ds.json; it must be an object of keys and values"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("zero_optimization.reduce_bucket_size", 1e90),
        ("zero_optimization.reduce_bucket_size", 10**17),
        ("steps_per_print", "often"),
        ("steps_per_print", 0),
        ("aio.block_size", None),
        ("aio.queue_depth", [8]),
    ],
)
def test_counts_that_are_none(tmp_path: Path, path: str, value: Any) -> None:
    found = problem_of(tmp_path, path, value)
    assert found.startswith(f"deepspeed: {path} is {json.dumps(value)} in ds.json; allowed: integer >= ")


def test_offload_that_is_null_is_none(tmp_path: Path) -> None:
    from trainer.run.setup import offload_device

    ds = resolve_json(tmp_path, {"zero_optimization": {"stage": 3, "offload_param": None}})
    assert offload_device(ds, "param") == offload_device(ds, "optimizer") == "none"
