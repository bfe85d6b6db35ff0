"""The format `sharegpt`: conversations of {from, value}."""

from functools import partial

from trainer.data.formats.conversations import conversation_format, read

FORMAT = conversation_format("conversations", read=partial(read, column="conversations"), spelling="conversations")
