"""A job while the engine has it: one answer that grows, or n of them from the same prompt."""

from dataclasses import dataclass, field

from hortator.producer.schema import Choice, Chunk, FinishReason, Result, Usage
from hortator.producer.store import Lease

from .output import Output


@dataclass(slots=True, eq=False)
class Strand:
    """One answer.  The engine knows it by its handle, as a request like any other."""

    handle: int
    output: Output
    reason: FinishReason | None = None  # why it has ended
    num_inherited: int = field(init=False)  # tokens of earlier attempts

    def __post_init__(self) -> None:
        self.num_inherited = len(self.output.token_ids)

    def end(self, reason: FinishReason) -> None:
        self.output.finish()
        self.reason = reason


@dataclass(slots=True, eq=False)
class Live:
    """A job that the engine has.  The journal counts the tokens of all its strands in the order in which they came."""

    lease: Lease
    strands: tuple[Strand, ...]
    num_prompt: int
    max_tokens: int  # of each strand
    leased_at: float  # on the front's clock: when the lease was last known to be ours
    cleared: bool = False  # it was a suspect, and has passed its probation
    _num_inherited: int = field(init=False)  # tokens of earlier attempts
    _num_journalled: int = field(init=False)

    def __post_init__(self) -> None:
        self._num_inherited = self._num_journalled = self.num_tokens

    @property
    def num_tokens(self) -> int:
        return sum(len(strand.output.token_ids) for strand in self.strands)

    def passed(self, num_tokens: int) -> bool:
        """Every answer has ended, or has this many tokens of this attempt: any of them may have died of the next."""
        return all(
            strand.reason is not None or len(strand.output.token_ids) - strand.num_inherited >= num_tokens
            for strand in self.strands
        )

    @property
    def unheard(self) -> bool:
        """The journal has no token of this attempt."""
        return self._num_journalled == self._num_inherited

    def end_what_is_complete(self) -> None:
        """Strands that an earlier attempt had finished when it died."""
        for strand in self.strands:
            if reason := strand.output.complete(max_tokens=self.max_tokens):
                strand.end(reason)

    @property
    def done(self) -> bool:
        return all(strand.reason is not None for strand in self.strands)

    def take(self) -> list[Chunk]:
        """What came since the last call, for the journal; at most one chunk of each strand."""
        chunks = []
        for number, strand in enumerate(self.strands):
            chunk = strand.output.take()
            if chunk is None:
                continue
            if len(self.strands) > 1:
                chunk = chunk.model_copy(update={"index": self._num_journalled, "choice": number})
            self._num_journalled += len(chunk.token_ids)
            chunks.append(chunk)
        return chunks

    def result(self) -> Result:
        """Of a job that is done: the first answer as any job's, and all of them if there are several."""
        choices = tuple(_choice(number, strand) for number, strand in enumerate(self.strands))
        first = choices[0]
        return Result.model_construct(
            text=first.text,
            token_ids=first.token_ids,
            finish_reason=first.finish_reason,
            usage=Usage.model_construct(prompt_tokens=self.num_prompt, completion_tokens=self.num_tokens),
            logprobs=first.logprobs,
            top_logprobs=first.top_logprobs,
            choices=choices if len(choices) > 1 else None,
        )


def _choice(number: int, strand: Strand) -> Choice:
    output, reason = strand.output, strand.reason
    assert reason is not None
    return Choice.model_construct(
        index=number,
        text=output.text,
        token_ids=tuple(output.token_ids),
        finish_reason=reason,
        logprobs=None if output.logprobs is None else tuple(output.logprobs),
        top_logprobs=None if output.top_logprobs is None else tuple(output.top_logprobs),
    )
