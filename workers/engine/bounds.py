"""What is refused of a structure before the library sees it, because it would cost the rank dear.

The library recurses over definitions and nestings on the thread's own stack, and writes counted repetitions out when it
makes a mask, however short the text that asks for them.  Here the text is only scanned.
"""

import json
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any

from hortator.producer.errors import BadRequest

from .step import Structure, StructureKind

MAX_DEFINITIONS = 1000  # lines with a colon in a grammar, $ref in a schema; 2,800 in a chain overflow a stack of 8 MiB
MAX_DEPTH = 200  # of parentheses in a regex or a grammar, and of JSON in a schema
MAX_COUNT = 10_000  # of one counted repetition
MAX_SIZE = 100_000  # of an expression, counted repetitions written out; a mask costs 0.1 s and 60 MB by then

# No part of these tries a text twice, and what is not closed reaches to the end: a scan takes time by the length alone.
_COUNTED = r"\{\s*+(?P<least>\d*+)\s*+(?:,\s*+(?P<most>\d*+)\s*+)?\}"
_INNER_CLASS = r"\[\^?+\]?+(?:\\.|[^\]\\\[])*+\]"
_CLASS = rf"\[\^?+\]?+(?:{_INNER_CLASS}|\\.|[^\]\\])*+(?:\]|\Z)"
_REGEX = re.compile(rf"\\[pPxuU]\{{[^{{}}]*+\}}|\\.|{_CLASS}|{_COUNTED}|.", re.DOTALL)
_LARK = re.compile(
    r'"(?:\\.|[^"\\\n])*+(?:"i?|(?=\n)|\Z)|/(?P<regex>(?:\\.|[^/\\\n])++)(?:/[a-z]*+|(?=\n)|\Z)|//[^\n]*+'
    rf"|%json\s*+(?P<json>\{{)|(?P<name>[A-Za-z_]\w*+)|{_COUNTED}|~\s*+(?P<low>\d++)(?:\s*+\.\.\s*+(?P<high>\d++))?|\S",
    re.DOTALL,
)
_TERMINAL = re.compile(r"^[ \t]*+[?!]?(_?[A-Z]\w*+)[^:\n\"/]*+:", re.MULTILINE)
_ANY_HEAD = re.compile(r"^[ \t]*+(?:%|[?!]*+[A-Za-z_]\w*+[^:\n\"/]*+:)", re.MULTILINE)
_REGEX_KEYS = ("pattern", "whitespace_pattern", "item_separator", "key_separator")


def check(structure: Structure) -> None:
    """BadRequest if it is beyond the limits; what is no schema, regex or grammar at all the library will say."""
    match structure.kind:
        case StructureKind.JSON_SCHEMA:
            try:
                _check_schema(json.loads(structure.definition))
            except RecursionError:
                raise _refused(f"a schema nested deeper than {MAX_DEPTH}") from None
        case StructureKind.REGEX:
            _size(structure.definition, _REGEX)
        case StructureKind.LARK:
            _check_grammar(structure.definition)
        case StructureKind.CHOICE:
            pass


def _refused(what: str) -> BadRequest:
    return BadRequest(f"structure: {what}: simplify it")


def _check_schema(schema: Any) -> None:
    todo, num_refs = [(schema, 1)], 0
    while todo:
        value, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise _refused(f"a schema nested deeper than {MAX_DEPTH}")
        if isinstance(value, list):
            todo += [(item, depth + 1) for item in value]
        elif isinstance(value, dict):
            todo += [(item, depth + 1) for item in value.values()]
            num_refs += "$ref" in value
            for pattern in _patterns(value):
                _size(pattern, _REGEX)
    if num_refs > MAX_DEFINITIONS:
        raise _refused(f"a schema with {num_refs} $ref, the limit is {MAX_DEFINITIONS}")


def _patterns(schema: dict[str, Any]) -> Iterator[str]:
    yield from (schema[key] for key in _REGEX_KEYS if isinstance(schema.get(key), str))
    if isinstance(named := schema.get("patternProperties"), dict):
        yield from named


def _check_grammar(text: str) -> None:
    definitions = sum(":" in line for line in text.splitlines())
    if definitions > MAX_DEFINITIONS:
        raise _refused(f"a grammar of {definitions} definitions, the limit is {MAX_DEFINITIONS}")
    for piece in _LARK.finditer(text):
        if piece["json"]:
            _check_embedded(text, piece.start("json"))
        elif piece["regex"]:
            _size(piece["regex"], _REGEX)
    _size(text, _LARK, rules=True)
    _check_terminals(text)


def _check_embedded(text: str, start: int) -> None:
    """The schema that a grammar has at `start`."""
    try:
        _check_schema(json.JSONDecoder().raw_decode(text, start)[0])
    except RecursionError:
        raise _refused(f"a schema nested deeper than {MAX_DEPTH}") from None
    except ValueError:
        return  # no JSON: the library will say


def _check_terminals(text: str) -> None:
    """Terminals become one expression each, with the terminals that they use written out."""
    starts = [head.start() for head in _ANY_HEAD.finditer(text)] + [len(text)]
    ends = dict(pairwise(starts))
    bodies = {head[1]: text[head.end() : ends.get(head.start(), len(text))] for head in _TERMINAL.finditer(text)}
    uses = {name: {p["name"] for p in _LARK.finditer(body)} & set(bodies) for name, body in bodies.items()}
    try:
        order = tuple(TopologicalSorter(uses).static_order())
    except CycleError:
        return  # the library refuses those by name
    sizes: dict[str, int] = {}
    for name in order:
        sizes[name] = _size(bodies[name], _LARK, sizes)


def _size(text: str, language: re.Pattern[str], sizes: Mapping[str, int] | None = None, *, rules: bool = False) -> int:
    """Characters and classes of an expression with its counted repetitions written out; `sizes` of names in it.

    `rules` are parsed, not written out: of them only the depth counts.
    """
    totals, last = [0], 0  # of the groups that are open; of what a repetition would repeat
    for piece in language.finditer(text):
        count = _count(piece)
        if piece[0] == "(":
            totals.append(0)
            last = 0
        elif piece[0] == ")" and len(totals) > 1:
            last = totals.pop()
            totals[-1] += last
        elif count is None:
            last = _atom(piece, sizes or {})
            totals[-1] += last
        elif not rules:
            if count > MAX_COUNT:
                raise _refused(f"a repetition of {count} times, the limit is {MAX_COUNT}")
            totals[-1] += (count - 1) * last
            last *= count
        if len(totals) - 1 > MAX_DEPTH:
            raise _refused(f"groups nested deeper than {MAX_DEPTH}")
        if not rules and totals[-1] > MAX_SIZE:
            raise _refused(f"an expression of more than {MAX_SIZE} characters when its repetitions are written out")
    return max(totals[0], 1)


def _count(piece: re.Match[str]) -> int | None:
    """How often the largest bound of a counted repetition repeats; None for all else.  Digits beyond sense are many."""
    found = [piece[name] for name in ("least", "most", "low", "high") if name in piece.re.groupindex and piece[name]]
    return max((int(digits[:9]) if len(digits) < 10 else 10**9 for digits in found), default=None) if found else None


def _atom(piece: re.Match[str], sizes: Mapping[str, int]) -> int:
    named = piece.groupdict()
    if regex := named.get("regex"):
        return _size(regex, _REGEX)
    if name := named.get("name"):
        return sizes.get(name, 1)
    return 1
