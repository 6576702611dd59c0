"""Structured output: every row's text is what its request described; what cannot be ends its own request only."""

import json
import re
import resource
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from hortator.producer.errors import BadRequest
from hortator.producer.schema import MAX_CHOICES
from hortator.workers.engine import compiler
from hortator.workers.engine import structure as structures
from hortator.workers.engine.sampler import BAD_STRUCTURE, PENDING, Draw, Sampler, fault_of
from hortator.workers.engine.step import SamplingParams, Structure, StructureKind
from hortator.workers.engine.structure import Grammars, Matcher
from tests.workers.engine.byte_tokenizer import write_tokenizer
from tests.workers.engine.checkpoints import EOS, VOCAB
from tests.workers.engine.test_steering import SETTINGS

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["cat", "dog", "höh"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "kind", "age", "tags"],
    "additionalProperties": False,
}
PATTERN = r"[A-Z][a-z]{1,5}(, [0-9]{4}){0,2}!"
LARK = 'start: sum\nsum: NUMBER ("+" NUMBER)~1..3\nNUMBER: /[0-9]{1,3}/'
CHOICES = ["yes", "no", 'say "a\\b"\n', "naïve 🛶", "yesterday"]


def schema(value: object) -> Structure:
    return Structure(StructureKind.JSON_SCHEMA, json.dumps(value))


def regex(pattern: str) -> Structure:
    return Structure(StructureKind.REGEX, pattern)


JSON = schema(SCHEMA)
GOOD: list[tuple[Structure, Callable[[str], object]]] = [
    (JSON, lambda text: jsonschema.validate(json.loads(text), SCHEMA)),
    (regex(PATTERN), lambda text: _assert(re.fullmatch(PATTERN, text))),
    (Structure(StructureKind.LARK, LARK), lambda text: _assert(re.fullmatch(r"\d{1,3}(\+\d{1,3}){1,3}", text))),
    (Structure(StructureKind.CHOICE, json.dumps(CHOICES)), lambda text: _assert(text in CHOICES)),
]


def _assert(holds: object) -> None:
    assert holds


def params(structure: Structure | None, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1500, "temperature": 1.0, "structure": structure, **changes})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grammars]:
    directory = tmp_path_factory.mktemp("model")
    tokenizer.save(str(directory / "tokenizer.json"))
    made = Grammars.of(directory, vocab_size=VOCAB, eos_token_ids=(EOS,))
    assert made is not None
    made.wait()
    yield made
    made.close()


class Rows:
    """Sequences that grow by random logits, each its own and the same in every batch."""

    def __init__(self, samplings: list[SamplingParams], prompt: str = "x") -> None:
        self.samplings = samplings
        self.tokens = [array("i", list(prompt.encode())) for _ in samplings]
        self.num_prompt = len(prompt)

    def draw(self, row: int) -> Draw:
        position = len(self.tokens[row]) - self.num_prompt
        return Draw(self.samplings[row], position, row, self.tokens[row], self.num_prompt, frozenset({EOS}))

    def logits(self, row: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * row + len(self.tokens[row]))
        return torch.randn(VOCAB, generator=generator) * 2

    def step(self, sampler: Sampler, rows: list[int]) -> list[int]:
        """Tokens, or marks, of these rows; PENDING is tried again."""
        marks = dict.fromkeys(rows, PENDING)
        while todo := [row for row in rows if marks[row] == PENDING]:
            logits = torch.stack([self.logits(row) for row in todo])
            marks |= zip(todo, sampler.choose(logits, [self.draw(row) for row in todo]).tolist(), strict=True)
        for row, token in marks.items():
            self.tokens[row].append(token)
        return list(marks.values())

    def output(self, row: int) -> list[int]:
        return self.tokens[row][self.num_prompt :].tolist()


def run(sampler: Sampler, rows: Rows) -> list[list[int]]:
    """Until every row has ended, by EOS or by a mark, or has max_tokens."""
    alive = list(range(len(rows.samplings)))
    while alive:
        chosen = rows.step(sampler, alive)
        alive = [
            row
            for row, token in zip(alive, chosen, strict=True)
            if token > EOS and len(rows.output(row)) < rows.samplings[row].max_tokens
        ]
    return [rows.output(row) for row in range(len(rows.samplings))]


def test_rows_of_every_kind_in_one_batch_become_what_they_should(grammars: Grammars, tokenizer: Tokenizer) -> None:
    wanted = GOOD * 6
    samplings = [params(structure, seed=at, temperature=at % 3) for at, (structure, _) in enumerate(wanted)]
    outputs = run(Sampler(grammars), Rows([*samplings, params(None, max_tokens=30, min_tokens=30)]))
    for output, (_, check) in zip(outputs, wanted, strict=False):
        assert output[-1] == EOS
        check(tokenizer.decode(output))
    assert len(outputs[-1]) == 30, "a plain row beside them ended early"


def test_structures_go_with_every_other_parameter_and_a_batch_is_as_each_alone(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    ours = {
        **SETTINGS,
        "min_tokens": {"min_tokens": 5},
        "logit_bias": {"logit_bias": ((ord("a") + 2, 3.0), (40, -100.0))},
    }
    cases = [(good, changes) for good in GOOD for changes in ours.values()]
    samplings = [params(structure, seed=at, **changes) for at, ((structure, _), changes) in enumerate(cases)]
    together = run(Sampler(grammars), Rows(samplings))
    for output, ((_, check), _) in zip(together, cases, strict=True):
        check(tokenizer.decode(output))
    alone = Rows(samplings)
    for row in range(len(samplings)):
        sampler = Sampler(grammars)
        while alone.step(sampler, [row])[0] > EOS:
            pass
    assert together == [alone.output(row) for row in range(len(samplings))]


def test_a_resumed_row_goes_on_as_if_nothing_had_happened(grammars: Grammars) -> None:
    rows = Rows([params(JSON, seed=3)])
    (whole,) = run(Sampler(grammars), rows)
    for kept in range(0, len(whole), 3):
        again = Rows([params(JSON, seed=3)])
        again.tokens[0].extend(whole[:kept])
        assert run(Sampler(grammars), again) == [whole]


SPELT = 'say "<eos>" or <bos>\x7f.'
FORCED = '%llguidance {"no_forcing": false}\n'
IN_SPELLING = [
    (schema({"const": SPELT}), json.dumps(SPELT)),
    (
        schema(
            {
                "properties": {"<eos>": {"const": 1}},
                "required": ["<eos>"],
                "additionalProperties": False,
                "type": "object",
            }
        ),
        '{"<eos>":1}',
    ),
    (regex(re.escape(SPELT)), SPELT),
    (Structure(StructureKind.CHOICE, json.dumps([SPELT])), SPELT),
    (Structure(StructureKind.LARK, 'start: "<eos>" "b"'), "<eos>b"),
    (Structure(StructureKind.LARK, FORCED + 'start: "<eos>" "b"\n' + FORCED), "<eos>b"),
]


@pytest.mark.parametrize(("structure", "text"), IN_SPELLING)
def test_the_spelling_of_a_special_token_is_only_text(
    grammars: Grammars, tokenizer: Tokenizer, structure: Structure, text: str
) -> None:
    (output,) = run(Sampler(grammars), Rows([params(structure)]))
    said = tokenizer.decode(output)
    if structure.kind is StructureKind.JSON_SCHEMA:
        assert json.loads(said) == json.loads(text)
    else:
        assert said == text
    assert output.index(EOS) == len(output) - 1


def test_as_many_choices_as_a_job_may_have_are_followed(grammars: Grammars, tokenizer: Tokenizer) -> None:
    options = [f"№ {n} of\x7f/\\\n{'x' * (n % 7)}" for n in range(MAX_CHOICES)]
    many = Structure(StructureKind.CHOICE, json.dumps(options))
    texts = {
        tokenizer.decode(output) for output in run(Sampler(grammars), Rows([params(many, seed=n) for n in range(9)]))
    }
    assert texts <= set(options)
    assert len(texts) > 1


def test_min_tokens_holds_the_end_off_while_the_structure_has_more_to_say(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    samplings = [params(regex("a{2,9}"), min_tokens=7, seed=seed) for seed in range(8)]
    texts = [tokenizer.decode(output) for output in run(Sampler(grammars), Rows(samplings))]
    assert all(re.fullmatch("a{7,9}", text) for text in texts)
    assert len(set(texts)) > 1


def test_a_structure_that_is_complete_ends_even_before_min_tokens(grammars: Grammars, tokenizer: Tokenizer) -> None:
    (output,) = run(Sampler(grammars), Rows([params(regex("abc"), min_tokens=50)]))
    assert tokenizer.decode(output) == "abc"
    assert output[-1] == EOS


def test_with_ignore_eos_only_ends_follow_a_complete_structure(grammars: Grammars, tokenizer: Tokenizer) -> None:
    rows = Rows([params(regex("abc"), ignore_eos=True)])
    sampler = Sampler(grammars)
    for _ in range(10):
        rows.step(sampler, [0])
    assert rows.output(0)[3:] == [EOS] * 7
    assert tokenizer.decode(rows.output(0)) == "abc"


BAD = [
    (schema({"type": "strin"}), "strin"),
    (schema({"$ref": "http://127.0.0.1:1/schema"}), "http://127.0.0.1:1/schema"),
    (schema({"not": {}}), "not"),
    (Structure(StructureKind.JSON_SCHEMA, "{"), "structure"),
    (regex("(a"), "unclosed group"),
    (regex("(?=a)b"), "look-around"),
    (Structure(StructureKind.LARK, "start: nobody"), "nobody"),
    (Structure(StructureKind.LARK, "begin: /a/"), "start"),
    (schema({"$ref": "#"}), "cannot write"),
    (regex(r"[^\s\S]"), "cannot write"),
]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("ab(c", "unclosed group, at character 3"),
        ("([/", "unclosed character class, at character 2"),
        ("a/b\\/c\n(", "unclosed group, at character 8"),
        ("(?<=a)b", "look-around, including look-ahead and look-behind, is not supported, at character 1"),
    ],
)
def test_what_is_wrong_with_a_regex_is_said_of_the_regex_that_was_sent(
    grammars: Grammars, pattern: str, says: str
) -> None:
    error = grammars.compile(regex(pattern)).exception()
    assert str(error) == f"structure: regex: {says}"


@pytest.mark.parametrize(("bad", "said"), BAD)
def test_a_bad_structure_fails_its_own_row_with_the_reason(grammars: Grammars, bad: Structure, said: str) -> None:
    sampler, rows = Sampler(grammars), Rows([params(regex("ab")), params(bad), params(None, temperature=0.0)])
    plain = int(rows.logits(2).argmax())
    assert rows.step(sampler, [0, 1, 2]) == [ord("a") + 2, BAD_STRUCTURE, plain]
    fault = fault_of(1, BAD_STRUCTURE, sampler.take_reasons().get(1), context=1)
    assert (fault.handle, fault.code) == (1, "bad_request")
    assert said in fault.message
    assert "\n" not in fault.message


def _nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}, "required": ["a"]}
    return value


HOSTILE = [
    regex("((a{1,1000}){1,1000}){1,1000}"),
    regex("(.*a.{40}){3}"),
    regex("[ab]*a[ab]{60}"),
    regex("|".join(f"x.*{n}.*y" for n in range(3000))),
    schema({"type": "string", "maxLength": 1_000_000}),
    schema({"type": "integer", "multipleOf": 99_991}),
    schema({"type": "array", "items": {"type": "string", "pattern": "^(a|b)+$"}, "minItems": 100_000}),
    schema({"enum": [f"v{n}" for n in range(5000)]}),
    schema({"allOf": [{"anyOf": [{"required": [f"a{n}"]}, {"required": [f"b{n}"]}]} for n in range(24)]}),
    schema(_nested(400)),
    Structure(StructureKind.LARK, 'start: s\ns: s s | s s s | "a" | ""'),
]


def test_hostile_structures_cost_little_time_and_memory(grammars: Grammars) -> None:
    """Together, beside an innocent."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = Rows([*(params(structure, seed=at) for at, structure in enumerate(HOSTILE)), params(JSON)])
    sampler, alive, spent = Sampler(grammars), list(range(len(HOSTILE) + 1)), time.process_time()
    for _ in range(60):
        chosen = rows.step(sampler, alive)
        alive = [row for row, token in zip(alive, chosen, strict=True) if token > EOS]
    assert time.process_time() - spent < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000, "more than a gigabyte"


def test_a_structure_that_takes_long_to_begin_is_refused(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "PATIENCE_S", 0.0)
    error = grammars.compile(regex("(1{300}){300}")).exception()
    assert isinstance(error, BadRequest)
    assert "to begin" in error.message


def test_the_bound_on_what_a_step_may_cost_is_ours(grammars: Grammars) -> None:
    """With the library's own, steps of ambiguous grammars would take seven times as long before they are refused."""
    optional = {f"p{n}": {"type": "integer"} for n in range(300)}
    sampler = Sampler(grammars)
    run(sampler, Rows([params(schema({"type": "object", "properties": optional}))]))
    assert "max is 1000" in sampler.take_reasons()[0]


def test_nothing_is_left_of_a_mask_only_if_nothing_else_was_in_it() -> None:
    bits = np.zeros(3, dtype=np.int32)
    np.bitwise_or.at(bits, [5 >> 5, 31 >> 5, 64 >> 5], np.array([1 << 5, -(1 << 31), 1], dtype=np.int32))
    assert structures.without(bits, [5, 31]).tolist() == [0, 0, 1]
    assert structures.without(bits, [5, 31, 64]).tolist() == bits.tolist()


def test_nobody_waits_for_a_structure_that_takes_long_to_compile(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, compile_now = threading.Event(), structures._compile

    def slow(*args: Any) -> Any:
        release.wait(30)
        return compile_now(*args)

    monkeypatch.setattr(structures, "_compile", slow)
    rows, sampler = Rows([params(regex("slow")), params(None, temperature=0.0)]), Sampler(grammars)
    logits = torch.stack([rows.logits(row) for row in range(2)])
    try:
        started = time.monotonic()
        for _ in range(5):
            tokens = sampler.choose(logits, [rows.draw(row) for row in range(2)]).tolist()
            assert tokens == [PENDING, int(logits[1].argmax())]
        assert time.monotonic() - started < 2
    finally:
        release.set()
    assert rows.step(sampler, [0]) == [ord("s") + 2]


def test_equal_structures_are_compiled_once(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, compile_now = [], structures._compile

    def counting(*args: Any) -> Any:
        compiled.append(args)
        return compile_now(*args)

    monkeypatch.setattr(structures, "_compile", counting)
    run(Sampler(grammars), Rows([params(regex("on(c|k)e"), seed=seed) for seed in range(20)]))
    assert len(compiled) == 1


def test_without_an_end_of_sequence_token_a_structure_is_refused_and_says_so(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert Grammars.of(tmp_path, vocab_size=VOCAB, eos_token_ids=()) is None
    sampler, rows = Sampler(None), Rows([params(JSON)])
    assert rows.step(sampler, [0]) == [BAD_STRUCTURE]
    assert "names no end-of-sequence token" in sampler.take_reasons()[0]


def test_a_vocabulary_of_characters_is_understood_too() -> None:
    demo = Path(__file__).resolve().parents[3] / "demo" / "model"
    vocabulary = Tokenizer.from_file(str(demo / "tokenizer.json"))
    grammars = Grammars.of(demo, vocab_size=vocabulary.get_vocab_size() + 3, eos_token_ids=(2,))
    assert grammars is not None
    grammars.wait()
    matcher = Matcher(grammars.compile(regex("[a-c]{2}")).result().deep_copy())
    generated, expected = array("i"), ["a", "b", "c"]
    for _ in range(2):
        (bits,) = grammars.allowed([matcher])
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()
        assert [vocabulary.decode([token]) for token in allowed] == expected
        generated.append(allowed[0])
        matcher.catch_up(generated, 0)
    (bits,) = grammars.allowed([matcher])
    assert np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist() == [2]
    grammars.close()


def test_a_journal_that_does_not_follow_the_structure_is_said_to_be_of_an_earlier_attempt(grammars: Grammars) -> None:
    rows, sampler = Rows([params(regex("abc"))]), Sampler(grammars)
    rows.tokens[0].extend([ord("z") + 2])
    assert rows.step(sampler, [0]) == [BAD_STRUCTURE]
    assert "earlier attempt" in sampler.take_reasons()[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("pattern", ["ZZZ", "aZ", "[ZQ]Z", "a[ZQ]"])
def test_what_the_vocabulary_cannot_write_is_said_to_be_so(pattern: str, temperature: float) -> None:
    demo = Path(__file__).resolve().parents[3] / "demo" / "model"  # knows no capital letter
    grammars = Grammars.of(demo, vocab_size=VOCAB, eos_token_ids=(2,))
    sampler = Sampler(grammars)
    (output,) = run(sampler, Rows([params(regex(pattern), temperature=temperature)]))
    assert output[-1] == BAD_STRUCTURE
    assert sampler.take_reasons()[0] == f"structure: {structures.UNWRITABLE}"
    assert grammars is not None
    grammars.close()


@pytest.mark.parametrize("content", ["{", json.dumps({"model": {"type": "WordPiece"}})])
def test_a_tokenizer_that_cannot_be_used_costs_structures_only(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    grammars = Grammars.of(tmp_path, vocab_size=VOCAB, eos_token_ids=(EOS,))
    assert grammars is not None
    grammars.wait()
    rows, sampler = Rows([params(JSON), params(None, temperature=0.0)]), Sampler(grammars)
    marks = rows.step(sampler, [0, 1])
    assert marks[0] == BAD_STRUCTURE
    assert marks[1] >= 0
    assert "cannot use this model's tokenizer" in sampler.take_reasons()[0]
    grammars.close()
