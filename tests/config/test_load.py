"""trainer/config/: loading, methods, overrides, and every kind of user error."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.config.settings import config, problems, settings, write
from trainer.config import METHODS, ConfigError, dump, load
from trainer.config.methods import ALL_ON

ROOT = Path(__file__).resolve().parents[2]


# --- what a valid configuration holds ---


def test_imports_nothing_slow() -> None:
    code = (
        "import sys, trainer, trainer.config, trainer.config.deepspeed.resolve, trainer.config.deepspeed.buckets\n"
        "slow = {'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)\n"
        "print(sorted(slow), trainer.__version__)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] 0.1.0"


def test_package_names_what_it_does_not_have() -> None:
    import trainer

    with pytest.raises(AttributeError, match="prepar'; public names: .*prepare"):
        _ = trainer.prepar
    assert {"prepare", "Sparse"} <= set(dir(trainer))


@pytest.mark.usefixtures("folder")
def test_scientific_notation_is_a_number() -> None:
    assert config("optimizer.lr=2e-4", "optimizer.eps=1E-6").optimizer.lr == 2e-4


def test_file_and_overrides(folder: Path) -> None:
    path = write(folder / "run.yaml", "optimizer: {lr: 3e-5, weight_decay: 0.1}\neval:\nseed: 3\n")
    loaded = load(path, settings("optimizer.lr=1e-3"))
    assert (loaded.optimizer.lr, loaded.optimizer.weight_decay, loaded.seed) == (1e-3, 0.1, 3)


@pytest.mark.usefixtures("folder")
def test_the_configuration_does_not_change_afterwards() -> None:
    loaded = config()
    with pytest.raises(ValueError, match="frozen"):
        loaded.train.steps = 3


@pytest.mark.parametrize(
    ("method", "selector", "always_on"),
    [
        ("lisa", {"name": "uniform", "blocks": 2, "interval": 20}, True),
        ("badam", {"name": "cyclic", "blocks": 1, "interval": 100, "order": "reshuffled"}, False),
        ("full", {"name": "all", "interval": 20}, True),
        ("null", {"name": "uniform", "blocks": 2, "interval": 20}, True),
    ],
)
@pytest.mark.usefixtures("folder")
def test_method_expands_to_its_published_point(method: str, selector: dict, always_on: bool) -> None:
    loaded = config(f"method={method}")
    assert loaded.selector.model_dump() == selector
    assert loaded.always_on.model_dump() == {**dict.fromkeys(ALL_ON, always_on), "projector": False}
    assert (loaded.substrate.name, loaded.update.name, loaded.bank.name) == ("full", "dense", "discard")


@pytest.mark.usefixtures("folder")
def test_parts_of_a_method_can_be_overridden_key_by_key() -> None:
    loaded = config("method=badam", "selector.interval=7", "always_on.norm=true", "bank.name=cpu")
    assert (loaded.selector.interval, loaded.selector.order) == (7, "reshuffled")
    assert loaded.always_on.model_dump() == {"embeddings": False, "head": False, "norm": True, "projector": False}
    assert loaded.bank.name == "cpu"


@pytest.mark.usefixtures("folder")
def test_another_member_of_a_union_starts_from_its_own_defaults() -> None:
    loaded = config("method=lisa", "selector.name=cyclic")
    # Not lisa's two blocks every 20 steps.
    assert loaded.selector.model_dump() == {"name": "cyclic", "blocks": 1, "interval": 100, "order": "reshuffled"}


def test_another_member_keeps_what_the_user_gave(folder: Path) -> None:
    path = write(folder / "run.yaml", "method: lisa\nselector: {name: cyclic, interval: 7, order: ascending}\n")
    loaded = load(path, settings("selector.name=uniform"))
    assert loaded.selector.model_dump() == {"name": "uniform", "blocks": 2, "interval": 7}


def test_another_method_on_the_command_line_wins_over_the_parts_of_a_saved_run(folder: Path) -> None:
    path = write(folder / "saved.yaml", dump(config("method=lisa", "selector.blocks=4")))
    loaded = load(path, ["method=badam", "selector.interval=50"])
    assert (loaded.selector.name, loaded.selector.blocks, loaded.selector.interval) == ("cyclic", 1, 50)
    assert load(path, ["method=lisa"]).selector.blocks == 4


@pytest.mark.parametrize("method", [*METHODS, "null"])
def test_dump_loads_back_to_an_equal_configuration(folder: Path, method: str) -> None:
    original = config(
        f"method={method}", "data.eval=eval.jsonl", "optimizer.lr=1e-4", "output='1e5'", "model.blocks=modèle", "seed=7"
    )
    text = dump(original)
    assert load(write(folder / "config.yaml", text), []) == original
    assert f"name: {original.selector.name}" in text and f"path: {folder / 'train.jsonl'}" in text
    assert "modèle" in text


def test_dump_loads_back_the_fixed_selector(folder: Path) -> None:
    original = config("selector={name: fixed, blocks: [0, -1]}")
    assert original.selector.blocks == (0, -1)
    assert load(write(folder / "config.yaml", dump(original)), []) == original


@pytest.mark.parametrize("override", ["seed", "=3", "train..steps=3", "train.=3", "a b =3"])
@pytest.mark.usefixtures("folder")
def test_malformed_overrides(override: str) -> None:
    assert problems(override) == [f"override {override!r}: it must read key=value, such as selector.blocks=4"]


@pytest.mark.usefixtures("folder")
def test_an_override_that_is_no_yaml() -> None:
    assert problems("selector.blocks=[0, 1")[0].startswith("selector.blocks: got '[0, 1', which is not YAML")


# --- values and keys that are refused ---


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=1e-4", "lr: unknown key; did you mean optimizer.lr?"),
        ("optimizer.lrr=1", "optimizer.lrr: unknown key; nearest: 'optimizer.lr'"),
        ("modle.path=x", "modle: unknown key; nearest: 'model'"),
        ("gradient_cliping=1", "gradient_cliping: unknown key; nearest: 'train.gradient_clipping'"),
        ("zzz=1", "zzz: unknown key; known here: method, seed"),
        (
            "selector.order=ascending",
            "selector.order: unknown key for selector uniform; did you mean selector.order (with selector.name=",
        ),
        (
            "selector.name=unform",
            "selector.name: got 'unform'; allowed: uniform | cyclic | fixed | all | importance; nearest: 'uniform'",
        ),
        ("bank.name=gpu", "bank.name: got 'gpu'; allowed: discard | device | cpu"),
        ("method=lsia", "method: got 'lsia'; allowed: lisa | badam | ist | id3 | lora | full | null; nearest: 'lisa'"),
        ("update.name=unmusk", "update.name: got 'unmusk'; allowed: dense | unmask; nearest: 'unmask'"),
        ("schedule.name=cosin", "schedule.name: got 'cosin'; allowed: linear | cosine"),
        ("deepspeed=zero33", "deepspeed: got 'zero33'; allowed: zero0 | zero1"),
        ("selector.interval=0", "selector.interval (of selector uniform): got 0; allowed: integer >= 1"),
        ("selector=uniform", "selector: got 'uniform'; it takes keys of its own, such as selector.name"),
        ("optimizer=adamw", "optimizer: got 'adamw'; it takes keys of its own, such as optimizer.name"),
        ("train.steps=ten", "train.steps: got 'ten'; allowed: integer >= 1 | null"),
        ("train.steps=true", "train.steps: got true; allowed: integer >= 1 | null"),
        ("train.micro_batch_size=1.5", "train.micro_batch_size: got 1.5; allowed: integer >= 1"),
        ("model.activation_checkpointing=1", "model.activation_checkpointing: got 1; allowed: true | false"),
        ("optimizer.lr=0", "optimizer.lr: got 0; allowed: number > 0"),
        ("optimizer.lr=.inf", "optimizer.lr: got inf; allowed: number > 0"),
        ("optimizer.eps=-1e-8", "optimizer.eps: got -1e-08; allowed: number > 0"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas: got 1.0; allowed: list of 2, each number >= 0 and < 1"),
        ("optimizer.lr_always_on=0", "optimizer.lr_always_on: got 0; allowed: number > 0 | null"),
        ("data.eval_fraction=1", "data.eval_fraction: got 1; allowed: number >= 0 and < 1"),
        (
            "data.train=",
            "data.train: got null; allowed: text | {path, format, subset, split, ignore, weight} | list of these",
        ),
        ("data.train=[]", "data.train: got an empty list; name at least one source"),
        ("data.train=[train.jsonl, 5]", "data.train[1]: got 5; allowed: text | {path, "),
        ("data.train={path: train.jsonl, wait: 2}", "data.train[0].wait: unknown key; nearest: 'data.train[0].weight'"),
        ("data.train={path: train.jsonl, weight: 0}", "data.train[0].weight: got 0; allowed: number > 0 | null"),
        (
            "data.train={path: train.jsonl, format: aplaca}",
            "data.train[0].format: got 'aplaca'; allowed: auto | alpaca",
        ),
        ("data.train={path: train.jsonl, split: test}", "data.train: split 'test' of the file"),
        (
            "data.eval={path: eval.jsonl, weight: 1}",
            "data.eval[0].weight: unknown key; did you mean data.train[].weight",
        ),
        (
            "data.train=[train.jsonl, {path: eval.jsonl, weight: 2}]",
            "data.train: weight given for 1 of 2 sources; give",
        ),
        ("data.packing=1", "data.packing: got 1; allowed: true | false"),
        ("seed=-1", "seed: got -1; allowed: integer >= 0"),
        ("selector={name: fixed, blocks: [1, 1]}", "selector.blocks: got [1, 1]; name each block at most once"),
        ("selector={name: fixed, blocks: []}", "selector.blocks: got an empty list"),
        ("selector={name: fixed}", "selector.blocks: missing; allowed: list, each integer"),
        ("model.random={hidden_size: 3}", "model.random: got keys ['hidden_size'] without model_type"),
        ("model.path=a/b", "model.path, model.random: both given; set exactly one of them"),
        ("train.epochs=1", "train.steps, train.epochs: both given; set exactly one of them"),
        ("train.micro_batch_size=3", "train.micro_batch_size: 3 does not divide train.global_batch_size 8"),
        ("eval.every=10", "eval.every: no evaluation data"),
        ("schedule.warmup_steps=101", "schedule.warmup_steps: 101 is more than train.steps 100"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_refused(override: str, message: str) -> None:
    (found,) = problems(override)
    assert found.startswith(message)


@pytest.mark.usefixtures("folder")
def test_contradictions_of_two_keys() -> None:
    assert problems("schedule.warmup_steps=0", "schedule.warmup_ratio=0.1")[0].startswith(
        "schedule.warmup_steps, sched"
    )
    assert problems("schedule.name=constant", "schedule.warmup_ratio=0.1")[0].startswith(
        "schedule.name: constant has no"
    )
    assert problems("schedule.name=polynomial", "optimizer.lr=1e-7")[0].startswith("optimizer.lr: got 1e-07")
    assert problems("data.eval=eval.jsonl", "data.eval_fraction=0.1")[0].startswith(
        "data.eval, data.eval_fraction: got"
    )
    assert config("eval.every=10", "data.eval_fraction=0.1").eval.every == 10


@pytest.mark.usefixtures("folder")
def test_id3_is_its_published_point_and_says_what_it_cannot_do() -> None:
    published = config("method=id3")
    assert published.selector.name == "all" and published.always_on.embeddings and published.bank.name == "device"
    point = {
        "name": "unmask",
        "budget": 100_000,
        "exp": 0.0,
        "eps": 1e-3,
        "growth_steps": None,
        "bias_correction": "global",
    }
    assert published.update.model_dump() == point
    inside = config("method=badam", "update={name: unmask, budget: 50}")
    assert (inside.selector.name, inside.update.budget, inside.bank.name) == ("cyclic", 50, "discard")
    for override, message in (
        ("update.budget=0", "update.budget (of update unmask): got 0; allowed: integer >= 1"),
        ("update.exp=-1", "update.exp (of update unmask): got -1; allowed: number >= 0"),
        ("update.eps=-1e-3", "update.eps (of update unmask): got -0.001; allowed: number >= 0"),
        ("update.growth_steps=101", "update.growth_steps: 101 is more than train.steps 100"),
        ("model.dtype=fp16", "model.dtype: fp16, but gradients of fp16 are scaled"),
        ("bank.name=cpu", "bank.name: cpu, but the state of update.name=unmask is small"),
        ("optimizer.name=adamw_8bit", "optimizer.name: adamw_8bit, but the state of update.name=unmask is small"),
        ("optimizer.lr_always_on=1e-3", "optimizer.lr_always_on: 0.001, but update.name=unmask trains all weights"),
    ):
        found = problems("method=id3", override)
        assert found and all(problem.startswith(message) for problem in found[:1]), found


@pytest.mark.usefixtures("folder")
def test_missing_keys_are_named_in_full() -> None:
    with pytest.raises(ConfigError) as error:
        load(None, [])
    assert error.value.problems == [
        "train.global_batch_size: missing; allowed: integer >= 1",
        "data.train: missing; allowed: text | {path, format, subset, split, ignore, weight} | list of these",
        "model.path, model.random: neither given; set exactly one of them",
        "train.steps, train.epochs: neither given; set exactly one of them",
    ]


@pytest.mark.usefixtures("folder")
def test_all_problems_at_once() -> None:
    found = problems(
        "lr=1", "train.steps=ten", "train.epochs=2", "data.train=trian.jsonl", "deepspeed=x", "output=train.jsonl"
    )
    starts = [
        "train.steps: got",
        "lr: unknown",
        "train.steps, train.epochs: both",
        "data.train: no such",
        "output:",
        "deepspeed:",
    ]
    assert [next(p for p in found if p.startswith(start)) for start in starts] == found


def test_config_error_survives_pickling_and_lists_its_problems() -> None:
    error = pickle.loads(pickle.dumps(ConfigError(["a: b", "c: d"])))
    assert error.problems == ["a: b", "c: d"]
    assert str(error) == "2 problems in the configuration:\n  - a: b\n  - c: d"


def test_tensorboard_must_be_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert problems("monitor.tensorboard=true")[0].startswith("monitor.tensorboard: got true")


def test_the_current_directory_is_untouched(folder: Path) -> None:
    before = sorted(os.listdir(folder))
    config()
    assert sorted(os.listdir(folder)) == before
