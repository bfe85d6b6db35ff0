"""Runs with `model.add_tokens`: what they say and write, and how they resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import forked
from tests.launching import metrics, write_inputs
from tests.models import tiny_model
from trainer.cli.main import main
from trainer.data.tokenizer import bytes_tokenizer

VALUES = [
    "model.random=null",
    "model.path=base",
    "model.add_tokens=[<call>, a, </call>]",
    "always_on.embeddings=new_rows",
    "optimizer.weight_decay=0.1",
    "checkpoint.every=3",
]
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LISA under ZeRO-3 on two ranks, on an untied model without spare rows, whose data have the tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    write_inputs(folder)
    rows = [{"question": f"<call>{i}?", "answer": f"a<call>{i}</call>" + "." * (i % 5)} for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_model("llama", vocab_size=261).save_pretrained(folder / "base")
    bytes_tokenizer().save_pretrained(folder / "base")
    finished = forked.run(["tiny.yaml", *VALUES], folder)
    assert finished.code == 0, finished.everything
    assert "model.add_tokens: 2 new tokens, ids 261 to 262; the tokenizer has 'a' already" in finished.everything
    assert "always on: embeddings (new rows), head (new rows), norm." in finished.stdout
    return folder


def test_only_the_new_rows_of_the_written_model_differ_from_the_base(workspace: Path) -> None:
    model = load_file(workspace / "runs" / "tiny" / "model" / "model.safetensors")
    base = load_file(workspace / "base" / "model.safetensors")
    for name in TABLES:
        assert model[name].shape == (263, 32) and torch.equal(model[name][:261], base[name])
        assert not torch.allclose(model[name][261], model[name][262])
    tokenizer = AutoTokenizer.from_pretrained(workspace / "runs" / "tiny" / "model")
    assert tokenizer("a<call>b</call>")["input_ids"] == [97, 261, 98, 262]
    assert tokenizer.decode([97, 261, 98, 262], skip_special_tokens=True) == "a<call>b</call>"


@pytest.mark.parametrize("way", ["checkpoint", "delta"])
def test_an_export_is_what_the_run_wrote(workspace: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.chdir(workspace)
    if way == "checkpoint":
        assert main(["export", "runs/tiny", way]) == 0
    else:
        assert main(["export", "runs/tiny", "changed", "--delta"]) == 0
        assert load_file("changed/delta.safetensors")["lm_head.new_rows"].shape == (2, 32)
        assert main(["apply", "base", "changed", way]) == 0
    written = workspace / "runs" / "tiny" / "model"
    assert {file.name for file in (workspace / way).iterdir()} == {file.name for file in written.iterdir()}
    for file in written.iterdir():
        assert (workspace / way / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_run_resumes_bit_for_bit_and_not_with_other_tokens(workspace: Path) -> None:
    resume = ["tiny.yaml", *VALUES, "resume=runs/tiny/checkpoints/step-00000003.json", "output=runs/resumed"]
    refused = forked.run([*resume, "model.add_tokens=[<call>, <end>]"], workspace)
    assert refused.code == 2 and "model.add_tokens: ['<call>', 'a', '</call>'] in the checkpoint" in refused.everything
    finished = forked.run(resume, workspace)
    assert finished.code == 0, finished.everything
    assert "resuming after step 3" in finished.everything
    models = [load_file(workspace / "runs" / run / "model" / "model.safetensors") for run in ("tiny", "resumed")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    losses = [
        {m["step"]: m["loss"] for m in metrics(workspace / "runs" / run) if "loss" in m} for run in ("tiny", "resumed")
    ]
    assert all(losses[0][step] == loss for step, loss in losses[1].items())


def test_tokens_that_the_data_lacks_do_not_end_a_run_with_adapters(workspace: Path) -> None:
    """Which ends for other weights that no gradient reaches."""
    values = [*VALUES, "method=lora", "model.add_tokens=[<never>]", "output=runs/never", "deepspeed=zero2"]
    finished = forked.run(["tiny.yaml", *values], workspace, ranks=1)
    assert finished.code == 0, finished.everything


@pytest.mark.slow
def test_ist_on_a_tied_model_with_the_fused_loss_writes_an_adapter_and_a_merged_model(workspace: Path) -> None:
    """Of which a checkpoint becomes the same adapter; each loss is that without fusing."""
    tiny_model("gemma3_text", vocab_size=261).save_pretrained(workspace / "tied")
    bytes_tokenizer().save_pretrained(workspace / "tied")
    values = [*VALUES, "method=ist", "model.path=tied", "substrate.merge=true", "selector.active_share=0.5"]
    for fused in ("true", "false"):
        finished = forked.run(["tiny.yaml", *values, f"train.fused_loss={fused}", f"output=runs/{fused}"], workspace)
        assert finished.code == 0, finished.everything
    fused, plain = ([m["loss"] for m in metrics(workspace / "runs" / run) if "loss" in m] for run in ("true", "false"))
    assert fused == pytest.approx(plain, abs=2e-6)
    run = workspace / "runs" / "true"
    assert forked.command(["export", str(run), "adapter"], workspace).code == 0
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (workspace / "adapter", run / "adapter")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = ours["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    merged = AutoModelForCausalLM.from_pretrained(run / "model")
    assert torch.equal(merged.get_input_embeddings().weight[261:], rows)
    base = AutoModelForCausalLM.from_pretrained(workspace / "tied")
    assert torch.equal(merged.get_output_embeddings().weight[:261], base.get_output_embeddings().weight)
    base.resize_token_embeddings(263)
    adapted = PeftModel.from_pretrained(base, str(run / "adapter"))
    ids = torch.tensor([[97, 261, 98, 262]])
    with torch.no_grad():
        assert torch.allclose(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("always_on.head=false", "WARNING: the rows of the new tokens in head stay the mean of the others"),
        ("model.add_tokens=[a]", "the tokenizer has all tokens of model.add_tokens already"),
    ],
)
def test_what_would_train_nothing_is_said(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str, said: str
) -> None:
    monkeypatch.chdir(workspace)
    code = main(["train", "tiny.yaml", *VALUES, value, "output=runs/dry", "--dry-run"])
    output = capsys.readouterr()
    assert said in output.out + output.err and code == (0 if "WARNING" in said else 2)
