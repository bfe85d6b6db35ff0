"""The format `text`: plain text, all of which is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.formats.base import Format, Row
from trainer.data.formats.fields import answer


def read(where: str, values: Mapping[str, Any]) -> Row:
    return Row(where, answer=answer(values["text"], "text"), verbatim=True)


FORMAT = Format(("text",), read, texts=("text",))
