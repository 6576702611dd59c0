"""What a job has generated: stop strings, chunks, resuming."""

import random

import pytest

from hortator.producer.schema import Chunk, FinishReason
from hortator.workers.output import Output
from hortator.workers.text import ByteText


def output(**options: object) -> Output:
    return Output(ByteText().decoder(), **options)  # type: ignore[arg-type]


def feed(into: Output, text: str) -> bool:
    stopped = [into.feed([byte]) for byte in text.encode()]
    return any(stopped)


def test_the_text_ends_before_the_stop_string_and_the_tokens_with_it() -> None:
    grown = output(stop=["END"])
    assert feed(grown, "abcEND")
    grown.finish()
    assert (grown.text, len(grown.token_ids)) == ("abc", 6)


def test_the_earliest_of_several_stop_strings_counts() -> None:
    grown = output(stop=["zz", "b"])
    assert feed(grown, "ab")
    assert grown.text == "a"


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    grown = output(stop=["END"])
    feed(grown, "abEN")
    chunk = grown.take()
    assert chunk is not None
    assert (chunk.text, len(chunk.token_ids)) == ("ab", 4)
    feed(grown, "x")
    chunk = grown.take()
    assert chunk is not None
    assert (chunk.index, chunk.text) == (4, "ENx")


def test_what_came_together_with_the_end_of_a_stop_string_is_dropped() -> None:
    grown = output(stop=["END"], logprobs=True)
    assert grown.feed(b"abENDxy", [-0.5] * 7)
    grown.finish()
    assert (grown.text, len(grown.token_ids), grown.logprobs) == ("ab", 5, [-0.5] * 5)


def test_held_back_text_comes_out_at_the_end() -> None:
    grown = output(stop=["END"])
    feed(grown, "abEN")
    grown.finish()
    assert grown.text == "abEN"


def test_a_character_is_never_given_out_by_halves() -> None:
    grown = output()
    first, second = "é".encode()
    grown.feed([first])
    chunk = grown.take()
    assert chunk is not None
    assert chunk.text == ""
    grown.feed([second])
    chunk = grown.take()
    assert chunk is not None
    assert (chunk.index, chunk.text) == (1, "é")


def test_an_end_token_is_a_token_without_text() -> None:
    grown = output(ends=frozenset({ord("$")}))
    feed(grown, "ab$")
    grown.finish()
    assert (grown.text, len(grown.token_ids)) == ("ab", 3)
    assert grown.complete(max_tokens=99) is FinishReason.STOP


def test_take_gives_nothing_twice() -> None:
    grown = output()
    feed(grown, "ab")
    assert grown.take() is not None
    assert grown.take() is None


def test_logprobs_follow_their_tokens() -> None:
    grown = output(logprobs=True)
    grown.feed([97], [-0.5])
    grown.take()
    grown.feed([98], [-1.5])
    chunk = grown.take()
    assert chunk is not None
    assert chunk.logprobs == (-1.5,)
    assert grown.logprobs == [-0.5, -1.5]


@pytest.mark.parametrize(("tokens", "reason"), [("abcd", FinishReason.LENGTH), ("ab", None), ("a.", FinishReason.STOP)])
def test_a_journal_tells_whether_it_is_a_whole_output(tokens: str, reason: FinishReason | None) -> None:
    journal = (Chunk(index=0, token_ids=tuple(tokens.encode()), text=tokens),)
    assert output(journal=journal, stop=["."]).complete(max_tokens=4) is reason


def test_wherever_an_attempt_ends_the_next_one_gives_the_same_text() -> None:
    """Random texts, stop strings, chunk sizes and crash points: journal and text are as without the crash."""
    random.seed(7)
    for _ in range(300):
        tokens = "".join(random.choices(["a", "b", "é", "…", "STOP", "ST"], k=12)).encode()
        stop = random.choice([(), ("STOP",), ("ab", "…é")])
        whole = output(stop=stop)
        used = next((at + 1 for at, token in enumerate(tokens) if whole.feed([token])), len(tokens))
        whole.finish()

        crash = random.randrange(used + 1)
        journal: list[Chunk] = []
        first = output(stop=stop)
        for token in tokens[:crash]:
            first.feed([token])
            if random.random() < 0.3 and (chunk := first.take()):
                journal.append(chunk)
        second = output(stop=stop, journal=journal)
        kept = len(second.token_ids)
        for token in tokens[kept:used]:
            second.feed([token])
        second.finish()
        if chunk := second.take():
            journal.append(chunk)
        assert second.text == whole.text
        assert second.token_ids == whole.token_ids
        if kept < used:
            assert "".join(chunk.text for chunk in journal) == whole.text
        assert [chunk.index for chunk in journal] == [
            sum(len(before.token_ids) for before in journal[:at]) for at in range(len(journal))
        ]
