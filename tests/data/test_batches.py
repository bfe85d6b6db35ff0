"""trainer/data/batches.py: the order of samples, their shares, and padded batches."""

import numpy as np
import pytest
import torch

from tests.data.files import QUESTIONS, tokenise_file
from trainer.data.batches import SampleOrder, collate, count_targets, count_tokens, eval_batches


def batches(ranks, rank, *, num_samples=10, size=8, micro=2, seed=0):
    return SampleOrder([num_samples], seed=seed, global_batch_size=size, micro_batch_size=micro, rank=rank, ranks=ranks)


def step_of_all(ranks, step, **settings):
    """Return the micro-batches of a step in the order in which they are dealt to ranks."""
    per_rank = [batches(ranks, rank, **settings).indices(step) for rank in range(ranks)]
    return [per_rank[rank][micro] for micro in range(len(per_rank[0])) for rank in range(ranks)]


def test_the_global_batch_does_not_depend_on_the_number_of_ranks():
    for step in range(7):
        alone = step_of_all(1, step)
        assert [len(micro) for micro in alone] == [2] * 4
        assert step_of_all(2, step) == step_of_all(4, step) == alone
        assert sum(step_of_all(2, step, micro=4), []) == sum(alone, [])


def test_every_epoch_holds_every_sample_once_in_an_order_of_its_own():
    stream = [index for step in range(10) for micro in batches(1, 0).indices(step) for index in micro]
    epochs = [stream[start : start + 10] for start in range(0, 80, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == len(epochs)
    assert batches(1, 0, seed=1).indices(0) != batches(1, 0).indices(0)


def test_a_step_larger_than_the_data_spans_epochs():
    (step,) = batches(1, 0, num_samples=3, size=8, micro=8).indices(1)
    first = [batches(1, 0, num_samples=3, size=1, micro=1).indices(position)[0][0] for position in range(8, 16)]
    assert step == first


def test_a_step_is_a_pure_function_of_its_number():
    forward = [batches(2, 1).indices(step) for step in range(12)]
    used = batches(2, 1)
    assert [used.indices(step) for step in reversed(range(12))] == forward[::-1]


def test_the_order_stays_what_it_was():
    """Resuming relies on it: a change here breaks existing checkpoints."""
    assert batches(1, 0).indices(0) == [[4, 6], [2, 7], [3, 5], [9, 0]]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"size": 6}, r"train\.global_batch_size: 6 is no multiple of .* 2 x 2"),
        ({"num_samples": 0}, r"sizes are \[0\]; at least one sample"),
        ({"rank": 2}, "rank is 2; allowed: 0 to 1"),
    ],
)
def test_impossible_batches_are_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        batches(2, **{"rank": 0, **settings})


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_samples", "max_samples"), [(1, None), (7, None), (8, 5), (9, 100), (24, 4)])
def test_evaluation_takes_every_sample_once_in_equally_many_batches(ranks, num_samples, max_samples):
    shares = [
        eval_batches(num_samples, micro_batch_size=2, rank=rank, ranks=ranks, max_samples=max_samples)
        for rank in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    taken = sorted(index for share in shares for batch in share for index in batch)
    count = min(num_samples, max_samples or num_samples)
    assert len(set(taken)) == len(taken) == count
    assert set(taken) <= set(range(num_samples))
    assert max(len(batch) for share in shares for batch in share) <= 2
    assert len(shares[0]) == -(-count // (2 * ranks))


def test_a_limited_evaluation_is_spread_over_the_file():
    assert eval_batches(12, micro_batch_size=4, rank=0, ranks=1, max_samples=4) == [[0, 3, 6, 9]]


# Collating


@pytest.mark.parametrize(("pad_to", "length"), [(None, 3), (4, 4), (3, 3)])
def test_collate_pads_on_the_right(pad_to, length):
    samples = [{"input_ids": [7], "labels": [7]}, {"input_ids": np.array([5, 6, 7]), "labels": np.array([-100, 6, 7])}]
    batch = collate(samples, pad_id=9, pad_to=pad_to)
    fill = [9] * (length - 3)
    off = [-100] * (length - 3)
    expected = {
        "input_ids": [[7, 9, 9, *fill], [5, 6, 7, *fill]],
        "attention_mask": [[1, 0, 0, *[0] * (length - 3)], [1, 1, 1, *[0] * (length - 3)]],
        "labels": [[7, -100, -100, *off], [-100, 6, 7, *off]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_the_first_label_is_no_target():
    assert count_targets(torch.tensor([[5, -100, 6], [5, 6, 7], [5, -100, -100]])) == 3


def test_prepared_samples_collate_and_count_as_reported(write, tmp_path, tokenizer):
    prepared = tokenise_file(write(*QUESTIONS), tmp_path / "cache", tokenizer)
    batch = collate([prepared.train[index] for index in range(len(QUESTIONS))], pad_id=256)
    assert count_targets(batch["labels"]) == prepared.train_report.target_tokens
    assert count_tokens(batch) == prepared.train_report.tokens
