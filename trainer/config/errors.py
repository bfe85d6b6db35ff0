"""Define ConfigError and write its messages: the value received, what is allowed, the key to change."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from trainer.config.keys import Key, allowed, element_model, fields, is_model, keys, literal_values, union_members
from trainer.config.text import in_short, printable, quoted
from trainer.errors import StrataError

# The most problems of a list that are shown, and characters of one. Hundreds of problems are usually the same one.
MOST_SHOWN = 30
_LONGEST_PROBLEM = 2000
# The longest word that is compared with known ones: no key is as long.
_LONGEST_WORD = 100


class ConfigError(StrataError, ValueError):
    """Raised if the configuration asks for something impossible; `problems` lists everything that is wrong."""

    def __init__(self, problems: Sequence[str]):
        self.problems = [in_short(printable(problem, keep=""), _LONGEST_PROBLEM) for problem in problems]
        super().__init__(self.problems)

    def __str__(self) -> str:
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''} in the configuration"
        lines = [f"{count}:", *(f"  - {problem}" for problem in self.problems[:MOST_SHOWN])]
        if len(self.problems) > MOST_SHOWN:
            lines.append(f"  and {len(self.problems) - MOST_SHOWN:,} more")
        return "\n".join(lines)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word most similar to `word`, or None if none is similar."""
    if len(word) > _LONGEST_WORD:
        return None
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?`, or an empty string."""
    match = nearest(word, known)
    return f", did you mean '{match}'?" if match else ""


def hint(word: str, known: Iterable[str]) -> str:
    """Return `; nearest: 'x'`, or an empty string."""
    match = nearest(word, known)
    return f"; nearest: {match!r}" if match else ""


def validation_problems(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Return a sentence for each error that pydantic found in the fields of `root`.

    Errors of validators of `root` as a whole (an empty location) are left out: the caller reports those itself.
    """
    found = [entry for entry in error.errors() if entry["loc"]]
    # Searching for keys similar to thousands of others would take minutes, and only the first problems are shown.
    return [_field_problem(entry, root) for entry in found[:MOST_SHOWN]] + [
        f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in found[MOST_SHOWN:]
    ]


def _field_problem(entry: Any, root: type[BaseModel]) -> str:
    path, field, owner, member = _locate(entry["loc"], root)
    dotted, value = ".".join(path), entry["input"]
    if field is None or entry["type"] == "extra_forbidden":
        return _unknown_key(path, owner, member, root)
    if entry["type"] == "missing":
        return f"{dotted}: missing; allowed: {allowed(field)}"
    if entry["type"] == "union_tag_invalid":
        names = list(union_members(field.annotation))
        name = value.get("name") if isinstance(value, dict) else value
        return f"{dotted}.name: got {quoted(name)}; allowed: {' | '.join(names)}{hint(str(name), names)}"
    if is_model(field.annotation) or union_members(field.annotation):
        return f"{dotted}: got {quoted(value)}; it takes keys of its own, such as {dotted}.{_some_key(field)}"
    if entry["type"] == "value_error":
        return f"{dotted}: {entry['ctx']['error']}"
    where = f" (of {'.'.join(path[:-1])} {member})" if member else ""
    suggestion = hint(value, literal_values(field)) if isinstance(value, str) else ""
    return f"{dotted}{where}: got {quoted(value)}; allowed: {allowed(field)}{suggestion}"


def _locate(
    loc: Sequence[int | str], root: type[BaseModel]
) -> tuple[list[str], FieldInfo | None, type[BaseModel], str | None]:
    """Return (path, field, model that contains it, union member) of an error location.

    A location names the members of unions between the keys. The field is None if the key is unknown.
    """
    path: list[str] = []
    field: FieldInfo | None = None
    owner, member, parts = root, None, list(loc)
    while parts:
        name = str(parts.pop(0))
        path.append(name)
        field = fields(owner).get(name)
        if field is None or not parts:
            break
        members = union_members(field.annotation)
        if members:
            member = str(parts.pop(0))
            if not parts:
                break
            owner = members[member]
        elif is_model(field.annotation):
            owner = field.annotation
        elif (element := element_model(field.annotation)) and isinstance(parts[0], int):
            path[-1] += f"[{parts.pop(0)}]"
            owner = element
        else:
            break
    return path, field, owner, member


def _unknown_key(path: list[str], owner: type[BaseModel], member: str | None, root: type[BaseModel]) -> str:
    """Suggest the nearest key in the same section, then the same name elsewhere, then the nearest name anywhere."""
    name, section = path[-1], ".".join(path[:-1])
    siblings = list(fields(owner))
    everywhere = keys(root)
    elsewhere = [key for key in everywhere if key.path.rsplit(".", 1)[-1] == name]
    match = nearest(name, siblings)
    if match:
        advice = f"nearest: {'.'.join([*path[:-1], match])!r}"
    elif elsewhere:
        locations = dict.fromkeys(_location(key) for key in elsewhere)
        advice = f"did you mean {' or '.join(list(locations)[:4])}?"
    else:
        by_leaf = {key.path.rsplit(".", 1)[-1]: key.path for key in everywhere}
        match = nearest(name, by_leaf)
        advice = f"nearest: {by_leaf[match]!r}" if match else f"known here: {', '.join(siblings)}"
    scope = f" for {section} {member}" if member else ""
    return f"{'.'.join(path)}: unknown key{scope}; {advice}"


def _location(key: Key) -> str:
    return f"{key.path} (with {key.path.rpartition('.')[0]}.name={key.member})" if key.member else key.path


def _some_key(field: FieldInfo) -> str:
    members = union_members(field.annotation)
    model = next(iter(members.values())) if members else field.annotation
    assert is_model(model), model
    return next(iter(fields(model)))
