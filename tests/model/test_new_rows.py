"""trainer/model/growth.py, new_rows.py and fused_rows.py: rows of new tokens, without an engine."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests import distributed
from tests.model.loading import settings, weights
from tests.models import tiny_model
from trainer.config.schema import AdapterSubstrate, ModelConfig
from trainer.data.tokenizer import add_tokens, bytes_tokenizer
from trainer.model import load as models
from trainer.model.adapter_checks import AdapterError
from trainer.model.adapters import adapt
from trainer.model.blocks import PARTS, BlockError, always_on, find
from trainer.model.folder_checks import ModelError
from trainer.model.growth import grow, mean
from trainer.model.loss import LossError, Objective, choose_fused
from trainer.model.new_rows import fold, split

BOTH = ("embeddings", "head")
IDS = range(61, 64)
# Untied; tied with scaled embeddings, soft caps, or spare rows; experts; tied with scaled logits; a head with a bias.
FAMILIES = ["llama", "gemma3_text", "gemma2", "qwen2", "mixtral", "cohere", "phi"]
SPARE = {"qwen2": 80}


def grown(family: str) -> PreTrainedModel:
    """Return a model with three new rows, after 61 tokens."""
    model = tiny_model(family, vocab_size=SPARE.get(family, 61))
    grow(model, IDS)
    return model.train()


def trained(model: PreTrainedModel) -> None:
    """Give the new rows values that no other rows have, as training does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, rows in model.named_parameters():
            if name.endswith("new_rows"):
                rows.copy_(torch.randn(rows.shape))


def tokens() -> Tensor:
    ids = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(2))
    ids[:, 3::5] = torch.tensor([61, 63, 62, 61, 63])
    return ids


def folded(model: PreTrainedModel) -> PreTrainedModel:
    """Return a plain model with the new rows in its tables."""
    plain = type(model)(copy.deepcopy(model.config))
    plain.load_state_dict(fold(model, model.state_dict()), strict=False)
    return plain.train()


@pytest.mark.parametrize("family", FAMILIES)
def test_new_rows_begin_as_the_mean_and_tables_grow_only_without_spare_rows(family: str) -> None:
    before, after = tiny_model(family, vocab_size=SPARE.get(family, 61)), grown(family)
    rows = SPARE.get(family, 64)
    for old, new in zip(
        (before.get_input_embeddings(), before.get_output_embeddings()),
        (after.get_input_embeddings(), after.get_output_embeddings()),
        strict=True,
    ):
        assert new.weight.shape[0] == rows == after.config.vocab_size
        assert torch.equal(new.weight[:61], old.weight[:61])
        assert torch.allclose(new.weight[61:64], old.weight[:61].mean(0).expand(3, -1), atol=1e-7)


def test_the_mean_does_not_depend_on_threads_or_dtype_of_sums() -> None:
    rows = torch.randn(10_000, 8).to(torch.bfloat16)
    assert mean(rows).dtype is torch.bfloat16 and torch.equal(mean(rows), rows.double().mean(0).to(torch.bfloat16))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_folded_model_bit_for_bit_and_gradients_those_of_its_rows(family: str) -> None:
    model = grown(family)
    split(model, IDS, BOTH)
    trained(model)
    plain = folded(model)
    ids = tokens()
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    before = [table.weight.clone() for table in tables]
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for table in tables:
        table.new_rows.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    plain(input_ids=ids, labels=ids).loss.backward()
    for table, whole in zip(tables, (plain.get_input_embeddings(), plain.get_output_embeddings()), strict=True):
        assert table.new_rows.grad.shape == (3, 32) and table.weight.grad is None
        assert torch.allclose(table.new_rows.grad, whole.weight.grad[61:64], atol=1e-7)
    assert all(torch.equal(table.weight, old) for table, old in zip(tables, before, strict=True))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "phi"])
def test_the_fused_loss_and_its_gradients_are_the_plain_ones(family: str) -> None:
    model = grown(family)
    split(model, IDS, BOTH)
    trained(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("new_rows") or ".1." in name)
    ids = tokens()
    labels = torch.cat([torch.full((2, 4), -100), ids[:, 4:]], 1)
    found = []
    for fused in (False, True):
        model.zero_grad()
        objective = Objective(model, fused=fused, router_loss=False)
        engine = SimpleNamespace(module=model)
        loss, _ = objective(_Called(engine), {"input_ids": ids, "labels": labels})
        loss.backward()
        found.append([loss.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]])
    for plain, other in zip(*found, strict=True):
        assert torch.allclose(plain, other, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))
    assert all(torch.count_nonzero(gradient) for gradient in found[1])


class _Called:
    """A model in place of an engine."""

    def __init__(self, engine: Any) -> None:
        self.module = engine.module

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def test_a_head_with_a_bias_has_no_fused_loss() -> None:
    model = grown("phi")
    split(model, IDS, BOTH)
    with pytest.raises(LossError, match="if it has a bias; set train.fused_loss=false"):
        choose_fused(True, model)


def test_only_the_rows_belong_to_their_parts() -> None:
    model = grown("llama")
    split(model, IDS, ["embeddings"])
    parts = always_on(find(model), PARTS)
    assert [list(parts[part]) for part in BOTH] == [["model.embed_tokens.new_rows"], ["lm_head.weight"]]
    model = grown("qwen2")
    split(model, IDS, BOTH)
    structure = find(model)
    assert structure.tied and list(always_on(structure, PARTS)) == ["embeddings", "norm"]
    assert model.lm_head.new_rows is model.model.embed_tokens.new_rows


@pytest.mark.parametrize(
    ("family", "ids", "parts", "problem"),
    [
        ("qwen2", IDS, ["embeddings"], "embeddings: new_rows, but not always_on.head, to which this model ties it"),
        ("qwen2", IDS, ["head"], "head: new_rows, but not always_on.embeddings, to which this model ties it"),
        ("llama", range(0), BOTH, "the tokenizer has all tokens of model.add_tokens already"),
    ],
)
def test_what_cannot_be_split_is_refused(family: str, ids: range, parts: Any, problem: str) -> None:
    with pytest.raises(BlockError, match=problem):
        split(grown(family), ids, parts)


@pytest.mark.parametrize(
    "more",
    [{"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [3]}],
)
def test_adapters_on_the_same_tables_are_refused(more: dict[str, Any]) -> None:
    model = grown("llama")
    split(model, IDS, BOTH)
    peft = {"peft_type": "LORA", "target_modules": ["q_proj"], **more}
    with pytest.raises(AdapterError, match=r"PEFT would also train (model.embed_tokens|lm_head), of which always_on"):
        adapt(model, AdapterSubstrate(peft=peft))


# --- loaded from a folder ----------------------------------------------------------------------------------------


def _configured(path: Path) -> tuple[ModelConfig, Any, range]:
    tokenizer = bytes_tokenizer()
    ids = add_tokens(tokenizer, ["<call>", "</call>"])
    return ModelConfig(path=str(path), dtype="fp32"), tokenizer, ids


def _loaded(rank: int, path: Path, stage: int) -> dict[str, Tensor]:
    config, tokenizer, _ = _configured(path)
    return weights(models.load(config, tokenizer, seed=0, deepspeed=settings(stage)))


@pytest.mark.parametrize("safetensors", [True, False], ids=["safetensors", "pickle"])
def test_partitions_are_filled_with_the_rows_that_a_whole_model_has(tmp_path: Path, safetensors: bool) -> None:
    """Also where transformers has to load the model, since its files are no safetensors."""
    tiny_model("gemma3_text", vocab_size=261).save_pretrained(tmp_path)
    if not safetensors:
        model = models.AutoModelForCausalLM.from_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    whole = _loaded(0, tmp_path, 2)
    assert whole["model.embed_tokens.weight"].shape[0] == 263
    for found in distributed.run(_loaded, tmp_path, 3, ranks=2):
        assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=200).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="had 261 tokens before, but the model embeds 200"):
        _loaded(0, tmp_path, 2)
