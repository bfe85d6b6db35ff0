"""Selectors are pure, distinct, of constant size, and draw as the papers say."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from trainer.selectors import REGISTRY, build

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
        ("cyclic", {"blocks": 0}, "selector.blocks: 0; allowed: 1 to 8"),
        ("cyclic", {"order": "upwards"}, "selector.order: 'upwards'; allowed: ascending, descending, reshuffled"),
        ("fixed", {"blocks": [8]}, "allowed: distinct indices from -8 to 7"),
        ("fixed", {"blocks": [0, -8]}, "distinct"),
        ("fixed", {"blocks": []}, "at least one"),
        ("uniform", {"interval": 0}, "selector.interval: 0; allowed: 1 or more"),
        ("gradient", {}, "unknown selector 'gradient'; allowed: uniform, cyclic, fixed, all, importance"),
    ],
)
def test_wrong_settings_are_refused_by_key(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        build(name, seed=0, **settings).num_active(8)
