"""What is said of requests that can never run."""

import pytest

from hortator.producer.errors import PromptTooLong
from hortator.workers.engine.admission import lack_of_room, refusal
from hortator.workers.engine.step import EngineInfo, Fault, Request, SamplingParams

INFO = EngineInfo(max_num_seqs=4, max_model_len=100, vocab_size=256, kv_tokens=64, eos_token_ids=(0,))


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "n", "says"),
    [
        (
            2,
            98,
            1,
            "need 100 tokens; the KV pool holds 64: lower max_tokens to 62, or give the group more kv_cache_bytes",
        ),
        (
            2,
            50,
            2,
            "2 times max_tokens (50) need 102 tokens; the KV pool holds 64: lower max_tokens to 31 or n, or give",
        ),
        (64, 9, 1, "the KV pool holds 64: shorten the prompt, or give the group more kv_cache_bytes"),
        (63, 1, 3, "the KV pool holds 64: shorten the prompt, lower n, or give the group more kv_cache_bytes"),
        (100, 1, 1, "the prompt has 100 tokens; the limit is 99 (max_model_len 100, and one to generate): shorten it"),
    ],
)
def test_what_does_not_fit_is_told_what_would(num_prompt: int, max_tokens: int, n: int, says: str) -> None:
    assert says in (lack_of_room(num_prompt, max_tokens, INFO, n=n) or "")


def test_what_fits_to_the_last_place_is_not_refused() -> None:
    assert lack_of_room(2, 31, INFO, n=2) is None


def test_the_engine_says_the_same_as_the_front() -> None:
    request = Request(7, (1, 2), SamplingParams(max_tokens=256))
    assert refusal(request, INFO) == Fault(7, PromptTooLong.code, lack_of_room(2, 98, INFO) or "")
