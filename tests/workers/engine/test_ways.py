"""Every way of sampling at once in a real engine: mixed, staggered, preempted, resumed."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from tokenizers import Tokenizer

from hortator.workers.engine.step import Finish
from tests.workers.engine.checkpoints import Checkpoint
from tests.workers.engine.drive import TIGHT, Outcome, build, run
from tests.workers.engine.ways import IMPOSSIBLE, JSON, REGEX, SCHEMA, WAYS, ways_of_sampling

REQUESTS = ways_of_sampling()
HOPELESS = {request.handle for request in REQUESTS if request.sampling.structure == IMPOSSIBLE}


@pytest.fixture(scope="module")
def outcome(speaking: Path) -> Outcome:
    return run(build(speaking), REQUESTS)


def test_preempted_and_staggered_requests_get_the_tokens_they_get_alone(speaking: Path, outcome: Outcome) -> None:
    engine = build(speaking, **TIGHT)
    assert run(engine, REQUESTS, stagger=5).tokens == outcome.tokens
    assert engine.stats().preemptions > 0
    for request in REQUESTS[: len(WAYS)]:
        assert run(build(speaking), [request]).tokens.get(request.handle) == outcome.tokens.get(request.handle)


def test_structures_hold_in_the_engine(speaking: Path, outcome: Outcome) -> None:
    tokenizer = Tokenizer.from_file(str(speaking / "tokenizer.json"))
    for request in REQUESTS:
        text = tokenizer.decode(outcome.tokens.get(request.handle, []))
        if request.sampling.structure == JSON:
            jsonschema.validate(json.loads(text), SCHEMA)
        if request.sampling.structure == REGEX:
            assert re.fullmatch(REGEX.definition, text)
            assert outcome.finished[request.handle] is Finish.STOP


def test_a_structure_that_cannot_be_is_a_fault_of_its_own(outcome: Outcome) -> None:
    assert set(outcome.faults) == HOPELESS
    assert {fault.code for fault in outcome.faults.values()} == {"bad_request"}
    assert all("strin" in fault.message for fault in outcome.faults.values())
    assert set(outcome.finished) == {request.handle for request in REQUESTS} - HOPELESS


@pytest.mark.parametrize("kept", [1, 7, 13])
def test_a_resumed_request_goes_on_with_the_same_tokens(speaking: Path, outcome: Outcome, kept: int) -> None:
    """Penalties count the journal, structures follow it."""
    again = [
        replace(request, generated=tuple(outcome.tokens[request.handle][:kept]))
        for request in REQUESTS
        if request.handle not in HOPELESS and len(outcome.tokens[request.handle]) > kept
    ]
    resumed = run(build(speaking), again)
    assert resumed.tokens == {request.handle: outcome.tokens[request.handle][kept:] for request in again}


def test_nothing_is_structured_without_a_tokenizer_and_the_others_do_not_care(
    llama: Checkpoint, outcome: Outcome
) -> None:
    without = run(build(llama.path), REQUESTS)
    structured = {request.handle for request in REQUESTS if request.sampling.structure}
    assert set(without.faults) == structured
    assert all(fault.message.startswith("structure: ") for fault in without.faults.values())
    assert without.tokens == {h: tokens for h, tokens in outcome.tokens.items() if h not in structured}
