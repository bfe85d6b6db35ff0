"""Read the command line of launch/train.py: a recipe, `key=value` settings, a few options. Also write its help."""

import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic.fields import FieldInfo

from trainer.config.deepspeed.presets import presets
from trainer.config.errors import ConfigError, hint
from trainer.config.keys import Key, allowed, keys, union_members
from trainer.config.methods import METHODS
from trainer.config.schema import RunConfig
from trainer.config.text import in_short, quoted, whole_number

USAGE = "deepspeed launch/train.py [RECIPE.yaml] [key=value ...] [--dry-run] [--help]"

_SETTING = re.compile(r"^[A-Za-z_][\w.\-]*=")
TRAIN_OPTIONS = ("--dry-run", "--help", "--local_rank", "--local-rank", "--deepspeed", "--deepspeed_config")
# Options with a value, each with an example.
_VALUES = {
    "--local_rank": "0",
    "--local-rank": "0",
    "--deepspeed_config": "FILE",
    "--show": "3",
    "--html": "samples.html",
}
_WIDTH = 100


@dataclass(frozen=True)
class Command:
    """The user's request. `config_path` is None if neither a recipe nor a default one was given."""

    config_path: str | None = None
    overrides: tuple[str, ...] = ()
    dry_run: bool = False
    show: int = 0
    html: str | None = None
    show_help: bool = False


def parse_command_line(
    argv: Sequence[str], *, default_recipe: str | None = None, options: Sequence[str] = TRAIN_OPTIONS
) -> Command:
    """Read the arguments after the script's name. Raises ConfigError with all that are not understood.

    `options` are those of the command. The launchers' own --local_rank (or --local-rank) and --deepspeed are accepted
    and ignored; `--deepspeed_config FILE` sets the key `deepspeed`.
    """
    if wants_help(argv):  # even if other arguments are wrong
        return Command(config_path=default_recipe, show_help=True)
    recipes: list[str] = []
    overrides: list[str] = []
    problems: list[str] = []
    flags: set[str] = set()
    show, html = 0, None
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if option in options and option in _VALUES:
            if not equals:
                value = rest.pop(0) if rest and not rest[0].startswith("--") else ""
            if not value:
                problems.append(f"{option}: a value is missing, as in {option}={_VALUES[option]}")
            elif option == "--show":
                show = whole_number(value) or 0
                problems += [] if show else [f"--show: got {quoted(value)}; allowed: integer >= 1"]
            elif option == "--html":
                html = value
            elif option == "--deepspeed_config":
                overrides.append(f"deepspeed={json.dumps(value)}")
        elif word in options:
            flags.add(word)
        elif word.startswith("-"):
            problems.append(f"{in_short(word)}: unknown option{_option_advice(in_short(word), options)}")
        elif _SETTING.match(word):
            overrides.append(word)
        else:
            recipes.append(word)
    if len(recipes) > 1:
        named = in_short(", ".join(map(repr, recipes)), 500)
        problems.append(f"one recipe at a time: got {named}; settings are written key=value")
    if problems:
        raise ConfigError(problems)
    return Command(
        config_path=recipes[0] if recipes else default_recipe,
        overrides=tuple(overrides),
        dry_run="--dry-run" in flags,
        show=show,
        html=html,
    )


def wants_help(argv: Sequence[str]) -> bool:
    """Return whether help is asked for, anywhere in a command line."""
    return "--help" in argv or "-h" in argv


def _option_advice(word: str, options: Sequence[str]) -> str:
    name, _, value = word.lstrip("-").partition("=")
    paths = [key.path for key in keys(RunConfig) if "[]" not in key.path]
    meant = [path for path in dict.fromkeys(paths) if name in (path, path.rsplit(".", 1)[-1])]
    if meant:
        return f"; settings are written without dashes: {' or '.join(f'{path}={value}' for path in meant[:3])}"
    return hint(word.partition("=")[0], options) or f"; allowed: {', '.join(options)}"


def help_text() -> str:
    """Return usage and every key with its allowed values, default and meaning, in 100 columns."""
    blocks = [f"Usage: {USAGE}", _introduction(), *_method_lines(), "Settings"]
    shown: list[str] = []
    heading = None
    for key in keys(RunConfig):
        section = key.path.partition(".")[0] if "." in key.path else None
        if key.member and (section, key.member) != heading:
            shown.append(_member_heading(section or "", key))
        elif section != (heading or (None,))[0] and not key.member:
            shown.append("")
        heading = (section, key.member)
        if not (key.member and key.path.endswith(".name")):
            shown += _key_lines(key)
    return "\n\n".join(blocks) + "\n" + "\n".join(shown).rstrip() + "\n"


def _introduction() -> str:
    text = (
        "RECIPE.yaml contains the settings below, nested; without one, the built-in quick start runs. key=value "
        "settings override it: dotted keys, YAML 1.2 values, as in selector.blocks=4, data.eval=null or "
        "data.train=[{path: a.jsonl, weight: 2}, {path: b.csv, weight: 1}]. --dry-run checks "
        "everything, shows what each rank would store, and trains nothing."
    )
    return textwrap.fill(text, _WIDTH)


def _method_lines() -> Iterator[str]:
    lines = ["Methods (each part can be overridden key by key)"]
    for name, point in METHODS.items():
        parts = [f"{part} {_inline(values)}" for part, values in point.items()]
        lines += textwrap.wrap(f"{name:<6} {'; '.join(parts)}", _WIDTH, initial_indent="  ", subsequent_indent=" " * 9)
    yield "\n".join(lines)


def _inline(values: dict[str, object]) -> str:
    return "{" + ", ".join(f"{name}: {json.dumps(value).strip(chr(34))}" for name, value in values.items()) + "}"


def _member_heading(section: str, key: Key) -> str:
    model = union_members(RunConfig.model_fields[section].annotation)[key.member or ""]
    default = RunConfig.model_fields[section].default.name == key.member
    description = model.model_fields["name"].description
    text = f"{section}.name={key.member}{' (default)' if default else ''}: {description}"
    return "\n" + textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent=" " * 6)


def _key_lines(key: Key) -> list[str]:
    indent = 4 if key.member else 2
    values = allowed_text(key)
    head = f"{key.path}   {values}   {default_text(key.field)}"
    lines = textwrap.wrap(head, _WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 8))
    margin = " " * (indent + 4)
    return lines + textwrap.wrap(
        key.field.description or "", _WIDTH, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
    )


def allowed_text(key: Key) -> str:
    """Return the allowed values of a key, for its help."""
    return " | ".join([*presets(), "path"]) if key.path == "deepspeed" else allowed(key.field)


def default_text(info: FieldInfo) -> str:
    """Return the default of a key, for its help."""
    if info.is_required():
        return "(required)"
    value = list(info.default) if isinstance(info.default, tuple) else info.default
    return f"(default {value if isinstance(value, str) else json.dumps(value)})"
