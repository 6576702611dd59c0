"""Structured output: which tokens may come next so that a row's text becomes what its request described.

llguidance knows the languages and the vocabulary (docs/decisions/0004-structured-output.md).  Descriptions come from
strangers, so each is bounded: compiling in work and size, and every step in work and in states.  What goes beyond ends
its own request.  Compiling happens in threads, and the library lets go of the interpreter meanwhile.
"""

import json
import logging
import os
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import llguidance
import numpy as np
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from hortator.producer.errors import BadRequest, ConfigError

from . import bounds
from .complaints import complaint
from .plain import PlainVocabulary
from .step import Structure, StructureKind

logger = logging.getLogger("hortator.engine")

_NUM_COMPILED = 128  # structures kept for requests that use the same
_THREADS = 2
_STACK_BYTES = 256 << 20  # the library recurses as deep as `bounds` lets descriptions nest; touched only as needed
_PATIENCE_S = 1.0  # of processor time to compile and to begin
_MAX_REASON = 500
_NOTHING_FOLLOWS = "NoExtensionBias"  # the library's word for it
UNWRITABLE = "the model's vocabulary cannot write what it asks for"
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""Any layout, but not for ever: a model that has begun to indent may not find out of it."""
_NEVER_FORCE = '%llguidance {"no_forcing": true}'
"""Text that must come next would be read by the tokenizer, which takes "<eos>" in it for the end of the output.  The
last one of a grammar counts."""
_LIMITS = llguidance.LLParserLimits(
    max_grammar_size=100_000,
    initial_lexer_fuel=1_000_000,  # about 20 ms
    max_items_in_row=1000,  # about 250 optional properties; a step of the most ambiguous grammars takes 12 ms by then
    step_lexer_fuel=50_000,  # about 4 ms
    step_max_items=20_000,  # about 1 ms
    max_lexer_states=50_000,  # 1 to 2 kB each
    verbose_errors=False,  # the long form quotes what was generated
)

Bits = NDArray[np.int32]


class Matcher:
    """Where one sequence stands in its structure."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self.raw = matcher
        self._num_taken = 0  # of the generated tokens
        self._begun = False
        self._strayed: str | None = None

    @property
    def problem(self) -> str | None:
        """Why the structure has come to nothing."""
        if self.raw.is_error():
            error = first_line(self.raw.get_error())
            return UNWRITABLE if error == _NOTHING_FOLLOWS else error
        return self._strayed

    def catch_up(self, tokens: "array[int]", num_prompt: int) -> None:
        """Take the tokens that were generated since the last call.  Whatever comes after the end (a request may ignore
        ends of sequence) says nothing any more."""
        news = tokens[num_prompt + self._num_taken :].tolist()
        self._num_taken = len(tokens) - num_prompt
        if not self.raw.is_stopped() and self.raw.try_consume_tokens(news) < len(news) and not self.raw.is_stopped():
            # A mask may offer the vocabulary's stand-in for unknown text, which is then not taken.
            self._strayed = UNWRITABLE if self._begun else "the tokens of an earlier attempt do not follow it"
        self._begun = True


class Grammars:
    """Compiles structures for one model's vocabulary.

    A structure ends as the library has it: once nothing can be added only the model's end-of-sequence tokens are
    possible, and where the text may end they are among what is possible.
    """

    def __init__(self, tokenizer: Path, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Starts to read the tokenizer.json; `wait` for it while the rank loads, since it holds the interpreter."""
        self._threads = _deep_threads(_THREADS)
        self._tokenizer = self._threads.submit(_read, tokenizer, vocab_size, list(eos_token_ids))
        self._compiled: OrderedDict[Structure, Future[llguidance.LLMatcher]] = OrderedDict()
        self._path = tokenizer
        self._vocab_size = vocab_size

    @classmethod
    def of(cls, model_path: Path, *, vocab_size: int, eos_token_ids: Sequence[int]) -> "Grammars | None":
        """None where nothing can be structured: without a token that ends an output, or (in benchmarks) a tokenizer."""
        path = model_path / "tokenizer.json"
        if not path.is_file() or not eos_token_ids:
            return None
        return cls(path, vocab_size=vocab_size, eos_token_ids=eos_token_ids)

    def wait(self) -> None:
        """Until the tokenizer is read.  One that the library cannot use costs structures, and nothing else."""
        if error := self._tokenizer.exception():
            logger.warning("%s: %s", self._path, error)

    def compile(self, structure: Structure) -> "Future[llguidance.LLMatcher]":
        """The structure's beginning, as soon as it is there: copy it.  BadRequest in it says what is wrong."""
        known = self._compiled.get(structure)
        if known is None:
            known = self._compiled[structure] = self._threads.submit(_compile, self._tokenizer, structure)
        self._compiled.move_to_end(structure)
        if len(self._compiled) > _NUM_COMPILED:
            self._compiled.popitem(last=False)
        return known

    @cached_property
    def _executor(self) -> llguidance.LLExecutor:
        return llguidance.LLExecutor(num_threads=len(os.sched_getaffinity(0)))

    def allowed(self, matchers: Sequence[Matcher]) -> Bits:
        """[matchers, vocabulary / 32]: a bit for each token that may come next.  A matcher may get a problem by it."""
        bits = allocate_token_bitmask(len(matchers), self._vocab_size)
        fill_next_token_bitmask_par(self._executor, [(m.raw, row) for row, m in enumerate(matchers)], bits)
        return bits

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def without(bits: Bits, tokens: Sequence[int]) -> Bits:
    """One row's bits less those of `tokens`; as they were if nothing would be left."""
    left = bits.copy()
    for token in tokens:
        left[token >> 5] &= ~np.int32(1 << (token & 31)) if token & 31 != 31 else np.int32(0x7FFFFFFF)
    return left if left.any() else bits


def first_line(error: str) -> str:
    """The library's errors are long, and may quote what was generated after their first line."""
    return error.strip().split("\n", 1)[0][:_MAX_REASON]


def _read(path: Path, vocab_size: int, eos_token_ids: list[int]) -> llguidance.LLTokenizer:
    """Byte-level and byte-fallback vocabularies the library reads itself; it must be told of plain ones."""
    try:
        return llguidance.LLTokenizer(path.read_text(), n_vocab=vocab_size, eos_token=eos_token_ids)
    except Exception as error:
        plain = PlainVocabulary.read(path, vocab_size, eos_token_ids[0])
        if plain is None:
            reason = first_line(str(error))
            raise ConfigError(f"structured output cannot use this model's tokenizer: {reason}") from error
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(plain), n_vocab=vocab_size, eos_token=eos_token_ids)


def _deep_threads(count: int) -> ThreadPoolExecutor:
    """Threads with a stack of their own size, all started: the size is the process's setting at that moment."""
    threads, together = ThreadPoolExecutor(count, thread_name_prefix="grammars"), threading.Barrier(count)
    before = threading.stack_size(_STACK_BYTES)
    try:
        for _ in range(count):
            threads.submit(together.wait)
    finally:
        threading.stack_size(before)
    return threads


def _compile(tokenizer: "Future[llguidance.LLTokenizer]", structure: Structure) -> llguidance.LLMatcher:
    """Also makes the first mask, so that what it costs falls here and not into a step."""
    started = time.thread_time()
    try:
        bounds.check(structure)
        matcher = llguidance.LLMatcher(tokenizer.result(), _grammar(structure), log_level=0, limits=_LIMITS)
    except (ValueError, ConfigError) as error:  # JSON that is none; a tokenizer that cannot be used
        raise BadRequest(f"structure: {first_line(str(error))}") from None
    if matcher.is_error():  # of a description, which its sender knows: all lines may be told
        raise BadRequest(f"structure: {complaint(structure, matcher.get_error())[:_MAX_REASON]}")
    matcher.compute_bitmask()
    if (spent := time.thread_time() - started) > _PATIENCE_S:
        raise BadRequest(f"structure: it takes {spent:.1f} s to begin, the limit is {_PATIENCE_S:.0f} s: simplify it")
    return matcher


def _grammar(structure: Structure) -> str:
    """The library's own form: always a grammar, because only a grammar can say `_NEVER_FORCE`."""
    text, make = structure.definition, llguidance.LLMatcher
    match structure.kind:
        case StructureKind.JSON_SCHEMA:
            made = make.grammar_from_json_schema(text, defaults={"whitespace_pattern": _WHITESPACE})
            grammar = f"start: %json {json.dumps(json.loads(made)['grammars'][0]['json_schema'])}"
        case StructureKind.REGEX:
            grammar = json.loads(make.grammar_from_regex(text))["grammars"][0]["lark_grammar"]
        case StructureKind.LARK:
            grammar = text
        case StructureKind.CHOICE:
            grammar = f"start: /{'|'.join(map(_literally, json.loads(text)))}/"
    return make.grammar_from_lark(f"{grammar}\n{_NEVER_FORCE}\n")


def _literally(text: str) -> str:
    """A regex for it.  One for all choices costs a step the same however many they are; if each were a rule of its own,
    it would be an item of the parser."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):X}}}" for c in text)
