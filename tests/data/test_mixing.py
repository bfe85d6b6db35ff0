"""trainer/data/batches.py: sources mixed by weight, and a position that can be saved."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter

import pytest

from tests.data.conftest import tokenised
from trainer.data.batches import SampleOrder
from trainer.data.errors import DataError
from trainer.data.tokenizer import bytes_tokenizer

SIZES, WEIGHTS = [10, 3, 40], [0.5, 0.3, 0.2]


def batches(rank=0, ranks=1, *, size=8, micro=2, sizes=SIZES, weights=WEIGHTS, seed=0, fingerprint="x"):
    return SampleOrder(
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
    """Resuming relies on it: a change here breaks existing checkpoints."""
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
    ("change", "problem"),
    [
        ({"sizes": [10, 3, 41]}, r"samples of each source of data\.train: \[10, 3, 40\] .*, \[10, 3, 41\] now"),
        (
            {"weights": [0.5, 0.2, 0.3]},
            r"data\.train\[\]\.weight: \[0\.5, 0\.3, 0\.2\] in the .*, \[0\.5, 0\.2, 0\.3\]",
        ),
        ({"weights": None}, r"data\.train\[\]\.weight: \[0\.5, 0\.3, 0\.2\] in the checkpoint, None now"),
        ({"seed": 1}, "seed: 0 in the checkpoint, 1 now"),
        ({"size": 16}, r"train\.global_batch_size: 8 in the checkpoint, 16 now"),
        ({"fingerprint": "y"}, r"data\.train: not the samples of the run to resume"),
    ],
)
def test_a_position_in_other_data_is_refused(change, problem):
    with pytest.raises(DataError, match=rf"^{problem}.*; change it back, or start anew with resume=never") as error:
        batches(**change).resume(batches().state(5))
    assert len(error.value.problems) == 1


# Which key changed


def batches_of(data, **changes):
    return SampleOrder(
        data.sizes,
        seed=0,
        global_batch_size=2,
        micro_batch_size=1,
        rank=0,
        ranks=1,
        weights=data.weights,
        **{
            "fingerprint": data.fingerprint,
            "made_of": data.made_of,
            "earlier_fingerprint": data.earlier_fingerprint,
            **changes,
        },
    )


def other_template(tokenizer):
    other = bytes_tokenizer()
    other.chat_template += " "
    return other


def other_end(tokenizer):
    other = bytes_tokenizer()
    other.eos_token = "<|pad|>"
    return other


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"max_length": 63}, r"data\.max_length: 64 in the checkpoint, 63 now"),
        ({"overflow": "drop"}, r"data\.overflow: 'truncate' in the checkpoint, 'drop' now"),
        ({"packing": True}, r"data\.packing: False in the checkpoint, True now"),
        ({"eval_fraction": 0.2}, r"data\.eval_fraction: 0\.0 in the checkpoint, 0\.2 now"),
        ({"tokenizer": other_template}, "the tokenizer's chat template: it is not the same as in the checkpoint"),
        ({"tokenizer": other_end}, r"model\.tokenizer: it is not the same as in the checkpoint"),
        ({"format": "text"}, r"data\.train\[0\]\.format: 'auto' in the checkpoint, 'text' now"),
        ({"ignore": ["note"]}, r"data\.train\[0\]\.ignore: \[\] in the checkpoint, \['note'\] now"),
        ({"edited": True}, r"data\.train\[0\]\.path: its content is not the same as in the checkpoint"),
        ({"more": True}, r"data\.train\[1\]: not in the checkpoint"),
    ],
)
def test_what_changed_in_the_data_is_named_by_its_key(write, tmp_path, tokenizer, changes, problem):
    rows = [{"text": f"text {n}", "note": ""} for n in range(9)]
    path = write(*rows)
    before = batches_of(tokenised(tmp_path, tokenizer, path))
    state = json.loads(json.dumps(before.state(5)))
    assert before.resume(state) == 5 and before.not_recorded(state) == []
    source = {"path": str(path), **{key: changes[key] for key in ("format", "ignore") if key in changes}}
    sources = [source, *([str(write(*rows, name="more.jsonl"))] if "more" in changes else [])]
    if "edited" in changes:
        write({"text": "other"}, *rows[1:])
    if "ignore" in changes:
        write(*({**row, "note": "x"} for row in rows), name="noted.jsonl").rename(path)
    settings = {key: changes[key] for key in ("max_length", "overflow", "packing", "eval_fraction") if key in changes}
    tokenizer = changes["tokenizer"](tokenizer) if "tokenizer" in changes else tokenizer
    with pytest.raises(DataError) as error:
        batches_of(tokenised(tmp_path, tokenizer, *sources, **settings)).resume(state)
    assert any(re.match(problem, line) for line in error.value.problems), error.value.problems
    assert all("resume=never" in line and "[0].path" not in line for line in error.value.problems) or (
        "edited" in changes or "ignore" in changes
    )


def fingerprint_of_678ef04(path, tokenizer):
    """Compute the fingerprint as that version did, for a file and the settings of `prepared`."""

    def digest(value):
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    core = json.loads(tokenizer.backend_tokenizer.to_str())
    del core["truncation"], core["padding"]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    template = {"template": tokenizer.chat_template, "patched_by": None}
    source = {
        "version": 2,
        "files": [[".jsonl", hashlib.sha256(path.read_bytes()).hexdigest()]],
        "source": ["auto", None, None],
        "split": None,
        "tokenizer": {"core": digest(core), "special": special, **template},
        "max_length": 64,
        "overflow": "truncate",
        "packed_by": None,
    }
    return digest([digest(source)[:32]])[:32]


def test_positions_of_an_earlier_version_are_taken_up_if_nothing_changed(write, tmp_path, tokenizer):
    """Checkpoints of 678ef04 have a fingerprint, and no `made_of`."""
    path = write(*[{"question": f"{n}?", "answer": str(n)} for n in range(9)])
    tokenizer = bytes_tokenizer()
    now = batches_of(tokenised(tmp_path, tokenizer, path))
    state = {**now.state(5), "data": fingerprint_of_678ef04(path, tokenizer)}
    del state["made_of"]
    assert now.resume(state) == 5
    assert "does not record what its samples were made of" in now.not_recorded(state)[0]
    with pytest.raises(DataError, match=r"^data\.train: not the samples .* data\.max_length, .*does not record which"):
        batches_of(tokenised(tmp_path, tokenizer, path, max_length=63)).resume(state)
    # Of a folder, whose files are not read through a table any more, only the number of samples is known.
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / "train.jsonl")
    now = batches_of(tokenised(tmp_path, tokenizer, folder))
    assert now.resume(state) == 5
    assert "only the number of samples was checked" in now.not_recorded(state)[0]
    with pytest.raises(DataError, match="samples of each source"):
        now.resume({**state, "sizes": [8]})


# From files


def test_sources_are_prepared_apart_and_mixed_by_weight(write, tmp_path, tokenizer):
    first = write(*[{"question": f"{n}", "answer": "a"} for n in range(5)])
    second = write(*[{"text": f"text {n}"} for n in range(7)], name="b.jsonl")
    data = tokenised(tmp_path, tokenizer, {"path": str(first), "weight": 3.0}, {"path": str(second), "weight": 1.0})
    assert (data.sizes, data.weights, len(data.train)) == ([5, 7], (3.0, 1.0), 12)
    assert data.train_report.samples == 12
    assert tokenizer.decode(data.train[5]["input_ids"]) == "text 0<|eos|>"
    alone = tokenised(tmp_path, tokenizer, second)
    assert alone.train.cache_files == data.train_parts[1].samples.cache_files  # made once, for any mix
    assert alone.fingerprint != data.fingerprint and alone.weights is None


def test_problems_of_all_sources_are_told_at_once(write, tmp_path, tokenizer):
    bad, worse = write(b"{", name="bad.jsonl"), write({"text": ""}, name="worse.jsonl")
    with pytest.raises(DataError) as error:
        tokenised(tmp_path, tokenizer, bad, worse, eval=())
    assert [problem.split(":")[0] for problem in error.value.problems] == [str(bad), str(worse)]


def test_a_fraction_is_taken_of_each_source_and_a_small_one_may_give_nothing(write, tmp_path, tokenizer):
    large, small = (write(*[{"text": "ab"}] * n, name=f"{n}.jsonl") for n in (10, 2))
    data = tokenised(tmp_path, tokenizer, large, small, eval_fraction=0.2)
    assert (data.sizes, [len(part.samples) for part in data.eval_parts]) == ([8, 2], [2])
