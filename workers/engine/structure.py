"""Structured output: which tokens may come next so that a row's text becomes what its request described.

llguidance knows the languages and the vocabulary (docs/decisions/0004-structured-output.md).  Descriptions come from
strangers, so each is bounded: compiling in work and size, and every step in work and in states.  What goes beyond ends
its own request.  Each is tried in another process first (trials.py); then it is compiled here, in threads, and the
library lets go of the interpreter meanwhile.
"""

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
from .compiler import STACK_BYTES, compile_structure, first_line, read_tokenizer
from .step import Structure
from .trials import NUM_LANES, Trials

logger = logging.getLogger("hortator.engine")

_NUM_COMPILED = 128  # structures kept for requests that use the same
_MAX_QUEUED_S = 20.0  # until somebody begins with a structure
_NOTHING_FOLLOWS = "NoExtensionBias"  # the library's word for it
UNWRITABLE = "the model's vocabulary cannot write what it asks for"
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
        self._threads = _deep_threads(NUM_LANES)
        self._tokenizer = self._threads.submit(read_tokenizer, tokenizer, vocab_size, eos_token_ids)
        self._trials = Trials(tokenizer, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
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
            begin_by = time.monotonic() + _MAX_QUEUED_S
            known = self._threads.submit(_compile, self._tokenizer, self._trials, structure, begin_by)
            self._compiled[structure] = known
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
        self._trials.close()


def without(bits: Bits, tokens: Sequence[int]) -> Bits:
    """One row's bits less those of `tokens`; as they were if nothing would be left."""
    left = bits.copy()
    for token in tokens:
        left[token >> 5] &= ~np.int32(1 << (token & 31)) if token & 31 != 31 else np.int32(0x7FFFFFFF)
    return left if left.any() else bits


def _deep_threads(count: int) -> ThreadPoolExecutor:
    """Threads with a stack of their own size, all started: the size is the process's setting at that moment."""
    threads, together = ThreadPoolExecutor(count, thread_name_prefix="grammars"), threading.Barrier(count)
    before = threading.stack_size(STACK_BYTES)
    try:
        for _ in range(count):
            threads.submit(together.wait)
    finally:
        threading.stack_size(before)
    return threads


def _compile(
    tokenizer: "Future[llguidance.LLTokenizer]", trials: Trials, structure: Structure, begin_by: float
) -> llguidance.LLMatcher:
    """`begin_by` is of the monotonic clock: those that wait behind many others fail one after the other then, each at
    once."""
    if time.monotonic() > begin_by:
        raise BadRequest(f"structure: others have taken more than {_MAX_QUEUED_S:.0f} s to compile: try again later")
    try:
        ready = tokenizer.result()
        bounds.check(structure)
    except (ValueError, ConfigError) as error:  # JSON that is none; a tokenizer that cannot be used
        raise BadRequest(f"structure: {first_line(str(error))}") from None
    trials.run(structure)
    return compile_structure(ready, structure)
