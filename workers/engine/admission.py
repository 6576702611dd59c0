"""What the engine refuses, and what it says.  A refused request is a fault of its own and harms nobody."""

import math

from hortator.producer.errors import BadRequest, PromptTooLong
from hortator.producer.schema import MAX_TOP_LOGPROBS

from .step import EngineInfo, Fault, Request


def length_limit(request: Request, info: EngineInfo) -> int:
    """Tokens, prompt included, at which the request ends: max_tokens, clipped to the model's context."""
    return min(len(request.prompt) + request.sampling.max_tokens, info.max_model_len)


def refusal(request: Request, info: EngineInfo) -> Fault | None:
    """Why this request can never run here, or None."""
    max_tokens = length_limit(request, info) - len(request.prompt)
    if lack := lack_of_room(len(request.prompt), max_tokens, info):
        return Fault(request.handle, PromptTooLong.code, lack)
    return _malformed(request, info)


def lack_of_room(num_prompt: int, max_tokens: int, info: EngineInfo, *, n: int = 1) -> str | None:
    """Why a prompt and `n` outputs of at most `max_tokens` can never be held at a time, and what to do; else None.

    `max_tokens` is what is left of it once it is clipped to the model's context.
    """
    if num_prompt >= info.max_model_len:
        return (
            f"the prompt has {num_prompt} tokens; the limit is {info.max_model_len - 1}"
            f" (max_model_len {info.max_model_len}, and one to generate): shorten it"
        )
    needed = num_prompt + n * max_tokens
    if needed <= info.kv_tokens:
        return None
    times, or_n = (f"{n} times ", " or n") if n > 1 else ("", "")
    most = (info.kv_tokens - num_prompt) // n
    cure = f"lower max_tokens to {most}{or_n}" if most > 0 else f"shorten the prompt{or_n and ', lower n'}"
    return (
        f"prompt ({num_prompt}) and {times}max_tokens ({max_tokens}) need {needed} tokens; the KV pool holds "
        f"{info.kv_tokens}: {cure}, or give the group more kv_cache_bytes"
    )


def _malformed(request: Request, info: EngineInfo) -> Fault | None:
    problem = (
        _token_problem(request, info)
        or _sampling_problem(request)
        or _bias_problem(request, info)
        or _stop_problem(request, info)
        or _end_problem(request, info)
    )
    return Fault(request.handle, BadRequest.code, problem) if problem else None


def _bias_problem(request: Request, info: EngineInfo) -> str | None:
    for token_id, value in request.sampling.logit_bias:
        if not 0 <= token_id < info.vocab_size:
            return f"logit_bias: token id {token_id} is outside the vocabulary of {info.vocab_size}"
        if not -100 <= value <= 100:
            return f"logit_bias: {value} for token id {token_id} is not from -100 to 100"
    return None


def _stop_problem(request: Request, info: EngineInfo) -> str | None:
    for token_id in request.sampling.stop_token_ids:
        if not 0 <= token_id < info.vocab_size:
            return f"stop_token_ids: token id {token_id} is outside the vocabulary of {info.vocab_size}"
    return None


def _end_problem(request: Request, info: EngineInfo) -> str | None:
    sampling = request.sampling
    ends = set(sampling.stop_token_ids).union(() if sampling.ignore_eos else info.eos_token_ids)
    if sampling.min_tokens and len(ends) >= info.vocab_size and ends.issuperset(range(info.vocab_size)):
        return f"min_tokens={sampling.min_tokens}, but every token of the vocabulary is a stop token"
    return None


def _token_problem(request: Request, info: EngineInfo) -> str | None:
    if not request.prompt:
        return "the prompt has no tokens"
    for tokens, name in ((request.prompt, "prompt"), (request.generated, "journal")):
        if tokens and (min(tokens) < 0 or max(tokens) >= info.vocab_size):
            where, token = next((i, t) for i, t in enumerate(tokens) if not 0 <= t < info.vocab_size)
            return f"token id {token} at position {where} of the {name} is outside the vocabulary of {info.vocab_size}"
    return None


def _sampling_problem(request: Request) -> str | None:
    s = request.sampling
    rules = (
        (s.max_tokens >= 1, f"max_tokens must be at least 1, got {s.max_tokens}"),
        (s.temperature >= 0 and math.isfinite(s.temperature), f"temperature must be >= 0, got {s.temperature}"),
        (0 < s.top_p <= 1, f"top_p must be above 0 and at most 1, got {s.top_p}"),
        (s.top_k >= 0, f"top_k must be >= 0 (0: no limit), got {s.top_k}"),
        (0 <= s.min_p <= 1, f"min_p must be between 0 and 1, got {s.min_p}"),
        (
            0.01 <= s.repetition_penalty <= 100,
            f"repetition_penalty must be from 0.01 to 100, got {s.repetition_penalty}",
        ),
        (-2 <= s.presence_penalty <= 2, f"presence_penalty must be from -2 to 2, got {s.presence_penalty}"),
        (-2 <= s.frequency_penalty <= 2, f"frequency_penalty must be from -2 to 2, got {s.frequency_penalty}"),
        (s.min_tokens >= 0, f"min_tokens must be >= 0, got {s.min_tokens}"),
        (
            0 <= s.top_logprobs <= MAX_TOP_LOGPROBS,
            f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}, got {s.top_logprobs}",
        ),
        (len(dict(s.logit_bias)) == len(s.logit_bias), "logit_bias names a token twice"),
    )
    return next((message for holds, message in rules if not holds), None)
