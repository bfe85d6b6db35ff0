"""trainer/planner: sizes to the unit, formulas by hand, what fits, what makes it fit, and the words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MixtralConfig, Qwen2Config

from trainer.accounting import Activations, Memory, ModelState, StepShape, Volume, Zero, fused_loss, memory, step_volume
from trainer.cli.plan import main
from trainer.config import load
from trainer.planner import Plan, Planner
from trainer.planner.machine import Machine, needed, parse_bytes, shortage
from trainer.planner.report import one_line, table

LLAMA_2_70B: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
LLAMA_2_7B: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
MIXTRAL: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
QWEN: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
PUBLISHED = {
    "Llama-2-7B": (LlamaConfig, LLAMA_2_7B, 6_738_415_616),
    "Llama-2-70B": (LlamaConfig, LLAMA_2_70B, 68_976_648_192),
    "Llama-3-70B": (LlamaConfig, {**LLAMA_2_70B, "vocab_size": 128256}, 70_553_706_496),
    "Qwen2.5-7B": (Qwen2Config, QWEN, 7_615_616_512),
    "Mixtral-8x7B": (MixtralConfig, MIXTRAL, 46_702_792_704),
}


def folder(workspace: Path, name: str) -> str:
    """A folder with a config.json and nothing else."""
    kind, fields, _ = PUBLISHED[name]
    kind(architectures=[kind.__name__.replace("Config", "ForCausalLM")], **fields).save_pretrained(workspace / name)
    assert [file.name for file in (workspace / name).iterdir()] == ["config.json"]
    return str(workspace / name)


def arguments(workspace: Path, name: str, *more: str) -> list[str]:
    settings = ["train.steps=100", "train.global_batch_size=16", "data.max_length=512"]
    return [f"model.path={folder(workspace, name)}", *settings, *more]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_to_the_unit_from_config_json_alone(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path, name, "--gpu-memory", "1TB", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == PUBLISHED[name][2]
    assert plan["fits"] and plan["parts"]["weights"] == 2 * PUBLISHED[name][2]


def test_a_plan_by_hand() -> None:
    """Four blocks of which one trains; saved, peak and forward of each kind are plain numbers."""
    shape = StepShape(
        active=Activations(saved=100, peak=180, forward=50),
        passed=Activations(saved=60, peak=90, forward=50),
        loss=Activations(saved=5, peak=70, forward=30),
        evaluation=80,
        embedded=10,
        depth=4,
        num_active=1,
        saved=100 + 3 * 60,
        checkpointing=False,
        largest=40,
        embeddings=0,
        total=1000,
        groups=(30, 10),
    )
    zero = Zero(stage=2, ranks=2, weight_bytes=2, gradient_bytes=2, reduce_bucket=40, overlap=True)
    held = memory(ModelState(2000, 0, 80, 160), shape, zero, host={"bank": 7})
    saved = 10 + 100 + 3 * 60
    assert held.resident == {"weights": 2000, "gradients": 0, "masters": 80, "moments": 160}
    assert {name: sum(parts.values()) for name, parts in held.moments.items()} == {
        "loss": saved + 70,
        "backward": saved + 80 + 2 * 2 * 40 + 2 * 20,
        "embeddings": 10 + 2 * 2 * 40 + 2 * 20,
        "optimizer step": 2 * 20 + 6 * 15,
        "evaluation": 80,
    }
    assert (held.highest, held.peak, held.total_host) == ("backward", 2240 + saved + 80 + 160 + 40, 7)
    checkpointed = memory(
        ModelState(2000, 0, 80, 160), StepShape(**{**vars(shape), "checkpointing": True}), zero, host={}
    )
    assert sum(checkpointed.moments["backward"].values()) == 10 * 5 + 180 + 160 + 40


def test_stage_3_holds_what_it_gathers_and_hpz_a_copy() -> None:
    nothing = Activations(0, 0, 0)
    shape = StepShape(nothing, nothing, nothing, 0, 0, 4, 1, 0, False, 40, 0, 1000, (40,))
    zero = {"ranks": 4, "weight_bytes": 2, "gradient_bytes": 2, "reduce_bucket": 40, "max_live": 300}
    held = memory(ModelState(500, 20, 40, 80), shape, Zero(stage=3, machine_ranks=2, **zero), host={})
    assert held.resident["buckets"] == 80 and held.resident["weights for each machine"] == 1000
    assert held.moments["loss"]["gathered"] == 2 * 340
    assert memory(ModelState(1, 1, 1, 1), shape, Zero(stage=3, **zero | {"ranks": 1}), host={}).moments["loss"] == {
        "activations": 0,
        "loss": 0,
        "gathered": 0,
    }


def test_nvme_holds_masters_and_moments_and_the_host_what_they_pass_through() -> None:
    nothing = Activations(0, 0, 0)
    shape = StepShape(nothing, nothing, nothing, 0, 0, 4, 1, 0, False, 40, 0, 1000, (400, 100))
    zero = Zero(stage=3, ranks=2, weight_bytes=2, gradient_bytes=2, offload=True, nvme_buffers=4)
    state = ModelState(1000, gradients=2 * 250 + 4 * 250, masters=1000, moments=2000, offload=True)
    held = memory(state, shape, zero, host={})
    assert held.disk == {"masters": 1000, "moments": 2000, "gradients": 1000}
    assert held.host == {"gradients": 500, "NVMe buffers": 4 * 4 * 200}


def test_a_plan_with_nvme_says_what_lies_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = arguments(tmp_path, "Llama-2-7B", "deepspeed=zero3_nvme", "--gpus", "2")
    main([*own, "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["disk"].keys() == {"masters", "moments", "gradients"} and "masters" not in plan["host"]
    assert plan["disk"]["moments"] == 8 * plan["trained"] // 2 and plan["host"]["NVMe buffers"] > 0
    main(own)
    assert "on NVMe, for each rank: " in capsys.readouterr().out


def test_weights_in_host_memory_are_gathered_also_on_a_single_rank() -> None:
    nothing = Activations(0, 0, 0)
    shape = StepShape(nothing, nothing, nothing, 0, 0, 4, 1, 0, False, 40, 0, 1000, (400, 100))
    zero = Zero(stage=3, ranks=1, weight_bytes=2, gradient_bytes=2, max_live=300, offload=True, offload_param=True)
    held = memory(ModelState(2000, 6, 4, 8, offload=True), shape, zero, host={})
    assert held.host == {"weights": 2000, "gradients": 6, "masters": 4, "moments": 8} and "weights" not in held.resident
    assert held.moments["loss"]["gathered"] == 2 * 340


def test_a_bank_on_the_device_is_counted_there(tmp_path: Path) -> None:
    def plan(*values: str) -> Plan:
        own = arguments(tmp_path, "Llama-2-7B", "data.train=none", "selector={name: fixed, blocks: [0, 5]}", *values)
        return Planner().plan(load(None, own, check_files=False), 2)

    dropped, kept = plan("bank.name=discard"), plan("bank.name=device")
    assert kept.memory == dropped.memory, "a fixed selector never banks anything"
    own = arguments(tmp_path, "Llama-2-7B", "data.train=none", "bank.name=device")
    uniform = Planner().plan(load(None, own, check_files=False), 2)
    offloaded = Planner().plan(load(None, [*own, "deepspeed=zero2_offload"], check_files=False), 2)
    block = 202_383_360  # of Llama-2-7B's blocks
    assert uniform.memory.resident["full bank"] == offloaded.memory.host["full bank"] == 30 * 12 * block // 2
    assert "full bank" not in offloaded.memory.resident
    sparse = Planner().plan(load(None, [*own, "update={name: unmask, budget: 1000}"], check_files=False), 2)
    assert "full bank" not in sparse.memory.resident, "the rule keeps its state itself"


def test_fused_loss_by_hand() -> None:
    sizes = {"tokens": 8, "hidden": 4, "vocabulary": 100, "weight_bytes": 2}
    head = fused_loss(**sizes, trains=True, tiles=0)
    tile, inputs = 8 * 32768 * 2, 2 * 8 * 4 * 2
    assert (head.saved, head.forward, head.peak) == (inputs, inputs + tile, inputs + tile + 6 * (8 * 4 + 4 * 100))
    assert fused_loss(**sizes, trains=False, tiles=0).peak == inputs + tile + 6 * 8 * 4


def test_volumes_by_hand() -> None:
    sizes = {"ranks": 4, "weight_bytes": 2, "gradient_bytes": 4, "trained": 10, "forward": 100, "backward": 80}
    assert step_volume(stage=1, **sizes, micro_batches=3) == Volume(20, 0, 40)
    assert step_volume(stage=2, **sizes, micro_batches=3) == Volume(20, 0, 120)
    assert step_volume(stage=3, **sizes, micro_batches=3) == Volume(1080, 120, 0)
    assert step_volume(stage=3, **sizes, machine_copies=True) == Volume(20, 40, 0, within_machine=340)
    assert step_volume(stage=3, **sizes | {"ranks": 1}) == Volume(0, 0, 0)
    assert Volume(20, 40, 8).sent(4) == (20 + 40 + 2 * 8) * 3 / 4


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 2**30), ("1.5TB", 3 * 2**39), ("512 MiB", 2**29), ("4e12", 4 * 10**12)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "80 bananas", "-1GB", "0", "iB", "1e999"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="such as 80GB"):
        parse_bytes(text)


def test_what_makes_it_fit_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LISA's embeddings and head are too much beside Llama-2-7B on a card of 16 GB; so is a long way back."""
    own = arguments(tmp_path, "Llama-2-7B", "deepspeed=zero2")
    options = ["--gpu-memory", "16GB", "--json"]
    assert main([*own, *options]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert not plan["fits"] and plan["suggestions"]
    sizes = [len(suggestion["settings"].split()) for suggestion in plan["suggestions"]]
    assert len(sizes) <= 5
    for suggestion in plan["suggestions"][:2]:
        assert main([*own, *suggestion["settings"].split(), *options]) == 0
        assert json.loads(capsys.readouterr().out)["needed"] == suggestion["needed"] <= 16 * 2**30


def test_a_model_that_fits_in_no_way_is_refused_with_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(tmp_path, "Llama-2-70B"), "--gpu-memory", "80GB"]) == 2
    said = capsys.readouterr().err
    assert "68,976,648,192 parameters do not fit on 1 x 1 cards with any known change" in said
    assert "on each card of 80.0 GiB" in said and "weights 128.5 GiB" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu-memory", "80 bananas"], "such as 80GB"),
        (["--gpus", "0"], "integer >= 1"),
        (["--flops", "fast"], "such as 400e12, or measured"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_bad_settings_are_refused_as_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(tmp_path, "Llama-2-7B"), "--gpu-memry", "80GB", "--gpus", "3"]) == 2
    assert "--gpu-memry: unknown option" in capsys.readouterr().err
    assert main([*arguments(tmp_path, "Llama-2-7B"), "--gpus", "3"]) == 2
    assert "16 is not a multiple of 3 ranks" in capsys.readouterr().err


def test_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = [*arguments(tmp_path, "Llama-2-7B", "deepspeed=zero2_offload"), "--gpus", "2", "--json"]
    main([*own, "--flops", "1e12", "--bandwidth", "1GB"])
    assert json.loads(capsys.readouterr().out)["seconds"] is None  # how fast is the host?
    main([*own, "--flops", "1e12", "--bandwidth", "1GB", "--host-bandwidth", "2GB"])
    plan = json.loads(capsys.readouterr().out)
    compute, sending = plan["flops"] / 1e12, plan["volume"]["sent"] / 2**30
    # Of eight micro-batches: bf16 gradients out, seven times in to be added to and out, out in fp32, and weights in.
    hosting = (2 * 15 + 4 + 2) * -(-plan["trained"] // 2) / 2**31
    assert plan["seconds"]["longest"] == pytest.approx(compute + sending + hosting)
    assert plan["seconds"]["shortest"] == pytest.approx(max(compute, sending) + hosting)
    # Two forwards and backwards of 512 tokens through 6.7e9 weights, 2 FLOPs each, and attention.
    assert plan["flops"] == pytest.approx(8 * 2 * 512 * 2 * 6.6e9, rel=0.15)
    assert plan["steps"] == 100


def test_steps_follow_from_samples_where_the_recipe_says_epochs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [*arguments(tmp_path, "Llama-2-7B", "train.steps=null", "train.epochs=3"), "--json"]
    main(own)
    assert json.loads(capsys.readouterr().out)["steps"] is None
    main([*own, "--samples", "1000"])
    assert json.loads(capsys.readouterr().out)["steps"] == 188  # 3,000 samples, 16 at a time


def test_measured_flops_are_those_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*arguments(tmp_path, "Llama-2-7B", "model.dtype=fp32"), "--flops", "measured", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert 1e8 < plan["flops"] / plan["seconds"]["longest"] < 1e14  # from a slow core to a GPU


def test_host_memory_of_a_node_counts_all_its_ranks(tmp_path: Path) -> None:
    config = load(
        None, [*arguments(tmp_path, "Llama-2-7B", "deepspeed=zero2_offload", "data.train=none")], check_files=False
    )
    plan = Planner().plan(config, 4, local_ranks=2)
    assert plan.memory.host["masters"] == plan.state.masters
    least = 2 * plan.memory.total_host
    assert not shortage(plan, Machine(nodes=2, gpus=2, host_memory=least))
    assert "of host memory needed on each node" in shortage(plan, Machine(nodes=2, gpus=2, host_memory=least - 1))[0]


def test_a_line_before_a_run() -> None:
    plan = type("P", (), {"memory": Memory({"weights": 2**30}, {"loss": {"loss": 2**20}}, {"moments": 2**10})})()
    assert one_line(plan) == (
        "planned peak 1.0 GiB on each rank (loss: weights 1.0 GiB, loss 1.0 MiB); in host memory 1.0 KiB"
    )
    assert needed(plan) > 2**30 + 2**20


def test_of_new_tokens_only_the_state_of_their_rows_is_counted(tmp_path: Path) -> None:
    fields = "{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, vocab_size: 3000"
    values = [
        "method=badam",
        "selector={name: fixed, blocks: [1]}",
        f"model.random={fields}, num_attention_heads: 4}}",
        "model.dtype=bf16",
        "model.add_tokens=[<call>, </call>]",
        "train.steps=1",
        "train.global_batch_size=2",
        "data.train=owner/name",
    ]
    planner = Planner()
    frozen, rows, whole = (
        planner.plan(load(None, [*values, f"always_on={{embeddings: {on}, head: {on}}}"]), 2)
        for on in ("false", "new_rows", "true")
    )
    # Masters, moments and gradients of a half of two rows of 64, in embeddings and head, on each of two ranks.
    assert rows.trained - frozen.trained == 2 * 2 * 64
    assert rows.state.total - frozen.state.total == 16 * 2 * 64
    assert whole.state.total - frozen.state.total == 14 * 3000 * 64
    shallow, *deep = (
        planner.plan(load(None, [*values, f"always_on={{embeddings: {on}, head: false}}"]), 2).flops
        for on in ("false", "new_rows", "true")
    )
    assert shallow < deep[0] == deep[1], "backward reaches the embeddings"
    assert "embeddings (new rows), head (new rows)" in table(rows, Machine(gpus=2))
