"""trainer/config/deepspeed/: presets, "auto", contradictions, refusals, sizes."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from tests.config.deepspeed_runs import config, problems, resolve_json
from trainer.config import ConfigError, RunConfig
from trainer.config.deepspeed import keys as deepspeed_keys
from trainer.config.deepspeed.buckets import size_buckets
from trainer.config.deepspeed.presets import PRESET_FOLDER, PRESETS, presets, read
from trainer.config.deepspeed.resolve import resolve

SIZES = {"largest_parameter": 4097, "largest_group": 20_000, "largest_block": 20_000, "hidden": 64}


# --- presets ---


def test_presets_are_the_files_and_no_others() -> None:
    assert presets() == [
        "zero0",
        "zero1",
        "zero1_offload",
        "zero2",
        "zero2_offload",
        "zero3",
        "zero3_hpz",
        "zero3_nvme",
        "zero3_offload",
    ]
    assert len(list(PRESET_FOLDER.iterdir())) == 9


def test_every_preset_is_described_and_nothing_else() -> None:
    assert sorted(PRESETS) == presets()
    description = RunConfig.model_fields["deepspeed"].description or ""
    assert all(f"{name}: {text}" in description for name, text in PRESETS.items())


@pytest.mark.parametrize("preset", presets())
def test_a_description_says_what_is_partitioned_and_where_state_is_stored(preset: str) -> None:
    zero = read(preset)["zero_optimization"]
    same = re.match(r"as (zero\d), with ", PRESETS[preset])
    text = PRESETS[same[1]] if same else PRESETS[preset]
    partitioned = ["optimizer state", "gradients", "weights"][: zero["stage"]]
    assert [what for what in ("optimizer state", "gradients", "weights") if what in text] == partitioned
    offloaded = {"cpu": "optimizer state in host memory", "nvme": "optimizer state on NVMe"}
    device = zero.get("offload_optimizer", {}).get("device")
    assert [where for where, words in offloaded.items() if words in PRESETS[preset]] == ([device] if device else [])
    assert ("copy of the weights on each node" in PRESETS[preset]) == ("zero_hpz_partition_size" in zero)


@pytest.mark.parametrize("preset", presets())
def test_deepspeed_reads_every_preset_as_the_run_says(preset: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    run = config(preset, micro_batch_size=2, gradient_clipping=0.25)
    parsed = DeepSpeedConfig(size_buckets(resolve(run, 1), **SIZES))
    assert (parsed.train_batch_size, parsed.train_micro_batch_size_per_gpu) == (8, 2)
    assert (parsed.gradient_accumulation_steps, parsed.gradient_clipping) == (4, 0.25)
    zero = parsed.zero_config
    assert zero.stage == int(preset[4])
    assert not zero.round_robin_gradients
    device = {"offload": "cpu", "nvme": "nvme"}.get(preset.partition("_")[2])
    assert (zero.offload_optimizer.device if zero.offload_optimizer else None) == device
    assert not parsed.bfloat16_config.enabled and not parsed.float16_config.enabled
    if zero.stage:
        assert zero.reduce_bucket_size == 4097
    if zero.stage == 3:
        assert (zero.prefetch_bucket_size, zero.param_persistence_threshold) == (20_000, 640)
        assert (zero.max_live_parameters, zero.max_reuse_distance) == (44_097, 20_000)


@pytest.mark.parametrize("preset", [name for name in presets() if name != "zero0"])
def test_bf16_is_filled_from_the_run(preset: str) -> None:
    resolved = resolve(config(preset, dtype="bf16"), 2)
    assert resolved["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert resolved["data_types"] == {"grad_accum_dtype": "bf16"}


def test_a_second_copy_of_the_weights_on_each_of_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    def size(ranks: int, **local: int) -> int:
        return resolve(config("zero3_hpz"), ranks, **local)["zero_optimization"]["zero_hpz_partition_size"]

    assert (size(8, local_ranks=4), size(4, local_ranks=4)) == (4, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert size(8) == 2


def test_nvme_is_the_machines_own_place_for_what_is_temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    offload = resolve(config("zero3_nvme"), 2)["zero_optimization"]["offload_optimizer"]
    assert offload["nvme_path"] == str(tmp_path) and list(tmp_path.iterdir()) == []


def test_a_preset_is_the_same_for_every_run() -> None:
    before = copy.deepcopy(read("zero3"))
    size_buckets(resolve(config(), 2), **SIZES)
    assert read("zero3") == before


# --- what the run fills ---


@pytest.mark.parametrize("spelling", ["missing", "auto"])
def test_open_values_come_from_the_run(tmp_path: Path, spelling: str) -> None:
    names = ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"]
    values = dict.fromkeys(names, "auto") if spelling == "auto" else {}
    resolved = resolve_json(tmp_path, values, ranks=2, micro_batch_size=2, gradient_clipping=0.0)
    assert [resolved[name] for name in names] == [8, 2, 2, 0.0]
    assert (resolved["steps_per_print"], resolved["wall_clock_breakdown"]) == (10**9, False)
    assert resolved["timers"] == {"throughput": {"enabled": False}}
    assert resolved["zero_allow_untested_optimizer"] is True


def test_values_that_agree_and_keys_of_the_users_own_stand(tmp_path: Path) -> None:
    values = {"train_batch_size": 8, "steps_per_print": 10, "comms_logger": {"enabled": True}, "gradient_clipping": 1}
    resolved = resolve_json(tmp_path, dict(values))
    assert {name: resolved[name] for name in values} == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_batch_size": 64}, "train_batch_size is 64 in ds.json but train.global_batch_size is 8: change one"),
        (
            {"train_micro_batch_size_per_gpu": 4},
            "train_micro_batch_size_per_gpu is 4 in ds.json but train.micro_batch_size",
        ),
        (
            {"gradient_accumulation_steps": 1},
            "gradient_accumulation_steps is 1 in ds.json but train.global_batch_size / (2",
        ),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5 in ds.json but train.gradient_clipping is 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true in ds.json but model.dtype is fp32"),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            'data_types.grad_accum_dtype is "bf16" in ds.json but model.dtype',
        ),
        (
            {"data_types": {"param_dtype": "bf16"}},
            'data_types.param_dtype is "bf16" in ds.json but model.dtype is fp32',
        ),
        ({"tensorboard": {"enabled": True}}, "tensorboard.enabled is true in ds.json but monitor.tensorboard is false"),
    ],
)
def test_contradictions(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    (found,) = problems(tmp_path, values)
    assert found.startswith(f"deepspeed: {message}")


def test_all_contradictions_at_once_with_an_uneven_batch(tmp_path: Path) -> None:
    found = problems(tmp_path, {"gradient_clipping": 2, "optimizer": {"type": "Adam"}}, ranks=3)
    assert [text.split(" is ")[0].split(":")[0] for text in found] == [
        "deepspeed",
        "train.global_batch_size",
        "deepspeed",
    ]


def test_tensorboard_goes_to_the_run_folder() -> None:
    run = config(output="runs/y").model_copy(
        update={"monitor": RunConfig.model_fields["monitor"].annotation(tensorboard=True)}
    )
    expected = {"enabled": True, "output_path": str(Path("runs/y/tensorboard")), "job_name": "strata"}
    assert resolve(run, 1)["tensorboard"] == expected
    assert "tensorboard" not in resolve(config(), 1)


# --- what is refused ---


@pytest.mark.parametrize("key", deepspeed_keys.REFUSED)
def test_every_refused_key_is_refused_with_its_reason_and_harmless_when_off(tmp_path: Path, key: str) -> None:
    off, reason = deepspeed_keys.REFUSED[key]
    assert any(reason in text for text in problems(tmp_path, nested(key, on_value(key, off))))
    for value in off:
        resolve_json(tmp_path, nested(key, value))


def on_value(key: str, off: tuple[object, ...]) -> object:
    if off:
        return (
            not off[0] if isinstance(off[0], bool) else "sum" if isinstance(off[0], str) else 0.5 if 0 not in off else 2
        )
    return {"enabled": True}


def nested(path: str, value: object) -> dict[str, Any]:
    values: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    holder = values
    *blocks, name = path.split(".")
    for block in blocks:
        holder = holder.setdefault(block, {})
    holder[name] = value
    return values


def test_blocks_that_are_switched_off_are_no_matter(tmp_path: Path) -> None:
    offload = {"stage": 3, "offload_param": {"device": "none"}, "offload_optimizer": {"device": "none"}}
    resolve_json(
        tmp_path, {"zero_optimization": offload, "fp16": {"enabled": "auto"}, "tensorboard": {"enabled": False}}
    )


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({}, "zero_optimization.stage is missing in ds.json; allowed: 0, 1, 2, 3"),
        ({"stage": 4}, "zero_optimization.stage is 4 in ds.json; allowed"),
        ({"stage": True}, "zero_optimization.stage is true in ds.json; allowed"),
        ({"stage": "auto"}, 'zero_optimization.stage is "auto" in ds.json; allowed'),
        (
            {"stage": 2, "reduce_bucket_size": "big"},
            'zero_optimization.reduce_bucket_size is "big" in ds.json; allowed: integer',
        ),
        ({"stage": 3, "stage3_max_reuse_distance": -1}, "zero_optimization.stage3_max_reuse_distance is -1 in ds.json"),
        ({"stage": 2, "overlap_comm": 1}, "zero_optimization.overlap_comm is 1 in ds.json; allowed: true, false"),
        (
            {"stage": 3, "max_live_parameters": 1, "stage3_max_live_parameters": 1},
            "zero_optimization.max_live_parameters and",
        ),
        (
            {"stage": 1, "offload_optimizer": {"device": "gpu"}},
            'zero_optimization.offload_optimizer.device is "gpu" in ds.json',
        ),
        (
            {"stage": 0, "offload_optimizer": {"device": "cpu"}},
            'zero_optimization.offload_optimizer.device is "cpu" in ds.json',
        ),
        (
            {"stage": 3, "offload_optimizer": {"device": "nvme"}},
            'zero_optimization.offload_optimizer.device is "nvme" in ds.json but nvme_path is missing',
        ),
        (
            {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/scratch"}},
            'zero_optimization.offload_optimizer.device is "nvme" in ds.json but the stage is 2, for which DeepSpeed',
        ),
        (
            {"stage": 2, "offload_param": {"device": "cpu"}},
            'zero_optimization.offload_param.device is "cpu" in ds.json but the stage is 2; offload_param',
        ),
        (
            {"stage": 3, "offload_param": {"device": "nvme"}},
            'zero_optimization.offload_param.device is "nvme" in ds.json; allowed: none, cpu',
        ),
    ],
)
def test_zero_values_that_cannot_be(tmp_path: Path, zero: dict[str, Any], message: str) -> None:
    found = problems(tmp_path, {"zero_optimization": zero})
    assert found[0].startswith(f"deepspeed: {message}")


def test_nvme_and_parameters_are_offloaded_on_stage_3(tmp_path: Path) -> None:
    nvme = {"device": "nvme", "nvme_path": "/scratch"}
    for offload in ({"offload_optimizer": nvme}, {"offload_param": {"device": "cpu"}}):
        resolve_json(tmp_path, {"zero_optimization": {"stage": 3, **offload}})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_cpu_offload_is_allowed(tmp_path: Path, stage: int) -> None:
    resolve_json(tmp_path, {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}})


def test_stage_0_is_fp32_only() -> None:
    assert resolve(config("zero0"), 1)["zero_optimization"]["stage"] == 0
    with pytest.raises(ConfigError, match="zero_optimization.stage is 0 in zero0.json but model.dtype is bf16"):
        resolve(config("zero0", dtype="bf16"), 1)


def test_fp32_accumulation_of_bf16_is_refused_where_deepspeed_takes_another_optimizer(tmp_path: Path) -> None:
    def values(zero: dict[str, Any]) -> dict[str, Any]:
        return {"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}}

    (found,) = problems(tmp_path, values({"stage": 1}), dtype="bf16")
    assert 'data_types.grad_accum_dtype is "fp32" in ds.json on stage 1 with model.dtype bf16' in found
    for zero in ({"stage": 2}, {"stage": 3}, {"stage": 1, "offload_optimizer": {"device": "cpu"}}):
        resolve_json(tmp_path, values(zero), dtype="bf16")
    resolve_json(tmp_path, values({"stage": 1}), dtype="fp32")


def test_auto_without_a_value_is_refused(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, {"communication_data_type": "auto"})
    assert found.startswith('deepspeed: communication_data_type is "auto" in ds.json, but the run has no value for it')


# --- sizes ---


def sized(zero: dict[str, Any], **sizes: int) -> dict[str, Any]:
    return size_buckets({"zero_optimization": zero}, **{**SIZES, **sizes})["zero_optimization"]


def test_sizes_of_a_large_model_do_not_exceed_deepspeeds_own() -> None:
    found = sized({"stage": 3}, largest_parameter=525_000_000, largest_group=856_000_000, hidden=16_384)
    assert found["stage3_prefetch_bucket_size"] == 5 * 10**7
    assert found["stage3_max_live_parameters"] == 10**9
    assert found["stage3_param_persistence_threshold"] == 10**5
    assert found["reduce_bucket_size"] == 525_000_000


def test_a_group_is_one_sub_group() -> None:
    assert sized({"stage": 3}, largest_group=3 * 10**9)["sub_group_size"] == 3 * 10**9
    with pytest.raises(ConfigError, match="sub_group_size is 19999 but the largest group of parameters has 20000"):
        sized({"stage": 3, "sub_group_size": 19_999})
    assert sized({"stage": 3, "sub_group_size": 20_000})["sub_group_size"] == 20_000


@pytest.mark.parametrize("largest", [4096, 4097])
def test_the_allgather_bucket_is_even(largest: int) -> None:
    size = sized({"stage": 2}, largest_parameter=largest)["allgather_bucket_size"]
    assert size % 2 == 0 and size >= largest


def test_square_weights_of_a_tiny_model_stay_partitioned() -> None:
    assert sized({"stage": 3}, hidden=8)["stage3_param_persistence_threshold"] < 64


def test_given_sizes_stand_under_either_spelling() -> None:
    found = sized({"stage": 3, "max_live_parameters": 5, "stage3_max_reuse_distance": 6, "reduce_bucket_size": 7})
    assert (found["max_live_parameters"], found["stage3_max_reuse_distance"], found["reduce_bucket_size"]) == (5, 6, 7)
    assert "stage3_max_live_parameters" not in found and "max_reuse_distance" not in found
    assert sized({"stage": 3, "max_live_parameters": "auto"})["max_live_parameters"] == 44_097


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_auto_is_left_and_the_argument_is_not_touched(stage: int) -> None:
    zero = {"stage": stage} | {
        name: "auto" for name in deepspeed_keys.ZERO_COUNTS if "bucket" in name or "live" in name
    }
    given = {"zero_optimization": zero}
    before = copy.deepcopy(given)
    assert "auto" not in size_buckets(given, **SIZES)["zero_optimization"].values()
    assert given == before
