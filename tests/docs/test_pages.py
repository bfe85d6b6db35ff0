"""What the README and docs/ say can be done: links, commands, recipes, code."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import PAGES, ROOT, Block, all_blocks, anchors, prose
from tests.launching import RECIPES
from trainer.cli.main import COMMANDS, main
from trainer.config import ConfigError, load, parse_command_line
from trainer.config.deepspeed.presets import PRESETS
from trainer.config.page import configuration_page

ids = str  # of blocks: where they are
MODEL = ["model.path=null", "model.random={model_type: llama}", "model.tokenizer=bytes"]
NOT_HERE = ("no such file", "no such folder")  # what a page may name and a checkout lacks


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_configuration_page_is_what_the_schema_says() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == configuration_page(), (
        "run: python -m trainer.config.page > docs/configuration.md"
    )


def test_the_table_of_presets_is_what_their_descriptions_say() -> None:
    table = "".join(f"| `{name}` | {text} |\n" for name, text in PRESETS.items())
    assert (
        f"| preset | what it does |\n| --- | --- |\n{table}\n" in (ROOT / "docs" / "memory-and-machines.md").read_text()
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(other), f"{page.name}: {target}"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            names = re.findall(r"\]\(([^)#\s]+\.md)[)#]", prose(page))
            waiting += [(page.parent / name).resolve() for name in names if not name.startswith("http")]
    assert set(PAGES) <= reached


# --- commands --------------------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[Block, list[str]]]:
    for block in all_blocks("bash") + all_blocks("console"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                yield block, words


def _refused(words: list[str], *, default: Path | None = None) -> list[str]:
    """Problems of a recipe and settings, but for files that are not here."""
    words = ["runs/recipe.yaml" if "..." in word or word.isupper() else word for word in words]
    known = [word for word in words if not (word.endswith(".yaml") and not (ROOT / word).exists())]
    settings = [re.sub(r"=(\.\.\.|[A-Z]+)$", "=x", word) for word in known]
    command = parse_command_line(settings, default_recipe=str(default or RECIPES[0]))
    overrides = [*(MODEL if "quickstart" not in str(command.config_path) else []), *command.overrides]
    if any(value.startswith("model.path=") for value in command.overrides):
        overrides += ["model.random=null", "model.tokenizer=null"]
    try:
        load(command.config_path, overrides)
    except ConfigError as error:
        return [problem for problem in error.problems if not any(words in problem for words in NOT_HERE)]
    return []


@pytest.mark.parametrize(("block", "words"), list(commands()), ids=ids)
def test_commands_exist_and_their_settings_too(
    block: Block, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables
        words = words[1:]
    program = words[0]
    if "launch/train.py" in words:
        after = words[words.index("launch/train.py") + 1 :]
        assert _refused(after, default=ROOT / "launch/recipes/quickstart.yaml") == [] or "--help" in after
        return
    if "trainer" in words and words[words.index("trainer") - 1] == "-m":
        name, *after = words[words.index("trainer") + 1 :]
        assert name in COMMANDS, name
        if name in ("train", "prepare"):
            assert "--help" in after or _refused([w for w in after if not re.fullmatch(r"--show|\d+", w)]) == []
            return
        with suppress(SystemExit):  # some commands' parsers leave
            assert main([name, "--help"]) == 0
        described = capsys.readouterr().out
        for option in (word.partition("=")[0] for word in after if word.startswith("--")):
            assert option in described, f"{name} {option}"
        return
    if program == "make":
        target = next(word for word in words[1:] if "=" not in word)
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
        return
    if program == "pip":
        extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
        for word in words:
            for extra in re.findall(r"\[([\w,]+)\]", word):
                assert set(extra.split(",")) <= extras, word
        return
    for script in (word for word in words if word.endswith(".py")):
        source = ROOT / script
        assert source.exists(), script
        options = {word.partition("=")[0] for word in words[words.index(script) :] if word.startswith("--")}
        for option in options - {"--help"}:
            assert option in source.read_text() + (ROOT / "benchmarks" / "common.py").read_text(), option


# --- recipes and code ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=ids)
def test_recipes_load(block: Block, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(block.text)
    given = yaml.safe_load(block.text)
    values = [] if "train" in (given.get("data") or {}) else ["data.train=x.jsonl"]
    values += [] if "path" in (given.get("model") or {}) else MODEL[1:]
    values += [] if {"steps", "epochs"} & (given.get("train") or {}).keys() else ["train.steps=1000"]
    values += [] if "global_batch_size" in (given.get("train") or {}) else ["train.global_batch_size=8"]
    with pytest.raises(ConfigError) as refused:
        load(str(recipe), [*values, "seed=-1"])  # so that something is always refused, and the rest is listed
    rest = [p for p in refused.value.problems if not p.startswith("seed:") and not any(w in p for w in NOT_HERE)]
    assert rest == []


@pytest.mark.parametrize("block", all_blocks("python"), ids=ids)
def test_code_names_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainer"):
            module = importlib.import_module(node.module or "")
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
