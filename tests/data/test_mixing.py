"""trainer/data/batches.py: sources mixed by weight, and a position that can be saved."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.data.conftest import prepared
from trainer.data import Batches, DataError

SIZES, WEIGHTS = [10, 3, 40], [0.5, 0.3, 0.2]


def batches(rank=0, ranks=1, *, size=8, micro=2, sizes=SIZES, weights=WEIGHTS, seed=0, fingerprint="x"):
    return Batches(
        sizes,
        seed=seed,
        global_batch_size=size,
        micro_batch_size=micro,
        rank=rank,
        ranks=ranks,
        weights=weights,
        fingerprint=fingerprint,
    )


def stream(num_steps, **settings):
    return [index for step in range(num_steps) for micro in batches(**settings).indices(step) for index in micro]


def source_of(index):
    return 0 if index < 10 else 1 if index < 13 else 2


def test_every_period_of_the_mix_holds_each_source_by_its_weight_exactly():
    sources = [source_of(index) for index in stream(100)]
    for start in range(0, len(sources), 10):
        assert Counter(sources[start : start + 10]) == {0: 5, 1: 3, 2: 2}


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [1, 1, 1], [7.25, 0.001, 3], [1e-6, 1, 1e6]])
def test_any_stretch_of_the_mix_is_as_near_as_whole_samples_allow(weights):
    counts = Counter()
    for number, index in enumerate(stream(60, weights=weights), start=1):
        counts[source_of(index)] += 1
        for source, weight in enumerate(weights):
            assert abs(counts[source] - number * weight / sum(weights)) <= 1.5


def test_each_source_goes_through_all_its_samples_before_any_comes_twice():
    found = stream(100)
    for source, size in enumerate(SIZES):
        own = [index for index in found if source_of(index) == source]
        epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert len(epochs) >= 4
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1
    assert stream(4, seed=1) != stream(4)


def test_without_weights_the_sources_are_one_pool():
    found = stream(53, weights=None)
    assert all(sorted(found[start : start + 53]) == list(range(53)) for start in range(0, 8 * 53, 53))


@pytest.mark.parametrize("weights", [WEIGHTS, None])
def test_a_mix_does_not_depend_on_the_number_of_ranks(weights):
    for step in (0, 1, 70):
        alone = batches(weights=weights).indices(step)
        for ranks in (2, 4):
            shares = [batches(rank, ranks, weights=weights).indices(step) for rank in range(ranks)]
            assert [micro for dealt in zip(*shares, strict=True) for micro in dealt] == alone


def test_the_order_of_a_mix_stays_what_it_was():
    """Resuming relies on it: a change here breaks the checkpoints of others."""
    assert stream(2) == [9, 10, 27, 7, 5, 11, 6, 21, 12, 8, 1, 11, 25, 2, 4, 12]


@pytest.mark.parametrize("weights", [[1, 2], [1, 0, 1]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match=r"weights are .*one above 0 is needed for each of 3 sources"):
        batches(weights=weights)


# A position that can be saved


@pytest.mark.parametrize("weights", [WEIGHTS, None])
def test_what_comes_after_a_stop_is_what_would_have_come_on_any_number_of_ranks(weights):
    whole = stream(12, weights=weights)
    saved = json.loads(json.dumps(batches(1, 2, weights=weights).state(5)))
    for ranks in (1, 2, 4):
        shares = [batches(rank, ranks, weights=weights) for rank in range(ranks)]
        steps = range(shares[0].resume(saved), 12)
        dealt = [zip(*(share.indices(step) for share in shares), strict=True) for step in steps]
        assert [index for step in dealt for turn in step for micro in turn for index in micro] == whole[5 * 8 :]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"sizes": [10, 3, 41]}, "sizes"),
        ({"weights": [0.5, 0.2, 0.3]}, "weights"),
        ({"weights": None}, "weights"),
        ({"seed": 1}, "seed"),
        ({"size": 16}, "global_batch_size"),
        ({"fingerprint": "y"}, "data"),
    ],
)
def test_a_position_in_other_data_is_refused(change, name):
    with pytest.raises(DataError, match=rf"data position: {name} was .* when it was saved and is .* now") as error:
        batches(**change).resume(batches().state(5))
    assert len(error.value.problems) == 1


# From files


def test_sources_are_prepared_apart_and_mixed_by_weight(write, tmp_path, tokenizer):
    first = write(*[{"question": f"{n}", "answer": "a"} for n in range(5)])
    second = write(*[{"text": f"text {n}"} for n in range(7)], name="b.jsonl")
    data = prepared(tmp_path, tokenizer, {"path": str(first), "weight": 3.0}, {"path": str(second), "weight": 1.0})
    assert (data.sizes, data.weights, len(data.train)) == ([5, 7], (3.0, 1.0), 12)
    assert data.train_report.samples == 12
    assert tokenizer.decode(data.train[5]["input_ids"]) == "text 0<|eos|>"
    alone = prepared(tmp_path, tokenizer, second)
    assert alone.train.cache_files == data.train_parts[1].samples.cache_files  # made once, for any mix
    assert alone.fingerprint != data.fingerprint and alone.weights is None


def test_problems_of_all_sources_are_told_at_once(write, tmp_path, tokenizer):
    bad, worse = write(b"{", name="bad.jsonl"), write({"text": ""}, name="worse.jsonl")
    with pytest.raises(DataError) as error:
        prepared(tmp_path, tokenizer, bad, worse, eval=())
    assert [problem.split(":")[0] for problem in error.value.problems] == [str(bad), str(worse)]


def test_a_fraction_is_taken_of_each_source_and_a_small_one_may_give_nothing(write, tmp_path, tokenizer):
    large, small = (write(*[{"text": "ab"}] * n, name=f"{n}.jsonl") for n in (10, 2))
    data = prepared(tmp_path, tokenizer, large, small, eval_fraction=0.2)
    assert (data.sizes, [len(part.samples) for part in data.eval_parts]) == ([8, 2], [2])
