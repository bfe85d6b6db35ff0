"""IST's rule: the formulas against numbers worked by hand, what it learns in a simulation, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from trainer.selectors import Importance
from trainer.selectors.importance import draw, rewards, updated_dispensability


def test_rewards_by_hand() -> None:
    # exp(-1) = 0.367879, exp(-2) = 0.135335, exp(-3) = 0.049787; their mean is 0.184334.
    found = rewards(np.array([1.0, 2.0, 3.0]))
    assert list(found) == pytest.approx([0.183546, -0.048998, -0.134547], abs=1e-6)


def test_an_update_by_hand_counts_all_probes_with_the_scores_from_before() -> None:
    start = np.array([0.0, 0.0, math.log(3), 0.0])  # p = 0.5, 0.5, 0.75, 0.5
    losses = np.array([1.0, 2.0, 3.0])
    found = updated_dispensability(start, [(0, 1), (1, 2), (2, 3)], losses, rate=10)
    slope = [0.25, 0.25, 0.1875, 0.25]
    expected = [
        10 * 0.183546 * slope[0],
        10 * (0.183546 - 0.048998) * slope[1],
        math.log(3) + 10 * (-0.048998 - 0.134547) * slope[2],
        10 * -0.134547 * slope[3],
    ]
    assert list(found) == pytest.approx(expected, abs=1e-5)
    assert list(start) == [0, 0, math.log(3), 0]


def test_a_loss_that_is_not_a_number_counts_as_the_worst() -> None:
    found = rewards(np.array([0.0, math.nan, math.inf]))
    assert list(found) == pytest.approx([2 / 3, -1 / 3, -1 / 3])


def test_losses_far_below_zero_have_no_reward() -> None:
    with pytest.raises(ValueError, match=r"probe losses \[-1000.0, 1.0\]: exp\(-loss\) must be finite"):
        rewards(np.array([-1000.0, 1.0]))


def test_draws_follow_the_weights() -> None:
    """Two of three without replacement, weights 1, 2, 3: the sets' probabilities, worked by hand."""
    weights = np.log(np.array([1.0, 2.0, 3.0]))
    generator = np.random.default_rng(0)
    drawn = [draw(weights, 2, generator) for _ in range(20_000)]
    expected = {(0, 1): 1 / 6 * 2 / 5 + 2 / 6 * 1 / 4, (0, 2): 1 / 6 * 3 / 5 + 3 / 6 * 1 / 3}
    for blocks, probability in expected.items():
        assert drawn.count(blocks) / len(drawn) == pytest.approx(probability, abs=0.01)
    assert draw(np.array([-1e4, 0.0, -1e4]), 2, generator)[0] < 2, "weights that round to zero can be drawn"


def run(losses_of: Any, *, blocks: int, updates: int, **settings: Any) -> tuple[Importance, np.ndarray]:
    """The selector after `updates` measurements, and how often each block was drawn in the second half of them."""
    selector = Importance(seed=1, **settings)
    times = np.zeros(blocks)
    for step in range(updates * selector.update_every):
        wanted = selector.needs(step)
        if wanted is not None:
            selector.observe(wanted, tuple(losses_of(trial) for trial in wanted.trials))
        drawn = selector.select(step // selector.interval, blocks)
        if step >= updates * selector.update_every // 2:
            times[list(drawn)] += 1
    return selector, times / times.sum() * int(settings.get("active_share", 0.25) * blocks)


def test_two_blocks_of_32_that_matter_are_drawn_about_twice_as_often() -> None:
    """A simulation of the paper's equations: suppressing one of the two costs 0.1, suppressing the others nothing."""
    selector, share = run(lambda trial: 1.5 + 0.1 * ((3 in trial) + (20 in trial)), blocks=32, updates=400)
    scores = np.array(selector.importance())
    mattering, others = [3, 20], [i for i in range(32) if i not in (3, 20)]
    assert scores[mattering] == pytest.approx([2.85, 2.85], abs=0.3), scores
    assert scores[others].mean() == pytest.approx(-0.36, abs=0.1)
    assert share[mattering].mean() == pytest.approx(0.47, abs=0.03)
    assert share[others].mean() == pytest.approx(0.235, abs=0.005)


def test_probes_differ_also_where_the_scores_leave_no_choice() -> None:
    selector = Importance(probes=6, suppressed_share=0.5, seed=0)
    selector.load_state_dict({"dispensability": [1000.0, 1000.0, -1000.0, -1000.0]})
    wanted = selector.needs(10)
    assert wanted is not None
    assert sorted(wanted.trials) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert wanted.trials[0] == (0, 1), "the dispensable ones are suppressed first"
    assert wanted.factor == 0.25


def test_measurements_come_every_so_many_steps_but_not_at_the_start() -> None:
    selector = Importance(update_every=4, seed=0)
    assert selector.importance() is None
    selector.select(0, 8)
    assert [step for step in range(13) if selector.needs(step)] == [4, 8, 12]
    assert selector.needs(4) == selector.needs(4), "asking changes nothing"
    assert selector.needs(4).trials != selector.needs(8).trials


def test_state_brings_back_the_draws() -> None:
    first, _ = run(lambda trial: float(0 in trial), blocks=8, updates=5)
    second = Importance(seed=1)
    second.load_state_dict(first.state_dict())
    assert [first.select(i, 8) for i in range(9)] == [second.select(i, 8) for i in range(9)]
    assert first.needs(60) == second.needs(60)
    with pytest.raises(ValueError, match="8 blocks were scored before, this model has 9"):
        second.select(0, 9)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"active_share": 0.1}, "selector.active_share: 0.1 of 8 blocks is none; allowed: 0.125 or more"),
        ({"active_share": 1.5}, r"active_share\n .*less than or equal to 1 .*input_value=1.5"),
        ({"suppressed_share": 1.0}, "selector.suppressed_share: 1.0 of 8 blocks leaves one set"),
        ({"suppressed_share": 0.1}, "selector.suppressed_share: 0.1 of 8 blocks leaves one set"),
        ({"suppressed_share": 0.125, "probes": 9}, "selector.probes: 9, but 1 of 8 blocks .* make 8 different sets"),
        ({"probes": 1}, r"probes\n .*greater than or equal to 2 .*input_value=1,"),
        ({"suppression_factor": 1.1}, r"suppression_factor\n .*less than or equal to 1 .*input_value=1.1"),
        ({"update_every": 0}, r"update_every\n .*greater than or equal to 1 .*input_value=0"),
        ({"reward_rate": 0.0}, r"reward_rate\n .*greater than 0 .*input_value=0.0"),
    ],
)
def test_wrong_settings_are_refused_by_key(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Importance(seed=0, **settings).num_active(8)
