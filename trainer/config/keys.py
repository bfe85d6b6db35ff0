"""List the keys of nested configuration models: dotted paths and allowed values, for error messages and --help."""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


@dataclass(frozen=True)
class Key:
    """One setting. `member` is the `name` of the union member that has it (a selector, a bank), else None."""

    path: str
    field: FieldInfo
    member: str | None = None


def keys(model: type[BaseModel], prefix: str = "", member: str | None = None) -> list[Key]:
    """Return all leaf keys under `model`, in the order of declaration; the members of a union one after the other.

    The keys of a list's elements follow the list's own key, as `data.train[].path`.
    """
    found: list[Key] = []
    for name, field in fields(model).items():
        path = f"{prefix}{name}"
        members = union_members(field.annotation)
        if members:
            for tag, choice in members.items():
                found += keys(choice, f"{path}.", tag)
        elif is_model(field.annotation):
            found += keys(field.annotation, f"{path}.", member)
        else:
            found.append(Key(path, field, member))
            element = element_model(field.annotation)
            found += keys(element, f"{path}[].", member) if element else []
    return found


def fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a model by the names that they have in recipes, without those that recipes cannot set."""
    return {field.alias or name: field for name, field in model.model_fields.items() if not field.exclude}


def is_model(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Return whether the annotation is a section (a model) rather than a value."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def element_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a list's elements; None for any other annotation."""
    for choice in _alternatives(annotation):
        if get_origin(choice) is tuple and is_model(get_args(choice)[0]):
            return get_args(choice)[0]
    return None


def union_members(annotation: Any) -> dict[str, type[BaseModel]]:
    """Return the models of a union that is discriminated by `name`, by each name; empty for any other annotation."""
    choices = list(_alternatives(annotation))
    if len(choices) < 2 or not all(is_model(choice) for choice in choices):
        return {}
    return {choice.model_fields["name"].default: choice for choice in choices}


def allowed(field: FieldInfo) -> str:
    """Return the values that a field accepts, in words: `integer >= 1 | null`."""
    if union_members(field.annotation) or is_model(field.annotation):
        return "a mapping of keys to values"
    return _describe(field.annotation, field.metadata)


def literal_values(field: FieldInfo) -> list[str]:
    """Return the names that a field accepts, if it accepts a closed set of them."""
    return [
        value
        for choice in _alternatives(field.annotation)
        if get_origin(choice) is Literal
        for value in get_args(choice)
        if isinstance(value, str)
    ]


def _alternatives(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for choice in get_args(annotation):
            yield from _alternatives(choice)
    else:
        yield annotation


def _describe(annotation: Any, metadata: list[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [rule for info in arguments[1:] for rule in getattr(info, "metadata", [info])]
        return _describe(arguments[0], [*inner, *metadata])
    if origin in (Union, types.UnionType):
        return " | ".join(_describe(choice, metadata if choice is not type(None) else []) for choice in arguments)
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin is tuple and is_model(arguments[0]):
        return f"text | {{{', '.join(fields(arguments[0]))}}} | list of these"
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f" of {len(arguments)}"
        return f"list{count}, each {_describe(arguments[0], [])}"
    words = {int: "integer", float: "number", bool: "true | false", str: "text", type(None): "null"}
    return words.get(annotation, "mapping") + _bounds(metadata)


def _bounds(metadata: list[Any]) -> str:
    limits = [f"{sign} {getattr(rule, name):g}" for rule in metadata for name, sign in _BOUNDS if hasattr(rule, name)]
    return "".join(f" {limit}" if i == 0 else f" and {limit}" for i, limit in enumerate(limits))
