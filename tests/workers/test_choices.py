"""Several answers to one prompt: n requests to the engine, one job to everybody else."""

import random
from typing import Any

import pytest

from hortator.producer.job import Follower
from hortator.producer.journal import encode_chunk, read_chunk
from hortator.producer.schema import Chunk, FinishReason, Result, State
from hortator.workers.engine.step import Finish, Request
from tests.workers.leader import EOS, Leader

JOB = "id-1"


def result_of(leader: Leader) -> Result:
    status = leader.status()
    assert (status.state, status.failure) == (State.SUCCEEDED, None)
    assert status.result is not None
    return status.result


def texts(chunks: list[Chunk]) -> dict[int | None, str]:
    """What a reader of the stream puts together."""
    found: dict[int | None, str] = {}
    for chunk in chunks:
        found[chunk.choice] = found.get(chunk.choice, "") + chunk.text
    return found


def test_each_answer_is_a_request_with_a_seed_of_its_own() -> None:
    leader, again = Leader(), Leader()
    for one in (leader, again):
        one.run("hello", n=3, seed=7, temperature=1.0)
    first, second, third = leader.group.admitted
    assert {request.prompt for request in leader.group.admitted} == {tuple(b"hello")}
    assert len({request.handle for request in leader.group.admitted}) == 3
    assert first.sampling.seed == 7
    assert len({7, second.sampling.seed, third.sampling.seed}) == 3
    assert [r.sampling.seed for r in again.group.admitted] == [r.sampling.seed for r in leader.group.admitted]


def test_the_result_has_every_answer_and_the_first_where_all_results_have_theirs() -> None:
    leader = Leader()
    leader.run(n=2, max_tokens=4, logprobs=True)
    one, two = (request.handle for request in leader.group.admitted)
    leader.step("ab", of=one, logprob=-1.0)
    leader.step("xyz\0", of=two, logprob=-2.0, finish=Finish.STOP)
    assert leader.status().state is State.RUNNING
    leader.step("cd", of=one, logprob=-1.0, finish=Finish.LENGTH)
    result = result_of(leader)
    assert result.choices is not None
    assert [(c.index, c.text, c.finish_reason) for c in result.choices] == [
        (0, "abcd", FinishReason.LENGTH),
        (1, "xyz", FinishReason.STOP),
    ]
    assert result.choices[1].token_ids[-1] == EOS
    assert result.choices[1].logprobs == (-2.0,) * 4
    assert (result.text, result.finish_reason, result.logprobs) == ("abcd", FinishReason.LENGTH, (-1.0,) * 4)
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (5, 8)
    assert not leader.front.busy


def test_the_journal_counts_the_tokens_of_all_and_says_whose_they_are() -> None:
    leader = Leader()
    leader.run(n=2, max_tokens=3)
    one, two = (request.handle for request in leader.group.admitted)
    leader.step("a", of=one)
    leader.step("xy", of=two)
    leader.step("bc", of=one, finish=Finish.LENGTH)
    leader.step("z", of=two, finish=Finish.LENGTH)
    chunks = leader.store.chunks(JOB)
    assert texts(chunks) == {0: "abc", 1: "xyz"}
    starts = [chunk.index for chunk in chunks]
    assert starts == [sum(len(c.token_ids) for c in chunks[:at]) for at in range(len(chunks))]
    assert leader.status().num_tokens == 6


def test_one_answer_alone_leaves_no_trace_of_choices_on_the_wire() -> None:
    leader = Leader()
    leader.run(n=1)
    leader.step("ab", finish=Finish.LENGTH)
    (chunk,) = leader.store.chunks(JOB)
    assert encode_chunk(chunk) == b'[0,[97,98],"ab",null]'
    assert "choice" not in chunk.model_dump(mode="json", exclude_none=True)
    assert "choices" not in result_of(leader).model_dump(mode="json", exclude_none=True)


def test_a_stop_string_ends_its_own_answer_here_and_in_the_engine() -> None:
    leader = Leader()
    leader.run(n=2, stop=["!"])
    one, two = (request.handle for request in leader.group.admitted)
    leader.step("a!z", of=one)
    assert leader.group.cancelled == [one]
    leader.step("bc", of=two, finish=Finish.LENGTH)
    choices = result_of(leader).choices
    assert choices is not None
    assert [choice.text for choice in choices] == ["a", "bc"]
    assert leader.group.cancelled == [one], "the other one had left the engine by itself"


def test_what_no_answer_can_do_fails_the_job_and_stops_the_others() -> None:
    leader = Leader()
    leader.run(n=3)
    handles = [request.handle for request in leader.group.admitted]
    leader.step("a", of=handles[0])
    leader.fault("bad_request", "structure: no")
    assert leader.status().state is State.FAILED
    assert leader.group.cancelled == handles[:2]
    assert not leader.front.busy


def test_a_cancel_reaches_every_answer_that_the_engine_still_has() -> None:
    leader = Leader()
    leader.run(n=3)
    handles = [request.handle for request in leader.group.admitted]
    leader.step("ab", of=handles[1], finish=Finish.LENGTH)
    leader.store.cancel([JOB])
    leader.turn(after_s=3)
    assert leader.status().state is State.CANCELLED
    assert leader.group.cancelled == [handles[0], handles[2]]


def test_a_crash_keeps_the_tokens_of_each_answer_for_the_next_attempt() -> None:
    leader = Leader()
    leader.run(n=2, max_tokens=4)
    one, two = (request.handle for request in leader.group.admitted)
    leader.step("ab", of=one)
    leader.step("wxyz", of=two, finish=Finish.LENGTH)
    leader.down()
    leader.ready(2)
    leader.turn(after_s=0.1)
    (again,) = leader.group.admitted[2:]
    assert bytes(again.generated) == b"ab"
    leader.step("cd", finish=Finish.LENGTH)
    choices = result_of(leader).choices
    assert choices is not None
    assert [choice.text for choice in choices] == ["abcd", "wxyz"]


def test_all_answers_together_must_fit_into_the_pool() -> None:
    leader = Leader(kv_tokens=64, max_model_len=64)
    leader.run("hello", n=3, max_tokens=20)
    failure = leader.status().failure
    assert failure is not None
    assert failure.code == "prompt_too_long"
    assert (
        "3 times max_tokens (20) need 65 tokens; the KV pool holds 64: lower max_tokens to 19 or n, or give"
        in failure.message
    )


def answer(request: Request, length: int) -> bytes:
    """What the engine of these tests says, whoever asks: it depends on the seed and on nothing else."""
    return bytes(random.Random(request.sampling.seed).choices(b"abc!", k=length))


def advance(leader: Leader, rng: random.Random, lengths: dict[int, int], given: dict[int, int]) -> None:
    """Some tokens of some answer."""
    waiting = [r for r in leader.group.admitted if r.handle not in leader.group.cancelled]
    request = rng.choice([r for r in waiting if given.get(r.handle, -1) < lengths[r.sampling.seed]])
    start = given.setdefault(request.handle, len(request.generated))
    end = min(start + rng.randrange(1, 4), lengths[request.sampling.seed])
    given[request.handle] = end
    tokens = answer(request, lengths[request.sampling.seed])[start:end].decode()
    leader.step(tokens, of=request.handle, finish=Finish.LENGTH if end == lengths[request.sampling.seed] else None)


@pytest.mark.parametrize("seed", range(12))
def test_wherever_attempts_end_every_answer_is_what_it_would_have_been(seed: int) -> None:
    rng, sampling = random.Random(seed), {"n": 3, "max_tokens": 9, "stop": ["b!"], "temperature": 1.0, "seed": seed}
    leader = Leader()
    leader.run(**sampling)  # type: ignore[arg-type]
    lengths = {request.sampling.seed: 9 for request in leader.group.admitted}
    whole = [answer(request, 9).decode().split("b!")[0] for request in leader.group.admitted]
    given: dict[int, int] = {}
    for _ in range(200):
        if leader.status().state is State.SUCCEEDED:
            break
        if rng.random() < 0.15:
            leader.front.hand_back()
            leader.turn()
            leader.turn(after_s=0.1)
            continue
        advance(leader, rng, lengths, given)
    choices = result_of(leader).choices
    assert choices is not None
    assert [choice.text for choice in choices] == whole
    assert texts(leader.store.chunks(JOB)) == dict(enumerate(whole))


def test_a_reader_who_lost_the_journal_half_way_gets_the_rest_of_every_answer() -> None:
    leader = Leader()
    leader.run(n=2, max_tokens=4)
    one, two = (request.handle for request in leader.group.admitted)
    leader.step("ab", of=one)
    leader.step("x", of=two)
    early = leader.store.chunks(JOB)
    leader.step("cd", of=one, finish=Finish.LENGTH)
    leader.step("yzw", of=two, finish=Finish.LENGTH)
    reader = Follower(JOB, 0)
    reader.take(early)
    rest = reader.rest(result_of(leader))
    assert texts([*early, *rest]) == {0: "abcd", 1: "xyzw"}
    assert reader.after == 8
    assert reader.rest(result_of(leader)) == []


def test_the_answers_number_survives_the_journal() -> None:
    changes: list[dict[str, Any]] = [{}, {"top_logprobs": (((1, -0.5),),)}]
    for more in changes:
        chunk = Chunk(index=3, token_ids=(1,), text="a", choice=2, **more)
        assert read_chunk(encode_chunk(chunk)) == chunk
