"""Read images from the parts of a message."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.data.formats.fields import braces, kind

# Stands in the content of a message for an image; a noncharacter, which no text contains.
MARK = "\ufdd0"
COLUMN = "images"  # those of a row, beside its messages
_KEYS = ("path", "url", "image", "base64")
_OPENAI = "image_url"
KEYS = (*_KEYS, _OPENAI, "detail")  # the last one tells a service how many tokens to spend
_NEEDED = f"{{type: image, {' | '.join(_KEYS)}}} is needed"
_INLINE = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Image:
    """An image as a row has it: the path of a file, as it is written there, or the bytes of one."""

    path: str | None = None
    data: bytes | None = None

    def __str__(self) -> str:
        return repr(self.path) if self.path is not None else "in the row"


def is_image(part: Any) -> bool:
    """Return whether a part of a message is an image, in transformers' spelling or OpenAI's."""
    return isinstance(part, Mapping) and part.get("type") in ("image", _OPENAI)


def read_image(part: Mapping[str, Any], key: str) -> Image:
    """Return the image of a part. Raises `ValueError`, about `key`, unless it has exactly one that can be read later
    without a network."""
    if part["type"] == _OPENAI:
        address = part.get(_OPENAI)
        part = {"url": address.get("url") if isinstance(address, Mapping) else address}
    given = _given(part)
    if len(given) != 1:
        raise ValueError(f"{key}: {braces(part)}, but {_NEEDED}, with one of these keys")
    name, value = given[0], part[given[0]]
    key = f"{key}.{name}"
    if name == "image" and isinstance(value, Mapping):  # as `datasets` stores images in tables
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return Image(data=value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key}: {kind(value)}, but {_NEEDED}")
    inline = _INLINE.match(value)
    if name == "base64" or inline:
        try:
            return Image(data=base64.b64decode(value[inline.end() if inline else 0 :], validate=True))
        except binascii.Error as error:
            raise ValueError(f"{key}: is not base64 ({error})") from error
    if re.match(r"[a-z][a-z0-9+.-]+://", value, re.IGNORECASE):
        if value.startswith("file://"):
            return Image(path=value.removeprefix("file://"))
        raise ValueError(f"{key}: {value[:100]!r} is not fetched; download the image and give its path")
    return Image(path=value)


def in_their_places(row: Mapping[str, Any], *columns: str) -> Mapping[str, Any]:
    """Return a row whose column `images`, as TRL has it, is in the parts {type: image} of the messages in `columns`, in
    order. Raises `ValueError` if there are more or fewer of them."""
    given = row.get(COLUMN)
    if given in (None, "", []):
        return row
    if not isinstance(given, list):
        given = [given]
    left = list(given)
    places = 0

    def filled(message: Any) -> Any:
        nonlocal places
        if not isinstance(message, Mapping):
            return message
        lists = {key: list(content) for key, content in message.items() if isinstance(content, list)}
        for parts in lists.values():
            for index, part in enumerate(parts):
                if isinstance(part, Mapping) and part.get("type") == "image" and not _given(part):
                    places += 1
                    if left:
                        parts[index] = {"type": "image", "image": left.pop(0)}
        return {**message, **lists}

    messages = {column: [filled(one) for one in row[column]] for column in columns if isinstance(row[column], list)}
    if places != len(given):
        raise ValueError(f"{COLUMN}: {len(given)}, but the messages have {places} parts {{type: image}} for them")
    return {**row, **messages}


def _given(part: Mapping[str, Any]) -> list[str]:
    return [name for name in _KEYS if part.get(name) not in (None, "")]
