"""Compare `transformers.Trainer` and TRL's `SFTTrainer`, on real ranks, with our own loop on the same batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from tests import distributed
from tests.engine.parity import largest_difference
from tests.integrations.loops import CELLS, RANKS, SAVE_EVERY, fresh
from tests.integrations.ranks import run_everything
from trainer.cli.main import main
from trainer.data.tokenizer import bytes_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transformers")


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, Any]:
    fresh().save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        return distributed.run(run_everything, str(folder), ranks=RANKS, deadline=400)[0]


@pytest.mark.parametrize("name", CELLS)
def test_draws_and_weights_are_those_of_our_loop(answers: dict[str, Any], name: str) -> None:
    answer = answers[name]
    assert answer.draws == answer.own_draws
    assert len(set(answer.draws)) > 2
    assert answer.rates == pytest.approx(answer.own_rates)
    assert answer.moved > 1e-3
    assert answer.difference <= 1e-6


@pytest.mark.parametrize("name", CELLS)
def test_deepspeed_sees_only_the_first_active_set(answers: dict[str, Any], name: str) -> None:
    assert not [warning for warning in answers[name].warnings if "shrunk" in warning]


@pytest.mark.parametrize("name", CELLS)
def test_save_model_writes_every_weight(answers: dict[str, Any], name: str) -> None:
    assert answers[name].saved_difference == 0


def test_save_model_writes_the_adapters_of_all_blocks(answers: dict[str, Any]) -> None:
    assert answers["adapters"] == (set(), 0)


def test_checkpoints_of_a_trainer_are_exported(
    answers: dict[str, Any], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of `checkpoint-N`, and of a folder of `engine.save_checkpoint` in it."""
    checkpoint, base = folder / "Trainer" / f"checkpoint-{SAVE_EVERY}", ["--base", str(folder / "model")]
    expected = load_file(checkpoint / "model.safetensors")
    assert main(["export", str(checkpoint), str(tmp_path / "a"), *base]) == 0
    tag = checkpoint / f"global_step{SAVE_EVERY}"
    assert main(["export", str(tag), str(tmp_path / "b"), *base, "--tokenizer", "bytes"]) == 0
    for out in (tmp_path / "a", tmp_path / "b"):
        model = LlamaForCausalLM.from_pretrained(out)
        found = model.requires_grad_(False).state_dict()
        assert largest_difference(found, {name: expected[name] for name in found}) == 0
        assert model.config.pad_token_id == bytes_tokenizer().pad_token_id
        assert AutoTokenizer.from_pretrained(out).get_vocab() == bytes_tokenizer().get_vocab()
    assert main(["checkpoints", str(checkpoint)]) == 0
    capsys.readouterr()
    assert main(["export", str(checkpoint), str(tmp_path / "c")]) == 2
    assert "does not record the base model that it began with: name it with --base PATH" in capsys.readouterr().err
    shutil.copytree(folder / "model", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert main(["export", str(checkpoint), str(tmp_path / "c"), "--base", str(tmp_path / "other")]) == 2
    assert "rms_norm_eps is 0.1, and was 1e-06 when the run began" in capsys.readouterr().err


def test_a_checkpoint_is_gone_on_from_bit_for_bit(answers: dict[str, Any]) -> None:
    answer = answers["Trainer"]
    assert answer.resumed.draws == answer.draws[SAVE_EVERY:]
    assert answer.resumed.difference == 0
    assert answer.resumed.best_difference == 0


def test_activation_checkpointing_stops_at_the_lowest_active_block(answers: dict[str, Any]) -> None:
    assert answers["OneCycleLR"].inputs_require_grad == {False}  # its embeddings are frozen
    assert answers["Trainer"].inputs_require_grad == {True}


@pytest.mark.parametrize("name", CELLS)
def test_training_again_is_refused(answers: dict[str, Any], name: str) -> None:
    assert "Build a new Trainer" in answers[name].train_again


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no DeepSpeed", "args.deepspeed: None"),
        ("another model", "not the one that the Trainer trains"),
        ("model_init", "model_init builds another"),
        ("optimizer section", "remove the section"),
        ("optimizer with parameters", "sets params"),
        ("reentrant", "use_reentrant=True"),
        ("nothing for the optimizer", "nothing is left for the optimizer"),
    ],
)
def test_what_cannot_be_honoured_is_refused(answers: dict[str, Any], name: str, words: str) -> None:
    assert words in answers["refusals"][name]
