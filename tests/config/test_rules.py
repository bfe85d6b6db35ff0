"""trainer/config/rules.py and the settings of update rules: what does not go together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest

from trainer.config.methods import expand_method
from trainer.config.rules import rule_problems
from trainer.settings.updates import REGISTRY, UpdateSettings

TRAIN = {"steps": 4, "global_batch_size": 4}
RUN: dict[str, Any] = {"model": {"path": "x"}, "data": {"train": "x.jsonl"}, "train": TRAIN}


class OwnSettings(UpdateSettings):
    """A rule with state of its own that does not clip."""

    implementation: ClassVar[str] = "trainer.updates.dense:Dense"
    own_state: ClassVar[bool] = True

    name: Literal["own"] = "own"


class ClippingSettings(OwnSettings):
    """The same, and it says that it clips."""

    clips: ClassVar[bool] = True


@pytest.fixture(autouse=True)
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "own", OwnSettings)
    monkeypatch.setitem(REGISTRY, "clipping", ClippingSettings)


def found(**values: Any) -> list[str]:
    return rule_problems(expand_method(RUN | values))


def test_a_rule_that_does_not_clip_is_told_so() -> None:
    (problem,) = found(update={"name": "own"})
    assert problem.startswith("train.gradient_clipping: ") and "update.name=own does not clip" in problem
    assert found(update={"name": "own"}, train={**TRAIN, "gradient_clipping": 0.0}) == []
    assert found(update={"name": "clipping"}) == found(update={"name": "dense"}) == []


def test_scaled_gradients_are_refused_for_state_of_its_own_alone() -> None:
    fp16 = {"path": "x", "dtype": "fp16"}
    (problem,) = found(update={"name": "clipping"}, model=fp16)
    assert problem.startswith("model.dtype: fp16") and "update.name=clipping" in problem
    assert found(update={"name": "dense"}, model=fp16) == []


@pytest.mark.parametrize(
    ("selector", "refused"),
    [
        ({"name": "all"}, False),
        ({"name": "fixed", "blocks": [0, -1]}, False),
        ({"name": "uniform"}, True),
        ({"name": "unknown"}, True),
        ({"name": ["fixed"]}, True),
    ],
)
def test_a_bank_and_8_bit_moments_are_refused_for_blocks_that_switch(selector: dict[str, Any], refused: bool) -> None:
    said = found(method="lora", selector=selector, bank={"name": "cpu"}, optimizer={"name": "adamw_8bit"})
    assert [line.partition(",")[0] for line in said] == ["bank.name: cpu"] * refused
    assert found(method="lora", selector=selector, bank={"name": "discard"}, optimizer={"name": "adamw_8bit"}) == []


@pytest.mark.parametrize(("seed", "problems"), [(5, 1), (None, 0)])
def test_the_seed_of_draws_is_the_run_s(seed: int | None, problems: int) -> None:
    selector = {"name": "uniform"} | ({} if seed is None else {"seed": seed})
    said = found(selector=selector)
    assert len(said) == problems and all(line.startswith("selector.seed: unknown key; set seed") for line in said)


@pytest.mark.parametrize(
    ("settings", "trained", "clipping", "words"),
    [
        (OwnSettings(), {}, 0.0, "OwnSettings.own_state is True, but for this model False"),
        (REGISTRY["dense"](), {"w": 1}, 0.0, "DenseSettings.own_state is False, but for this model True"),
        (ClippingSettings(), {"w": 1}, 0.0, "ClippingSettings.clips is True"),
        (ClippingSettings(), {"w": 1}, 1.0, None),
    ],
)
def test_settings_that_say_something_else_than_the_rule_does(
    settings: UpdateSettings, trained: dict[str, int], clipping: float, words: str | None
) -> None:
    from trainer.run.setup import _check_rule

    rule = SimpleNamespace(gradient_clipping=clipping)
    sparse: Any = SimpleNamespace(blocks=(1,), update=rule, trained_by_rule=lambda indices: trained)
    config: Any = SimpleNamespace(update=settings, train=SimpleNamespace(gradient_clipping=1.0))
    if words is None:
        _check_rule(config, sparse)
        return
    with pytest.raises(TypeError, match=words):
        _check_rule(config, sparse)


TOKENS = {"path": "x", "add_tokens": ["<call>"]}


def test_new_rows_need_new_tokens_and_a_rule_that_trains_them() -> None:
    (problem,) = found(always_on={"embeddings": "new_rows"})
    assert problem.startswith("always_on.embeddings: new_rows, but there are no new tokens; name them in model.add_tok")
    assert found(always_on={"embeddings": "new_rows"}, model=TOKENS) == []
    (problem,) = found(
        method="id3", always_on={"head": "new_rows"}, model=TOKENS, train={**TRAIN, "gradient_clipping": 0}
    )
    assert problem.startswith("always_on: new_rows, but update.name=unmask itself chooses the weights")
    adapter = {"name": "adapter", "peft": {"peft_type": "LORA", "target_modules": ["q_proj"]}}
    assert found(substrate=adapter, always_on={"embeddings": "new_rows"}, model=TOKENS) == []


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        ({"embeddings": "new_rows"}, ("new_rows", "new_rows")),
        ({"head": "new_rows"}, ("new_rows", "new_rows")),
        ({"embeddings": "new_rows", "head": True}, ("new_rows", True)),
        ({"embeddings": False, "head": "new_rows"}, (False, "new_rows")),
        ({"embeddings": True}, (True, True)),
        (None, (True, True)),
    ],
)
def test_new_rows_of_one_end_are_those_of_the_other_unless_it_is_set(given: Any, expanded: tuple[Any, Any]) -> None:
    always_on = expand_method(RUN | {"always_on": given})["always_on"]
    assert (always_on["embeddings"], always_on["head"], always_on["norm"]) == (*expanded, True)
