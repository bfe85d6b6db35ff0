"""trainer/config/command_line.py: arguments of launch/train.py, launchers' arguments, help."""

import pytest

from trainer.config import METHODS, Command, ConfigError, RunConfig, help_text, load, parse_command_line
from trainer.config.deepspeed.presets import presets
from trainer.config.keys import keys


def test_recipe_settings_and_options_in_any_order() -> None:
    command = parse_command_line(["--dry-run", "lr=1", "run.yaml", "selector.blocks=[0,1]"])
    assert command == Command("run.yaml", ("lr=1", "selector.blocks=[0,1]"), dry_run=True)


def test_default_recipe() -> None:
    assert parse_command_line([]).config_path is None
    assert parse_command_line(["a=1"], default_recipe="quick.yaml").config_path == "quick.yaml"
    assert parse_command_line(["b.yaml"], default_recipe="quick.yaml").config_path == "b.yaml"


def test_another_command_has_options_of_its_own() -> None:
    assert parse_command_line(["run.yaml", "--show", "3"], options=("--show",)) == Command("run.yaml", show=3)
    with pytest.raises(ConfigError, match="--dry-run: unknown option; allowed: --show"):
        parse_command_line(["--dry-run"], options=("--show",))


def test_a_path_may_hold_an_equals_sign() -> None:
    assert parse_command_line(["./lr=1/run.yaml"]).config_path == "./lr=1/run.yaml"


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("before", [[], ["--no-such-option", "a.yaml", "b.yaml"], ["--show"], ["train.steps=0"]])
def test_help_option(option: str, before: list[str]) -> None:
    """Wherever it stands, and whatever else is wrong."""
    assert parse_command_line([*before, option]).show_help
    assert parse_command_line([option, *before]).show_help


@pytest.mark.parametrize(
    "launcher", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"], ["--deepspeed"], ["--local-rank", "0"]]
)
def test_arguments_of_launchers_change_nothing(launcher: list[str]) -> None:
    assert parse_command_line([*launcher, "run.yaml"]) == Command("run.yaml")


@pytest.mark.parametrize("given", [["--deepspeed_config", "my ds: 1.json"], ["--deepspeed_config=my ds: 1.json"]])
def test_deepspeed_config_names_the_json(given: list[str]) -> None:
    command = parse_command_line(["--deepspeed", *given])
    values = ["model.path=a/b", "train.steps=1", "train.global_batch_size=1", "data.train=x"]
    assert load(None, [*command.overrides, *values], check_files=False).deepspeed == "my ds: 1.json"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dry_run"], "--dry_run: unknown option; nearest: '--dry-run'"),
        (["--steps=5"], "--steps=5: unknown option; settings are written without dashes: train.steps=5"),
        (
            ["--selector.blocks=5"],
            "--selector.blocks=5: unknown option; settings are written without dashes: selector.blocks=5",
        ),
        (["--zzz"], "--zzz: unknown option; allowed: --dry-run, --help"),
        (["--deepspeed_config"], "--deepspeed_config: a value is missing"),
        (["--show=²"], "--show=²: unknown option"),
        (["--local_rank", "--dry-run"], "--local_rank: a value is missing"),
        (["a.yaml", "steps"], "one recipe at a time: got 'a.yaml', 'steps'; settings are written key=value"),
    ],
)
def test_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_command_line(argv)
    (found,) = error.value.problems
    assert found.startswith(message)


@pytest.mark.parametrize("number", ["²", "٣", "0", "-1", "9" * 5000])
def test_numbers_of_options_are_plain_digits(number: str) -> None:
    with pytest.raises(ConfigError, match="--show: got .*; allowed: integer >= 1"):
        parse_command_line([f"--show={number}"], options=("--show",))


def test_all_problems_of_the_command_line_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse_command_line(["--one", "--two", "a.yaml", "b.yaml"])
    assert len(error.value.problems) == 3


def test_help_lists_every_key_method_member_and_preset_within_100_columns() -> None:
    text = help_text()
    assert max(map(len, text.splitlines())) <= 100
    flat = " ".join(text.split())
    for key in keys(RunConfig):
        if key.member and key.path.endswith(".name"):
            assert f"{key.path}={key.member}" in flat
        else:
            assert f" {key.path} " in flat, key.path
        assert key.field.description in flat
    for name in [*METHODS, *presets()]:
        assert f" {name} " in flat
    assert "train.global_batch_size integer >= 1 (required)" in flat
    assert "optimizer.lr number > 0 (default 2e-05)" in flat
    assert "selector.name=uniform (default):" in flat and "selector.name=cyclic:" in flat
