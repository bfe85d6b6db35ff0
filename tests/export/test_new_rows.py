"""What is written of a model with rows of new tokens, opened by transformers and by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import trainer
from tests import distributed
from tests.engine.parity import Cell, make_engine, train_step
from tests.models import tiny_model
from trainer.config.schema import AdapterSubstrate
from trainer.data.tokenizer import add_tokens, bytes_tokenizer
from trainer.export.from_engine import export, export_adapter
from trainer.model.adapters import adapt
from trainer.model.growth import grow
from trainer.model.new_rows import split
from trainer.selectors import All

TOKENS = ["<call>", "</call>"]
LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
IA3 = {
    "peft_type": "IA3",
    "target_modules": ["v_proj", "down_proj"],
    "feedforward_modules": ["down_proj"],
    "init_ia3_weights": False,
}
# By name: family, ZeRO stage, adapters.
CASES: dict[str, tuple[str, int, dict[str, Any] | None]] = {
    "tied": ("gemma3_text", 3, None),
    "untied": ("mixtral", 2, None),
    "lora": ("llama", 3, LORA),
    "lora, tied": ("gemma3_text", 2, LORA),
    "ia3, tied": ("gemma3_text", 3, IA3),
    "lora, head with bias": ("phi", 2, LORA),
}
IDS = torch.cat([torch.arange(20), torch.tensor([261, 40, 262, 50])])[None]


def _written(rank: int, folder: Path) -> dict[str, Tensor]:
    """Train for two steps, write, and return the logits of the live model."""
    logits = {}
    for name, (family, stage, peft) in CASES.items():
        tokenizer = bytes_tokenizer()
        ids = add_tokens(tokenizer, TOKENS)
        model: Any = AutoModelForCausalLM.from_pretrained(folder / family, attn_implementation="eager")
        grow(model, ids)
        split(model, ids, ("embeddings", "head"))
        torch.manual_seed(7)
        for rows in {id(p): p for n, p in model.named_parameters() if n.endswith("new_rows")}.values():
            rows.data.normal_(std=0.1)
        adapters = None if peft is None else adapt(model, AdapterSubstrate(peft=peft))
        whole = model if adapters is None else adapters.model
        substrate: Any = "full" if adapters is None else "adapter"
        sparse = trainer.prepare(whole.train(), selector=All(), substrate=substrate)
        cell = Cell(stage=stage)
        engine = make_engine(cell, whole, sparse)
        sparse.attach(engine)
        for step in range(2):
            train_step(cell, engine, step, rank)
        engine.eval()
        with torch.no_grad():
            logits[name] = engine(input_ids=IDS).logits.clone()
        if adapters is None:
            export(engine, tokenizer, folder / name)
        else:
            export_adapter(engine, adapters, folder / name, tokenizer=tokenizer)
        engine.destroy()
    return logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    for family in {family for family, _, _ in CASES.values()}:
        tiny_model(family, vocab_size=261).save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="module")
def logits(folder: Path) -> dict[str, Tensor]:
    return distributed.run(_written, folder, ranks=2)[0]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_what_is_opened_has_the_logits_of_the_live_model_bit_for_bit(
    folder: Path, logits: dict[str, Tensor], name: str
) -> None:
    family, _, peft = CASES[name]
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    assert tokenizer("a<call>b</call>")["input_ids"] == [97, 261, 98, 262]
    if peft is None:
        model = AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="eager")
    else:
        base = AutoModelForCausalLM.from_pretrained(folder / family, attn_implementation="eager")
        base.resize_token_embeddings(len(tokenizer))
        model = PeftModel.from_pretrained(base, str(folder / name))
    found = model.eval()(input_ids=IDS).logits
    if name == "lora, head with bias":  # of which the base's user has made new entries
        found, logits = found[..., :261], {name: logits[name][..., :261]}
    assert torch.equal(found, logits[name])
