"""From a structure's description to the library's matcher.  The rank does it, and before it the process that tries it.

What exceeds the library's limits is an error of the matcher; what these do not bound is why there is a trial.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import llguidance

from hortator.producer.errors import BadRequest, ConfigError

from .complaints import complaint
from .plain import PlainVocabulary
from .step import Structure, StructureKind

STACK_BYTES = 256 << 20  # the library recurses as deep as `bounds` lets descriptions nest; touched only as needed
PATIENCE_S = 1.0  # of processor time to compile and to begin
_MAX_REASON = 500
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


def first_line(error: str) -> str:
    """The library's errors are long, and may quote what was generated after their first line."""
    return error.strip().split("\n", 1)[0][:_MAX_REASON]


def read_tokenizer(path: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> llguidance.LLTokenizer:
    """Byte-level and byte-fallback vocabularies the library reads itself; it must be told of plain ones."""
    try:
        return llguidance.LLTokenizer(path.read_text(), n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except Exception as error:
        plain = PlainVocabulary.read(path, vocab_size, eos_token_ids[0])
        if plain is None:
            reason = first_line(str(error))
            raise ConfigError(f"structured output cannot use this model's tokenizer: {reason}") from error
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(plain), n_vocab=vocab_size, eos_token=list(eos_token_ids)
        )


def compile_structure(tokenizer: llguidance.LLTokenizer, structure: Structure) -> llguidance.LLMatcher:
    """Also makes the first mask, so that what it costs falls here and not into a step.  BadRequest says what is
    wrong."""
    started = time.thread_time()
    try:
        matcher = llguidance.LLMatcher(tokenizer, _grammar(structure), log_level=0, limits=_LIMITS)
    except ValueError as error:  # JSON that is none
        raise BadRequest(f"structure: {first_line(str(error))}") from None
    if matcher.is_error():  # of a description, which its sender knows: all lines may be told
        raise BadRequest(f"structure: {complaint(structure, matcher.get_error())[:_MAX_REASON]}")
    matcher.compute_bitmask()
    if (spent := time.thread_time() - started) > PATIENCE_S:
        raise BadRequest(f"structure: it takes {spent:.1f} s to begin, the limit is {PATIENCE_S:.0f} s: simplify it")
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
