"""Load tokenizers: the byte-level one that Strata ships, or one of a model folder or the Hub."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.errors import DataError, in_short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from trainer.config import ModelConfig

BYTES = "bytes"
PAD, EOS = "<|pad|>", "<|eos|>"
ROLE_MARKS = ("<|system|>", "<|user|>", "<|assistant|>")
TOKENIZER_KEY = "model.tokenizer"
ADD_TOKENS_KEY = "model.add_tokens"
_NEW_IDS = "strata_new_ids"  # an attribute of tokenizers
HUB_TIMEOUT_SECONDS = 10
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Reveals what a tokenizer does to case, accents, digits, spaces and special tokens.
PROBE_TEXT = "It's A\u00c4a\u00e4 e\u0301 \ufb01 1234,56  \t\n \u6771\u4eac \U0001f389 <s> [SEP]"

# The end of text is inside the generation marks, because a model that never trains on it never stops. Tools, calls and
# answers of tools are written as text, as in Qwen's templates: the vocabulary has no tokens for them.
CHAT_TEMPLATE = """\
{%- if tools -%}
    {{- '<|system|>Tools: ' + tools | tojson -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<|assistant|>' -}}
        {%- generation -%}
            {{- message['content'] -}}
            {%- for call in message['tool_calls'] or [] -%}
                {{- '<tool_call>' + call['function'] | tojson + '</tool_call>' -}}
            {%- endfor -%}
            {{- eos_token -}}
        {%- endgeneration -%}
    {%- elif message['role'] == 'tool' -%}
        {{- '<|user|><tool_response>' + message['content'] + '</tool_response>' -}}
    {%- elif message['role'] in ['system', 'user'] -%}
        {{- '<|' + message['role'] + '|>' + message['content'] -}}
    {%- else -%}
        {{- raise_exception("unknown role '" + message['role'] + "'; allowed: system, user, assistant, tool") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}"""


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Build the byte-level tokenizer, which needs no merges, training, files or network.

    Ids 0 to 255 are the bytes themselves. <|pad|> is 256, <|eos|> is 257, and the three chat marks follow: 261 entries
    in all. Decoding the encoding of any text returns that text. Encoding adds neither a beginning nor an end of text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([PAD, EOS, *ROLE_MARKS])  # in the order of their ids
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=list(ROLE_MARKS),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def tokenizer_name(model: ModelConfig) -> str:
    """Return the name of a run's tokenizer, for `load_tokenizer`."""
    return model.tokenizer or model.path or BYTES


def load_run_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a run. A `DataError` names the key that the user set."""
    key = "model.path" if model.tokenizer is None and model.path is not None else TOKENIZER_KEY
    tokenizer = load_tokenizer(tokenizer_name(model), trust_remote_code=model.trust_remote_code, key=key)
    add_tokens(tokenizer, model.add_tokens)
    return tokenizer


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> range:
    """Add those of `tokens` that `tokenizer` does not have, as plain tokens, and return their ids.

    They are found in texts exactly as they are written, before the tokenizer normalises a text: some tokenizers would
    find a token only after a space. They are no control tokens, so they are tokens in every message, and decoding
    writes them. Raises `DataError` if the tokenizer does not take them.
    """
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    first = vocabulary_size(tokenizer)
    wanted = [token for token in tokens if token not in known]
    made = [AddedToken(token, normalized=False, special=False) for token in wanted]
    ids = range(first, first + len(wanted))
    tokenizer.add_tokens(made)
    if (found := tokenizer.convert_tokens_to_ids(wanted)) != list(ids):
        raise DataError(
            [
                f"{ADD_TOKENS_KEY}: {type(tokenizer).__name__} gives {wanted[0]!r} the id {found[0]} instead of "
                f"{first}; add the tokens to the tokenizer's files, and set {TOKENIZER_KEY} to their folder"
            ]
        )
    mark_new(tokenizer, range((new_ids(tokenizer) or ids).start, ids.stop))
    return ids


def mark_new(tokenizer: PreTrainedTokenizerBase, ids: range) -> None:
    """Record that the tokens `ids`, the last ones of `tokenizer`, are new. Raises `DataError` if it has others."""
    if len(ids) and ids.stop > (size := vocabulary_size(tokenizer)):
        raise DataError([f"new tokens up to id {ids.stop - 1}, but the tokenizer has {size}"])
    setattr(tokenizer, _NEW_IDS, ids)


def new_ids(tokenizer: PreTrainedTokenizerBase | None) -> range:
    """Return the ids of the tokens that `add_tokens` has added to `tokenizer`."""
    return getattr(tokenizer, _NEW_IDS, range(0))


def describe_new_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[str]:
    """Return a line about the tokens of `model.add_tokens`, for a tokenizer that has them."""
    if not tokens:
        return []
    ids = new_ids(tokenizer)
    had = [repr(token) for token in tokens if tokenizer.convert_tokens_to_ids(token) not in ids]
    line = f"{ADD_TOKENS_KEY}: {len(ids)} new token{'s' * (len(ids) != 1)}"
    line += f", ids {ids.start} to {ids.stop - 1}" if len(ids) else ""
    return [line + (f"; the tokenizer has {', '.join(had)} already" if had else "")]


def load_tokenizer(
    name_or_path: str, *, trust_remote_code: bool = False, key: str = TOKENIZER_KEY
) -> PreTrainedTokenizerBase:
    """Load the tokenizer "bytes", the one in a local folder, or the one with a name on the Hub.

    A name that looks like a path (it exists, starts with ".", "/" or "~", or has more than one slash) is never looked
    up on the Hub. Raises `DataError`, about `key`, if there is no such tokenizer, or it cannot be read.
    """
    if name_or_path == BYTES:
        return bytes_tokenizer()
    if reads_like_a_path(name_or_path):
        return _load_folder(Path(name_or_path).expanduser(), trust_remote_code=trust_remote_code, key=key)
    return _load_hub_name(name_or_path, trust_remote_code=trust_remote_code, key=key)


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Describe what decides a tokenizer's output, chat template included, as plain JSON.

    The result is the same in every process, and independent of where the tokenizer was loaded from.
    """
    if tokenizer.is_fast:
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        core.pop("truncation"), core.pop("padding")  # they belong to the latest call, not to the tokenizer
    else:
        core = [type(tokenizer).__name__, tokenizer.get_vocab(), sorted(map(str, tokenizer.added_tokens_decoder))]
    template = tokenizer.chat_template
    identity = {
        "core": hashlib.sha256(json.dumps(core, sort_keys=True).encode()).hexdigest(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": template,
        "patched_by": version("trl") if template and not GENERATION_MARK.search(json.dumps(template)) else None,
    }
    # Present only if they matter, so that identities recorded without them stay valid.
    if tokenizer.split_special_tokens:
        identity["split_special_tokens"] = True
    if not tokenizer.is_fast:
        identity["python"] = _python_identity(tokenizer)
    return identity


def _python_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Describe merges and scores of a tokenizer written in Python, and what it does to a text."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = [Path(file) for file in tokenizer.save_vocabulary(folder)]
        except NotImplementedError:  # it has no files
            files = []
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return {"files": digests, "probe": tokenizer(PROBE_TEXT, verbose=False)["input_ids"]}


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many ids a model must embed: more than the number of tokens if the vocabulary has gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token id that pads batches: the tokenizer's own, else its end of text, else 0.

    Any id will do, because padding is masked in the attention and in the labels. A tokenizer without padding is
    therefore not changed: a padding token would be saved with the model.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def reads_like_a_path(name: str) -> bool:
    """Return whether `load_tokenizer` looks for a folder, and never on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def _advice(key: str, folder: str) -> str:
    if key == TOKENIZER_KEY:
        return f"give {folder}, a Hub name, or {BYTES!r}"
    return f"set {TOKENIZER_KEY} to {folder}, a Hub name, or {BYTES!r}; or give another {key}"


def _load_folder(folder: Path, *, trust_remote_code: bool, key: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise DataError([f"{key}: no such folder: {str(folder)!r}; {_advice(key, 'a folder')}"])
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, ImportError, KeyError, plain Exception, ...
        raise DataError(
            [
                f"{key}: no readable tokenizer in {str(folder)!r} ({in_short(error)}); "
                f"{_advice(key, 'a folder with a tokenizer.json')}"
            ]
        ) from error


def _load_hub_name(name: str, *, trust_remote_code: bool, key: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer of the Hub, which is asked once for the name first: transformers would retry for a minute."""
    from huggingface_hub import HfApi
    from transformers import AutoTokenizer

    unreachable = None
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # unknown name, gated, offline, no network: an earlier download may be in the cache
        unreachable = error
    try:
        return AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, local_files_only=unreachable is not None
        )
    except Exception as error:
        raise DataError(
            [
                f"{key}: {name!r} is not a local folder, and the Hub has no readable tokenizer of that name "
                f"({in_short(unreachable or error)}); {_advice(key, 'a folder')}"
            ]
        ) from error


def byte_characters() -> list[str]:
    """Return the printable character for each byte in byte-level vocabularies (the mapping of GPT-2).

    Printable bytes of Latin-1 are represented by themselves, the others by the code points from 256 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
