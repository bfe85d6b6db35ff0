"""IST through the real launcher: what it learns and draws, the adapter that it leaves, and going on from it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import forked
from tests.launching import metrics, write_inputs
from tests.models import tiny_llama
from tests.run.whole_runs import Run, evaluation_samples, loss_by_hand
from trainer.data.tokenizer import bytes_tokenizer
from trainer.model.blocks import Piece
from trainer.model.merging import Merger
from trainer.selectors import build

IST = [
    "method=ist",
    "model.random=null",
    "model.path=base",
    "substrate.peft.r=4",
    "substrate.peft.target_modules=[q_proj,v_proj,down_proj]",
    "substrate.merge=true",
    "selector.active_share=0.5",
    "selector.update_every=2",
    "selector.reward_rate=1000.0",
    "selector.probe.batch_size=5",
    "selector.probe.data=eval",
    "train.steps=8",
    "optimizer.lr=2.0e-2",
]


def write_base(workspace: Path) -> None:
    # As wide as what bitsandbytes quantises together.
    tiny_llama(layers=4, hidden=64, vocab=261).save_pretrained(workspace / "base")
    bytes_tokenizer().save_pretrained(workspace / "base")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """IST with LoRA under ZeRO-3 on two ranks; every other step three probes of five sequences."""
    workspace = tmp_path_factory.mktemp("ist")
    write_inputs(workspace)
    write_base(workspace)
    return Run(workspace, forked.run(["tiny.yaml", *IST], workspace))


def test_the_run_leaves_an_adapter_a_merged_model_and_a_picture(run: Run) -> None:
    assert run.finished.code == 0, run.finished.everything
    entries = {entry.name for entry in run.folder.iterdir()}
    assert entries == {"config.yaml", "metrics.jsonl", "checkpoints", "adapter", "model", "importance.png"}
    for label, name in (("Adapter", "adapter"), ("Model", "model"), ("Importance", "importance.png")):
        assert f"\n{label}: runs/tiny/{name}\n" in run.finished.stdout
    assert (run.folder / "importance.png").read_bytes().startswith(b"\x89PNG")


def test_importance_is_in_the_metrics_and_decides_the_draws(run: Run) -> None:
    learned = {line["step"]: line["importance"] for line in metrics(run.folder) if "importance" in line}
    assert list(learned) == [1, 3, 5, 7] and learned[1] == [0.0] * 4
    assert all(len(values) == 4 and any(values) for step, values in learned.items() if step > 1)
    selector = build("importance", seed=0, active_share=0.5, update_every=2)
    for line in metrics(run.folder):
        if "active_blocks" in line:
            last = max(step for step in learned if step <= line["step"])
            selector.load_state_dict({"dispensability": [-value for value in learned[last]]})
            assert line["active_blocks"] == list(selector.select(line["step"] - 1, 4))


def test_the_adapter_holds_all_blocks_and_has_the_last_evaluation_loss(run: Run) -> None:
    weights = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 4 * 3 * 2
    drawn = {index for line in metrics(run.folder) for index in line.get("active_blocks", [])}
    for name, tensor in weights.items():
        if "lora_B" in name:
            assert bool(tensor.any()) == (int(name.split(".layers.")[1].split(".")[0]) in drawn), name
    base = AutoModelForCausalLM.from_pretrained(run.workspace / "base")
    adapted = PeftModel.from_pretrained(base, str(run.folder / "adapter")).eval()
    last = [line["eval_loss"] for line in metrics(run.folder) if "eval_loss" in line][-1]
    assert loss_by_hand(adapted, evaluation_samples(run.workspace)) == pytest.approx(last, abs=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(run.folder / "model").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-5)
    untouched = AutoModelForCausalLM.from_pretrained(run.workspace / "base").state_dict()
    for name, tensor in merged.state_dict().items():
        adapted_here = any(target in name for target in ("q_proj", "v_proj", "down_proj"))
        assert adapted_here or torch.equal(tensor, untouched[name]), name


def _merges_fail(rank: int) -> None:
    def merge(self: Merger, piece: Piece, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        raise NotImplementedError("not of this kind")

    Merger.merge = merge  # type: ignore[method-assign]


@pytest.mark.parametrize("wanted", [False, True])
def test_a_merge_that_fails_is_said_once(wanted: bool, tmp_path: Path) -> None:
    """Without a folder of the base, adapters are merged unasked: then it is only a warning."""
    write_inputs(tmp_path)
    values = ["method=lora", "substrate.peft.r=2", "substrate.peft.target_modules=[q_proj]", "train.steps=1"]
    values += ["schedule.warmup_steps=0", "deepspeed=zero2", f"substrate.merge={'true' if wanted else 'auto'}"]
    finished = forked.run(["tiny.yaml", *values], tmp_path, before=_merges_fail)
    words = "substrate.merge: PEFT cannot merge LORA into LlamaForCausalLM: not of this kind"
    assert finished.code == (2 if wanted else 0), finished.everything
    assert finished.everything.count(words) == 1
    assert (f"WARNING: {words}" in finished.stdout) != wanted
    folder = tmp_path / "runs" / "tiny"
    assert (folder / "adapter").exists() and not (folder / "model").exists()


@pytest.mark.slow
def test_another_run_goes_on_from_the_adapter(run: Run) -> None:
    """On one rank under ZeRO-2, all blocks."""
    values = ["method=lora", "model.random=null", "model.path=base", "substrate.adapter=runs/tiny/adapter"]
    more = ["output=runs/more", "deepspeed=zero2"]
    finished = forked.run(["tiny.yaml", *values, *more], run.workspace, ranks=1)
    assert finished.code == 0, finished.everything
    evaluations = [line["eval_loss"] for line in metrics(run.folder) if "eval_loss" in line]
    again = [line["eval_loss"] for line in metrics(run.workspace / "runs" / "more") if "eval_loss" in line]
    assert again[0] == pytest.approx(evaluations[-1], abs=1e-4) and again[-1] < again[0]
    assert not (run.workspace / "runs" / "more" / "model").exists(), (
        "merged only if asked for where the base has a folder"
    )


@pytest.mark.slow
def test_importance_of_whole_blocks(run: Run) -> None:
    """Full weights: suppression scales the residual contribution of a block."""
    values = ["method=lisa", "selector.name=importance", "selector.active_share=0.5", "selector.update_every=2"]
    finished = forked.run(["tiny.yaml", *values, "output=runs/full"], run.workspace, ranks=1)
    assert finished.code == 0, finished.everything
    learned = [line["importance"] for line in metrics(run.workspace / "runs" / "full") if "importance" in line]
    assert len(learned) == 3 and all(math.isfinite(value) for values in learned for value in values)


@pytest.mark.slow
def test_a_base_in_four_bits(run: Run) -> None:
    """bitsandbytes has kernels for the CPU as well."""
    values = [v for v in IST if "merge" not in v]
    more = ["model.quantization=nf4", "model.dtype=bf16", "deepspeed=zero2", "output=runs/nf4"]
    finished = forked.run(["tiny.yaml", *values, *more], run.workspace)
    assert finished.code == 0, finished.everything
    evaluations = [line["eval_loss"] for line in metrics(run.workspace / "runs" / "nf4") if "eval_loss" in line]
    assert evaluations[-1] < evaluations[0]
    assert len(load_file(run.workspace / "runs" / "nf4" / "adapter" / "adapter_model.safetensors")) == 4 * 3 * 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["selector.active_share=0"], "selector.active_share (of selector importance): got 0; allowed"),
        (["selector.suppression_factor=1.5"], "selector.suppression_factor (of selector importance): got 1.5; allowed"),
        (
            ["selector.probe.data=eval", "data.eval_fraction=0", "eval.every=null"],
            "selector.probe.data: eval, but there",
        ),
        (["substrate.peft={r: 8, peft_type: null}"], "substrate.peft"),
        (["substrate.adapter=base"], "substrate.peft, substrate.adapter: both given"),
        (["always_on.head=true"], "always_on.head: true, but with adapters"),
        (["model.path=adapter"], "model.path: 'adapter' contains an adapter"),
        (
            ["model.quantization=nf4", "substrate.merge=false"],
            "model.quantization is nf4: ZeRO-3 would cut packed weights apart",
        ),
        (["model.quantization=nf4", "deepspeed=zero2", "method=lisa"], "four bits cannot be trained"),
        (["model.quantization=nf4", "deepspeed=zero2"], "substrate.merge: true, but merging into four bits"),
    ],
    ids=lambda value: value[0].split("=")[0] if isinstance(value, list) else "",
)
def test_mistakes_are_named_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[str], words: str
) -> None:
    from trainer.config import ConfigError, load
    from trainer.config.deepspeed.resolve import resolve

    write_inputs(tmp_path)
    write_base(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        resolve(load("tiny.yaml", [*IST, *values]), 2)
    assert words.replace("'adapter'", f"'{tmp_path / 'adapter'}'") in str(caught.value)
