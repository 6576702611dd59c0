"""From a job to what the engine is asked; the errors name the real limits."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hortator.producer import schema
from hortator.producer.errors import BadRequest, HortatorError, PromptTooLong
from hortator.producer.schema import Chunk, Job, Priority
from hortator.producer.store import Claimed

from .engine.admission import lack_of_room
from .engine.step import EngineInfo, Request, SamplingParams, Structure, StructureKind
from .live import Live, Strand
from .output import Output
from .text import Text

_CLASSES = tuple(Priority)  # interactive first


class Damaged(HortatorError):
    """What the store keeps of the job cannot have come from an attempt at it."""

    code = "damaged"


def prepare(
    job: Job, claimed: Claimed, *, handles: Iterator[int], text: Text, info: EngineInfo, now: float
) -> tuple[Live, list[Request]]:
    """Tokens, limits and the state in which an earlier attempt left the job; the requests of the strands that go on.
    Raises BadRequest, PromptTooLong, Damaged."""
    _refuse_hopeless(job, text, info)
    _check_journal(claimed.journal, job.sampling.n, info)
    prompt = _tokens(job, text)
    max_tokens = _fit(job, prompt, info)
    strands = tuple(
        Strand(next(handles), _output(job, text, info, _of(claimed.journal, number)))
        for number in range(job.sampling.n)
    )
    live = Live(claimed.lease, strands, len(prompt), max_tokens, now)
    live.end_what_is_complete()
    params = _params(job, claimed.lease.job_id, max_tokens)
    requests = [
        Request(
            strand.handle,
            prompt,
            params if number == 0 else replace(params, seed=seed_of(f"{params.seed}/{number}")),
            tuple(strand.output.token_ids),
            priority=_CLASSES.index(job.priority),
            deadline_ms=0 if job.deadline_s is None else claimed.enqueued_ms + math.ceil(job.deadline_s * 1000),
            salt=seed_of(claimed.tenant),  # what one tenant has sent must not be guessed by another from what is cached
        )
        for number, strand in enumerate(strands)
        if strand.reason is None
    ]
    return live, requests


def _of(journal: Sequence[Chunk], number: int) -> list[Chunk]:
    return [chunk for chunk in journal if (chunk.choice or 0) == number]


def _output(job: Job, text: Text, info: EngineInfo, journal: Sequence[Chunk]) -> Output:
    sampling = job.sampling
    return Output(
        text.decoder(),
        ends=frozenset(sampling.stop_token_ids) | frozenset(() if sampling.ignore_eos else info.eos_token_ids),
        stop=sampling.stop,
        min_tokens=sampling.min_tokens,
        journal=journal,
        logprobs=sampling.logprobs,
        top_logprobs=sampling.top_logprobs > 0,
    )


def seed_of(name: str) -> int:
    """63 bits of a name's hash.  A job that gives no seed gets its id's: the same on every attempt and every group."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def _refuse_hopeless(job: Job, text: Text, info: EngineInfo) -> None:
    """Spare the front the tokenising of megabytes that no tokenisation fits into the model's context."""
    num_chars = len(job.prompt or "") + sum(len(message.content) for message in job.messages or ())
    if num_chars > info.max_model_len * text.max_token_chars:
        raise PromptTooLong(
            f"the prompt has {num_chars} characters, too many for any number of tokens up to the limit;"
            f" the limit is {info.max_model_len - 1} (max_model_len {info.max_model_len}, and one to generate)"
        )


def _check_journal(journal: Sequence[Chunk], n: int, info: EngineInfo) -> None:
    """Tokens that no engine of this model can have given would take the group down."""
    for chunk in journal:
        if max(chunk.token_ids, default=0) >= info.vocab_size or (chunk.choice or 0) >= n:
            raise Damaged("its journal in Redis has tokens that are not of its model or answers; send the job anew")


def _tokens(job: Job, text: Text) -> tuple[int, ...]:
    if job.token_ids is not None:
        return job.token_ids
    if job.messages is not None:
        return text.encode_chat(job.messages)
    assert job.prompt is not None
    return text.encode(job.prompt)


def _fit(job: Job, prompt: Sequence[int], info: EngineInfo) -> int:
    """max_tokens as far as the model's context goes; raises if the job can never run on this group."""
    if not prompt:
        raise BadRequest("the prompt has no tokens")
    if job.token_ids is not None and max(prompt) >= info.vocab_size:
        raise BadRequest(f"token id {max(prompt)} is not in the vocabulary of {info.vocab_size}")
    max_tokens = min(job.sampling.max_tokens, info.max_model_len - len(prompt))
    if lack := lack_of_room(len(prompt), max_tokens, info, n=job.sampling.n):
        raise PromptTooLong(lack)
    return max_tokens


def _params(job: Job, job_id: str, max_tokens: int) -> SamplingParams:
    wanted = job.sampling
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        min_p=wanted.min_p,
        seed=seed_of(job_id) if wanted.seed is None else wanted.seed,
        stop_token_ids=wanted.stop_token_ids,
        ignore_eos=wanted.ignore_eos,
        logprobs=wanted.logprobs,
        top_logprobs=wanted.top_logprobs,
        repetition_penalty=wanted.repetition_penalty,
        presence_penalty=wanted.presence_penalty,
        frequency_penalty=wanted.frequency_penalty,
        logit_bias=tuple(wanted.logit_bias.items()),
        min_tokens=wanted.min_tokens,
        structure=_structure(wanted.structure),
    )


def _structure(wanted: schema.Structure | None) -> Structure | None:
    """The description as text; a schema's properties keep their order, for that is the order of the output."""
    match wanted:
        case None:
            return None
        case schema.AnyJson():
            return Structure(StructureKind.JSON_SCHEMA, '{"type":"object"}')
        case schema.JsonSchema():
            return Structure(StructureKind.JSON_SCHEMA, json.dumps(wanted.json_schema, separators=(",", ":")))
        case schema.Regex():
            return Structure(StructureKind.REGEX, wanted.pattern)
        case schema.Grammar():
            return Structure(StructureKind.LARK, wanted.grammar)
        case schema.OneOf():
            return Structure(
                StructureKind.CHOICE, json.dumps(wanted.choices, ensure_ascii=False, separators=(",", ":"))
            )
