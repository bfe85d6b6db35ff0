"""The format `messages`: conversations of {role, content}."""

from functools import partial

from trainer.data.formats.conversations import conversation_format, read

FORMAT = conversation_format("messages", read=partial(read, column="messages"))
