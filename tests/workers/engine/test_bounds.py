"""Structures that would cost a rank its stack or its time are refused from their text, and useful ones are not."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hortator.producer.errors import BadRequest
from hortator.workers.engine import bounds
from hortator.workers.engine.step import Structure, StructureKind


def regex(text: str) -> Structure:
    return Structure(StructureKind.REGEX, text)


def lark(text: str) -> Structure:
    return Structure(StructureKind.LARK, text)


def schema(value: Any) -> Structure:
    return Structure(StructureKind.JSON_SCHEMA, json.dumps(value))


def chain(count: int, name: str = "a") -> str:
    """Definitions that lead from one to the next."""
    return f"start: {name}0\n" + "".join(f"{name}{i}: {name}{i + 1}\n" for i in range(count)) + f'{name}{count}: "a"'


def _refs(count: int) -> dict[str, Any]:
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": links | {f"a{count}": {"type": "string"}}}


COUNTED = "(1{60000}){60000}"
REFUSED = [
    (lark(chain(4000)), "4002 definitions"),
    (lark(chain(4000, "A")), "4002 definitions"),
    (lark("start: " + "(" * 300 + '"a"' + ")" * 300), "nested deeper"),
    (lark("start: A\nA: " + "(" * 300 + '"a"' + ")" * 300), "nested deeper"),
    (lark(f"start: /{COUNTED}/"), "60000 times"),
    (lark('start: A\nA: ("a"{1000}){1000}'), "written out"),
    (lark('start: A\nA: B{1000}\nB: "1"{1000}'), "written out"),
    (lark('start: A\nB: "1"~1000..1000\nA: B~9999'), "written out"),
    (lark(f"start: %json {json.dumps({'anyOf': [{'pattern': COUNTED}]})}"), "60000 times"),
    (regex(COUNTED), "60000 times"),
    (regex("(1{400}){400}"), "written out"),
    (regex("1{400}{400}"), "written out"),
    (regex("1{10000}" * 11), "written out"),
    (regex(r"(\)[(]{400}){400}"), "written out"),
    (regex("([[a])]{400}){400}"), "written out"),
    (regex("1{99999999999999999999}"), "times"),
    (regex("(" * 300 + "a" + ")" * 300), "nested deeper"),
    (schema({"type": "string", "pattern": COUNTED}), "60000 times"),
    (schema({"items": [{"patternProperties": {COUNTED: {}}}]}), "60000 times"),
    (schema({"x-guidance": {"whitespace_pattern": COUNTED}}), "60000 times"),
    (schema(_refs(1200)), "$ref"),
    (Structure(StructureKind.JSON_SCHEMA, '{"items":' * 300 + "{}" + "}" * 300), "nested deeper"),
    (Structure(StructureKind.JSON_SCHEMA, '{"items":' * 7000 + "{}" + "}" * 7000), "nested deeper"),
]


@pytest.mark.parametrize(("structure", "said"), REFUSED)
def test_what_would_cost_dear_is_refused_with_the_reason(structure: Structure, said: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(said)):
        bounds.check(structure)


@pytest.mark.parametrize(
    "structure",
    [
        lark(chain(900)),
        lark(chain(900, "A")),
        lark('start: line~1..9999\nline: WORD ("," WORD)~0..9999\nWORD: /[a-z]{1,300}/'),
        lark('start: A // {60000}\nA: "{60000}" | /\\{60000}/ | B\nB: "("'),
        regex(r"[{(]{300}\{60000\}\p{Lu}{300}\x{41}(?:[0-9]{1,3}\.){3}"),
        regex("(?:" * 200 + "a" + ")" * 200),
        schema({"type": "array", "minItems": 10**6, "items": {"type": "string", "maxLength": 10**6}}),
        schema({"properties": {"pattern": {"type": "string", "pattern": "^[a-z]{1,5000}$"}}}),
        schema(_refs(900)),
        Structure(StructureKind.CHOICE, json.dumps([COUNTED])),
    ],
)
def test_what_costs_little_is_not(structure: Structure) -> None:
    bounds.check(structure)


@pytest.mark.parametrize("piece", ["[", "[[", "{ ", "{", '"', '\\"', "/", "\\p{", "~ ", "%json {", "(", "a:", "A: A\n"])
def test_a_scan_takes_time_by_the_length_alone(piece: str) -> None:
    text, started = piece * (65_536 // len(piece)), time.process_time()
    for structure in (regex(text), lark(text)):
        try:
            bounds.check(structure)
        except BadRequest:
            continue
    assert time.process_time() - started < 1.5


@pytest.mark.parametrize("piece", ["A", "a", "_", " ", "?", "A ", "A.1 "])
def test_a_line_that_is_no_definition_is_scanned_once(piece: str) -> None:
    """Four times as long takes four times as long; if every part were tried again it would take sixteen times."""
    short, long = (_fastest_scan('start: "a"\nA' + piece * (size // len(piece))) for size in (8_000, 32_000))
    assert long < 9 * short


def _fastest_scan(grammar: str) -> float:
    spent = []
    for _ in range(5):
        started = time.thread_time()
        bounds.check(lark(grammar))
        spent.append(time.thread_time() - started)
    return min(spent)


DEEP = """
import sys
from pathlib import Path
from hortator.workers.engine import bounds
from hortator.workers.engine.step import Structure, StructureKind
from hortator.workers.engine.structure import Grammars
bounds.MAX_DEFINITIONS = int(sys.argv[2])
grammars = Grammars(Path(sys.argv[1]), vocab_size=64, eos_token_ids=[2])
for name in ("a", "A"):
    text = f"start: {name}0\\n" + "".join(f"{name}{i}: {name}{i + 1}\\n" for i in range(4000)) + f'{name}4000: "a"'
    print(type(grammars.compile(Structure(StructureKind.LARK, text)).exception()).__name__)
grammars.close()
"""


@pytest.mark.parametrize(("limit", "said"), [(bounds.MAX_DEFINITIONS, "BadRequest"), (10_000, "NoneType")])
def test_a_process_survives_a_chain_of_definitions_by_the_limit_and_by_its_stack(limit: int, said: str) -> None:
    """Either alone would do."""
    tokenizer = str(Path(__file__).resolve().parents[3] / "demo" / "model" / "tokenizer.json")
    command = [sys.executable, "-c", DEEP, tokenizer, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()) == (0, [said, said]), done.stderr
