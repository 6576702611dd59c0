"""The echo engine: answers with the prompt's own tokens, over and over.  No model, no torch: the twin of the paged
engine for tests and benchmarks of everything around it.

It keeps the real limits (max_num_seqs rows at a time, the rest waits) and is stepped in lock-step like any engine.
With a latency, each rank waits by its own clock; the digest therefore covers what the plans said, not who is due.
"""

import time
from collections import deque
from dataclasses import dataclass

from .admission import length_limit, refusal
from .step import EngineInfo, EngineStats, Fault, Finish, Request, StepOutput, StepPlan, Token

TICK_S = 0.001  # a step that waits for a latency takes at most this long, so that new jobs get in
VOCAB_SIZE = 256  # tokens are the bytes of a text
DEFAULT_MODEL_LEN = 1 << 20


@dataclass(slots=True)
class _Row:
    request: Request
    position: int  # tokens generated so far, by earlier attempts too
    limit: int


class EchoEngine:
    """`latency_s` until a job's first token; then `tokens_per_step` of them a step (None: all at once)."""

    def __init__(
        self,
        *,
        max_num_seqs: int = 64,
        max_model_len: int = DEFAULT_MODEL_LEN,
        latency_s: float = 0.0,
        tokens_per_step: int | None = None,
    ) -> None:
        self._info = EngineInfo(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            vocab_size=VOCAB_SIZE,
            kv_tokens=max_num_seqs * max_model_len,
            eos_token_ids=(),
            details={"engine": "echo"},
        )
        self._latency_s = latency_s
        self._tokens_per_step = tokens_per_step
        self._waiting: dict[int, Request] = {}
        self._running: dict[int, _Row] = {}
        self._due: deque[tuple[float, int]] = deque()  # (time of the first token, handle), in order
        self._speaking: dict[int, _Row] = {}
        self._faults: list[Fault] = []
        self._digest = 0
        self.progress = 0

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def apply(self, plan: StepPlan) -> int:
        for handle in plan.cancel:
            self._drop(handle)
        for request in plan.admit:
            fault = refusal(request, self._info)
            if fault is None:
                self._waiting[request.handle] = request
            else:
                self._faults.append(fault)
        self._schedule()
        admitted = tuple((r.handle, r.prompt, r.generated) for r in plan.admit)
        self._digest = hash((self._digest, plan.step, admitted, plan.cancel))
        return self._digest

    def execute(self) -> StepOutput:
        if not self._speaking and self._due:
            time.sleep(min(TICK_S, max(0.0, self._due[0][0] - time.monotonic())))
        self._wake_due(time.monotonic())
        tokens: list[Token] = []
        finished: list[tuple[int, Finish]] = []
        for row in list(self._speaking.values()):
            finish = self._speak(row, tokens)
            if finish is not None:
                finished.append((row.request.handle, finish))
                self._drop(row.request.handle)
        faults, self._faults = tuple(self._faults), []
        self.progress += 1
        return StepOutput(tuple(tokens), tuple(finished), faults)

    def stats(self) -> EngineStats:
        rows = self._info.max_num_seqs
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            free_blocks=rows - len(self._running),
            total_blocks=rows,
            preemptions=0,
        )

    def _schedule(self) -> None:
        while self._waiting and len(self._running) < self._info.max_num_seqs:
            handle = next(iter(self._waiting))
            request = self._waiting.pop(handle)
            limit = length_limit(request, self._info) - len(request.prompt)
            self._running[handle] = _Row(request, len(request.generated), limit)
            self._due.append((time.monotonic() + self._latency_s, handle))

    def _wake_due(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            _, handle = self._due.popleft()
            if handle in self._running:
                self._speaking[handle] = self._running[handle]

    def _speak(self, row: _Row, tokens: list[Token]) -> Finish | None:
        """Emit this step's tokens of one job; why it ends, if it does."""
        request, sampling = row.request, row.request.sampling
        until = row.limit if self._tokens_per_step is None else min(row.limit, row.position + self._tokens_per_step)
        logprob = 0.0 if sampling.logprobs else None
        while row.position < until:
            token_id = request.prompt[row.position % len(request.prompt)]
            tokens.append(Token(request.handle, token_id, logprob))
            row.position += 1
            if token_id in sampling.stop_token_ids:
                return Finish.STOP
        return Finish.LENGTH if row.position >= row.limit else None

    def _drop(self, handle: int) -> None:
        self._waiting.pop(handle, None)
        self._running.pop(handle, None)
        self._speaking.pop(handle, None)
