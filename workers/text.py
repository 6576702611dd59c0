"""Text in, token ids out, and back: ranks know token ids only.

`HFText` is whatever the model directory's own tokenizer does, chat template included; `ByteText` needs no model.
"""

import codecs
import contextlib
import logging
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from hortator.producer.errors import BadRequest, ConfigError
from hortator.producer.schema import Message

REPLACEMENT = "\ufffd"
LONG_TEXT_CHARS = 20_000
_LONGEST_WAIT = 16  # tokens; a character takes four at most


class Decoder(Protocol):
    """Turns one job's tokens into text, bit by bit.

    What `feed` and `flush` return, joined, is the decoding of all tokens; no character is ever returned by halves.
    (One exception: SentencePiece byte tokens that are no UTF-8.  There the full decoding turns earlier, good bytes of
    the same run into U+FFFD as well; a stream cannot take them back, and a result says what its stream said.)
    """

    def feed(self, *token_ids: int) -> str:
        """The text that these tokens complete, maybe none.  Many at once cost hardly more than one."""

    def flush(self) -> str:
        """What is left when no more tokens come."""


class Text(Protocol):
    """What the front asks of a tokenizer."""

    @property
    def max_token_chars(self) -> int:
        """Characters of the longest token: n tokens stand for at most n times as many characters of known text."""

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Token ids with the special tokens (BOS) that the model expects around a prompt."""

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The chat template's tokens, up to where the assistant's answer begins."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of all tokens; special tokens have none."""

    def decoder(self) -> Decoder:
        """A decoder for one job."""


class ByteText:
    """A token is a byte of UTF-8: the tokenizer of the echo engine."""

    max_token_chars = 1

    def encode(self, prompt: str) -> tuple[int, ...]:
        return tuple(prompt.encode())

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        turns = [f"{message.role}: {message.content}\n" for message in messages]
        return self.encode("".join(turns) + "assistant: ")

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(map(_byte, token_ids)).decode(errors="replace")

    def decoder(self) -> Decoder:
        return _ByteDecoder()


class _ByteDecoder:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, *token_ids: int) -> str:
        return self._utf8.decode(b"".join(map(_byte, token_ids)))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


def _byte(token_id: int) -> bytes:
    return bytes((token_id,)) if token_id < 256 else REPLACEMENT.encode()


class HFText:
    """The tokenizer of a model directory, as transformers' AutoTokenizer makes it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # The Rust tokenizer underneath gives the same ids as calling the wrapper, at a tenth of its cost.
        self._rust = tokenizer.backend_tokenizer
        self._rust.no_truncation()
        self._rust.no_padding()
        self.max_token_chars = max(map(len, self._rust.get_vocab()))

    @classmethod
    def load(cls, path: Path) -> "HFText":
        """Read tokenizer.json, tokenizer_config.json and the chat template; ConfigError says what is missing where."""
        if not path.is_dir():
            raise ConfigError(
                f"model_path {path}: there is no such directory on {socket.gethostname()}: copy the model there, or"
                " correct the path"
            )
        if not (path / "tokenizer.json").is_file():
            raise ConfigError(f"{path}: no tokenizer.json; hortator reads tokenizers of that format only")
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False))
        except Exception as error:
            raise ConfigError(f"{path}: the tokenizer cannot be loaded: {error}") from error

    def encode(self, prompt: str) -> tuple[int, ...]:
        return self._ids(prompt)

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        if not self._tokenizer.chat_template:
            raise BadRequest("this model has no chat template: send a prompt instead of messages")
        turns = [message.model_dump() for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # the template may refuse a role or an order of turns, with any error
            raise BadRequest(f"the model's chat template refuses these messages: {error}") from None
        return self._ids(text, add_special_tokens=False)

    def _ids(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        if len(text) < LONG_TEXT_CHARS:
            return tuple(self._rust.encode(text, add_special_tokens=add_special_tokens).ids)
        # `encode` holds the interpreter: a long text would silence the heartbeats.  The batch call lets go of it.
        [encoding] = self._rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._rust.decode(list(token_ids), skip_special_tokens=True))

    def decoder(self) -> Decoder:
        return _WindowDecoder(self)


class _WindowDecoder:
    """Decodes a sliding window: the tokens of the last text given out, for their effect on spaces, and those since.

    A window that ends with U+FFFD may hold the first bytes of a character, so it waits for the next token.  Bytes that
    never become a character must not make it wait for ever: each token would decode all of them again.
    """

    def __init__(self, text: HFText) -> None:
        self._text = text
        self._given: list[int] = []  # tokens whose text is out already
        self._since: list[int] = []

    def feed(self, *token_ids: int) -> str:
        before, self._since = self._since, [*self._since, *token_ids]
        text = self._news()
        if text and not text.endswith(REPLACEMENT):
            self._given, self._since = self._since, []
            return text
        if len(token_ids) == 1:
            return self._settle(text) if len(self._since) > _LONGEST_WAIT else ""
        self._since = before  # only the last ones may have to wait
        return "".join(map(self.feed, token_ids))

    def flush(self) -> str:
        return self._news() if self._since else ""

    def _news(self) -> str:
        before = self._text.decode(self._given) if self._given else ""
        return self._text.decode(self._given + self._since)[len(before) :]

    def _settle(self, text: str) -> str:
        """Give out the beginning of what waits, whose text as far as it is known is `text`.

        A character has up to four bytes.  So what lies before the last three tokens is known to its end, and of four
        places in a row one at least is in no character: there the beginning's text is also that of the whole.
        """
        waiting = self._since
        for cut in range(len(waiting) - 3, len(waiting) - 7, -1):
            self._since = waiting[:cut]
            begin = self._news()
            if text.startswith(begin):
                self._given, self._since = self._since, waiting[cut:]
                return begin
        self._since = waiting
        return ""


@contextlib.contextmanager
def torch_hidden() -> Iterator[None]:
    """While inside, transformers finds no torch, and imports in one second instead of four.

    Only for a process that never needs torch: transformers remembers what it found.
    """
    if "torch" in sys.modules:
        yield
        return
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    modules["torch"] = None
    log = logging.getLogger("transformers")
    log.addFilter(_is_no_complaint)
    try:
        yield
    finally:
        log.removeFilter(_is_no_complaint)
        del modules["torch"]


def _is_no_complaint(record: logging.LogRecord) -> bool:
    """False for what transformers says of a missing torch, which here is hidden on purpose."""
    return "PyTorch was not found" not in record.getMessage()
