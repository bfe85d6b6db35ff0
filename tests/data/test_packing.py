"""Packing: the loss of packed samples is that of the samples alone, with no attention across them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from tests.data.conftest import tokenised
from tests.models import tiny_llama
from trainer.data.batches import collate, count_targets, count_tokens
from trainer.model.loss import summed_loss

LENGTHS = (7, 2, 30, 12, 18, 3, 25, 9)
PAD = 9


def one(length, seed):
    generator = np.random.default_rng(seed)
    ids = generator.integers(10, 60, length).astype(np.int32)
    labels = np.where(generator.random(length) < 0.6, ids, -100).astype(np.int32)
    labels[0], labels[-1] = -100, ids[-1]
    return {"input_ids": ids, "labels": labels}


def pack(samples):
    row = {name: np.concatenate([sample[name] for sample in samples]) for name in ("input_ids", "labels")}
    return {**row, "seq_lengths": np.array([len(sample["input_ids"]) for sample in samples])}


SAMPLES = [one(length, seed) for seed, length in enumerate(LENGTHS)]
ROWS = [pack(SAMPLES[:4]), pack(SAMPLES[4:6]), pack(SAMPLES[6:])]  # of different lengths: the shorter ones are padded


def loss_and_gradients(model, batches):
    """Return the loss and the gradients of all parameters, summed over batches."""
    model = copy.deepcopy(model)
    total = 0.0
    for batch in batches:
        labels = batch.pop("labels")
        loss = summed_loss(model(**batch).logits, labels)
        loss.backward()
        total += loss.item()
    return total, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    model = tiny_llama(layers=3)
    model.set_attn_implementation(request.param)
    # Larger weights than at initialisation, so that what a token attends to shows in the loss.
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    return model


@pytest.fixture(scope="module")
def alone(model):
    """Compute loss and gradients of the samples, each in a batch of its own."""
    return loss_and_gradients(model, [collate([sample], pad_id=PAD) for sample in SAMPLES])


@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
@pytest.mark.parametrize("pad_to", [None, 16])
def test_packed_loss_and_gradients_equal_those_of_the_samples_alone(model, alone, flat, pad_to):
    loss, gradients = alone
    packed, packed_gradients = loss_and_gradients(model, [collate(ROWS, pad_id=PAD, pad_to=pad_to, flat=flat)])
    assert packed == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(packed_gradients, gradients, rtol=1e-4, atol=1e-5 * float(gradients.abs().max()))


def test_samples_that_see_each_other_have_another_loss(model, alone):
    """The test above would notice samples that are only concatenated, with or without their positions."""
    loss, _ = alone
    joined = [{name: row[name] for name in ("input_ids", "labels")} for row in ROWS]
    together, _ = loss_and_gradients(model, [collate(joined, pad_id=PAD)])
    assert abs(together / loss - 1) > 1e-2
    masked = {**collate(ROWS, pad_id=PAD), "attention_mask": collate(joined, pad_id=PAD)["attention_mask"]}
    positions, _ = loss_and_gradients(model, [masked])
    assert abs(positions / loss - 1) > 1e-2


def test_a_packed_batch_counts_what_its_samples_count():
    whole, packed = collate(SAMPLES, pad_id=PAD), collate(ROWS, pad_id=PAD, pad_to=8)
    flat = collate(ROWS, pad_id=PAD, flat=True)
    assert packed["input_ids"].shape == (3, 56) and flat["input_ids"].shape == (1, sum(LENGTHS))
    for batch in (packed, flat):
        assert set(batch) == {"input_ids", "position_ids", "labels"}
        assert count_targets(batch["labels"]) == count_targets(whole["labels"])
        assert count_tokens(batch) == count_tokens(whole) == sum(LENGTHS)


def test_positions_start_anew_in_every_sample_and_padding_stands_apart():
    rows = [pack([one(3, 0), one(2, 1)]), pack([one(2, 2)])]
    assert collate(rows, pad_id=PAD)["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert collate(rows, pad_id=PAD)["labels"][1, 2:].tolist() == [-100] * 3


# TokenisedData


def test_prepared_rows_hold_every_sample_once_and_none_is_cut(write, tmp_path, tokenizer):
    path = write(*[{"prompt": "p" * (1 + n % 13), "completion": chr(97 + n) * (1 + n % 7)} for n in range(1, 26)])
    alone = tokenised(tmp_path, tokenizer, path, max_length=24)
    packed = tokenised(tmp_path, tokenizer, path, max_length=24, packing=True)
    assert packed.train_report == alone.train_report
    assert len(packed.train) < len(alone.train) / 1.5
    found = []
    for row in packed.train:
        assert row["seq_lengths"].sum() == len(row["input_ids"]) == len(row["labels"]) <= 24
        borders = np.cumsum(row["seq_lengths"])[:-1]
        assert row["labels"][[0, *borders]].tolist() == [-100] * len(row["seq_lengths"])
        parts = zip(np.split(row["input_ids"], borders), np.split(row["labels"], borders), strict=True)
        found += [(ids.tolist(), labels.tolist()) for ids, labels in parts]
    assert sorted(found) == sorted((s["input_ids"].tolist(), s["labels"].tolist()) for s in alone.train)
    batch = collate([packed.train[index] for index in range(len(packed.train))], pad_id=256)
    assert count_targets(batch["labels"]) == packed.train_report.target_tokens
    assert count_tokens(batch) == packed.train_report.tokens
    assert sorted(file.name for file in (tmp_path / "cache").glob("*/*")) == sorted(["reports.json", "train.arrow"] * 2)


def test_evaluation_data_is_packed_too(write, tmp_path, tokenizer):
    path = write(*[{"text": f"{n}"} for n in range(8)])
    data = tokenised(tmp_path, tokenizer, path, eval_fraction=0.5, packing=True, max_length=8)
    assert data.eval is not None and "seq_lengths" in data.eval[0] and len(data.eval) < 4
