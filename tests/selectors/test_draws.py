"""Selectors are pure, distinct, of constant size, and draw as the papers say."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from trainer.selectors import REGISTRY, Selector, build

SETTINGS: dict[str, dict[str, Any]] = {
    "uniform": {"blocks": 3, "interval": 5},
    "cyclic": {"blocks": 3, "interval": 5},
    "fixed": {"blocks": [0, -1, 4], "interval": 5},
    "all": {"interval": 5},
    "importance": {"interval": 5},
}


@pytest.mark.parametrize("name", REGISTRY)
def test_a_draw_is_pure_distinct_and_of_constant_size(name: str) -> None:
    first, second = (build(name, seed=3, **SETTINGS[name]) for _ in range(2))
    forwards = [first.select(i, 8) for i in range(40)]
    backwards = [second.select(i, 8) for i in reversed(range(40))][::-1]
    assert forwards == backwards
    for drawn in forwards:
        assert len(drawn) == len(set(drawn)) == first.num_active(8)
        assert list(drawn) == sorted(drawn) and set(drawn) <= set(range(8))


@pytest.mark.parametrize("name", REGISTRY)
def test_constant_says_whether_the_same_blocks_train_throughout(name: str) -> None:
    selector = build(name, seed=3, **SETTINGS[name])
    assert selector.constant == (len({selector.select(i, 8) for i in range(40)}) == 1) == (not selector.changes(8))


def test_another_process_draws_the_same() -> None:
    draw = "s = build('uniform', seed=3, blocks=3); print([s.select(i, 8) for i in range(5)])"
    code = f"from trainer.selectors import build; {draw}"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    selector = build("uniform", seed=3, blocks=3)
    assert printed.strip() == str([selector.select(i, 8) for i in range(5)])


def test_uniform_is_uniform_and_depends_on_the_seed() -> None:
    selector = build("uniform", seed=0, blocks=2)
    counts = Counter(block for i in range(4000) for block in selector.select(i, 8))
    assert all(900 < counts[block] < 1100 for block in range(8))  # 1000 expected, 27 one standard deviation
    other = build("uniform", seed=1, blocks=2)
    assert [selector.select(i, 8) for i in range(9)] != [other.select(i, 8) for i in range(9)]


def test_cyclic_orders() -> None:
    ascending = build("cyclic", seed=0, blocks=1, order="ascending")
    assert [ascending.select(i, 4) for i in range(5)] == [(0,), (1,), (2,), (3,), (0,)]
    descending = build("cyclic", seed=0, blocks=2, order="descending")
    assert [descending.select(i, 5) for i in range(4)] == [(3, 4), (1, 2), (0, 4), (3, 4)]
    reshuffled = build("cyclic", seed=0, blocks=1, order="reshuffled")
    rounds = [tuple(reshuffled.select(r * 6 + i, 6)[0] for i in range(6)) for r in range(4)]
    assert all(sorted(one) == list(range(6)) for one in rounds) and len(set(rounds)) > 1


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("uniform", {"blocks": 9}, "selector.blocks: 9; allowed: 1 to 8"),
        ("cyclic", {"blocks": 0}, "blocks\n .*greater than or equal to 1 .*input_value=0"),
        ("cyclic", {"order": "upwards"}, "order\n .*'ascending', 'descending' or 'reshuffled' .*input_value='upwards'"),
        ("fixed", {"blocks": [8]}, "allowed: distinct indices from -8 to 7"),
        ("fixed", {"blocks": [0, -8]}, "distinct"),
        ("fixed", {"blocks": []}, "at least one"),
        ("uniform", {"interval": 0}, "interval\n .*greater than or equal to 1 .*input_value=0"),
        ("uniform", {"block": 2}, "block\n .*not permitted"),
        ("gradient", {}, "unknown selector 'gradient'; allowed: uniform, cyclic, fixed, all, importance"),
    ],
)
def test_wrong_settings_are_refused_by_key(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        build(name, seed=0, **settings).num_active(8)


def test_settings_do_not_change_and_other_attributes_may() -> None:
    selector = build("uniform", blocks=3, seed=1)
    with pytest.raises(ValueError, match="frozen"):
        selector.blocks = 4
    selector.seen = [1]
    assert selector.seen == [1] and selector.select(0, 8) == build("uniform", blocks=3, seed=1).select(0, 8)


def test_a_seeded_copy_draws_from_its_seed_and_has_learned_nothing() -> None:
    learned = build("importance", interval=5)
    learned.load_state_dict({"dispensability": [5.0, 0.0, 0.0, 0.0]})
    copy = learned.seeded(7)
    assert (copy.seed, copy.interval, copy.importance()) == (7, 5, None)
    assert learned.importance() == (-5.0, 0.0, 0.0, 0.0) and "seed" not in copy.model_dump()


def test_any_seed_of_a_run_and_numbers_of_numpy_are_accepted() -> None:
    assert build("uniform", seed=2**62, blocks=2).seeded(2**63 - 1).select(0, 8) != ()
    given = build("uniform", seed=np.int64(3), blocks=np.int64(3))
    assert [given.select(i, 8) for i in range(5)] == [build("uniform", seed=3, blocks=3).select(i, 8) for i in range(5)]
    assert build("fixed", blocks=np.array([0, -1])).select(0, 8) == (0, 7)


class Listed(Selector):
    """Written before selectors were settings: attributes of its own, before and after the base's."""

    measures = True

    def __init__(self, *blocks: int) -> None:
        self.blocks = blocks
        super().__init__(interval=2, seed=5)
        self.seen = 0

    def num_active(self, num_blocks: int) -> int:
        return 1

    def select(self, interval: int, num_blocks: int) -> tuple[int, ...]:
        self.seen += 1
        return (self.blocks[interval % len(self.blocks)],)


def test_a_selector_with_attributes_of_its_own_works() -> None:
    selector = Listed(3, 1)
    assert [selector.select(i, 8) for i in range(3)] == [(3,), (1,), (3,)]
    assert (selector.interval, selector.seed, selector.seen, selector.measures) == (2, 5, 3, True)


def test_neither_numpy_nor_torch_is_imported_before_a_command_has_set_its_threads_up() -> None:
    code = "import sys, trainer.cli.train; print({'numpy', 'torch'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "set()\n"
