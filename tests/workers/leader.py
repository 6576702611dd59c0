"""A front with a memory store, a group that does what the test says, and a clock that the test moves."""

from collections.abc import Sequence
from typing import Any

from hortator.producer.errors import StoreUnavailable
from hortator.producer.memory import MemoryStore
from hortator.producer.rules import Rules
from hortator.producer.schema import Job, Sampling, Status
from hortator.producer.store import Lease, Outcome, Verdict
from hortator.workers.engine.step import EngineInfo, EngineStats, Fault, Finish, Request, StepOutput, Token
from hortator.workers.front import Front
from hortator.workers.group import Event, Ready, Stepped
from hortator.workers.pipe import read_report, report
from hortator.workers.settings import WorkerSettings
from hortator.workers.supervisor import Down, Outage
from hortator.workers.text import ByteText

MODEL = "m"
EOS = 0


class Clock:
    """Seconds, for the front; the memory store takes its time from it too."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def stepped(step: int, output: StepOutput, stats: EngineStats, *, epoch: int = 1) -> Stepped:
    """What the front gets of it through the pipe."""
    return Stepped(epoch, read_report(report(step, output, stats, taken=0, idle=False)))


class FakeGroup:
    """Keeps what was submitted; reports nothing by itself."""

    def __init__(self) -> None:
        self.epoch, self.state, self.pids, self.last_failure = 1, "ready", {0: 11, 1: 12}, None
        self.outage: Outage | None = None
        self.given_up = False
        self.members: dict[int, object] = dict.fromkeys(self.pids, None)
        self.admitted: list[Request] = []
        self.cancelled: list[int] = []
        self.messages = 0
        self.steady = True
        self.rank_0_gone = False
        self.empty = True

    def submit(self, *, admit: Sequence[Request] = (), cancel: Sequence[int] = ()) -> bool:
        if self.rank_0_gone:
            return False
        self.messages += 1
        self.admitted += admit
        self.cancelled += cancel
        return True

    def poll(self) -> list[Event]:
        return []

    def fileno(self) -> int:
        return -1

    def start(self) -> None: ...

    def close(self, *, timeout_s: float = 5.0) -> None: ...


class Redis:
    """The memory store behind a line that the test can cut."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.away = False
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.away:
                raise StoreUnavailable("cut")
            self.calls.append(name)
            return getattr(self.store, name)(*args, **kwargs)

        return call


class Leader:
    """What a pool does, without Celery."""

    def __init__(self, *, max_model_len: int = 64, kv_tokens: int = 1024, ready: bool = True, **settings: Any) -> None:
        self.clock = Clock()
        self.store = MemoryStore(rules=Rules(require_known_model=False), clock=self.clock)
        self.redis = Redis(self.store)
        self.group = FakeGroup()
        chosen: dict[str, Any] = {
            "model": MODEL,
            "engine": "echo",
            "max_num_seqs": 4,
            "lease_s": 6.0,
            "outage_s": 6.0,
            "group": "g",
        } | settings
        self.settings = WorkerSettings(**chosen)
        self.info = EngineInfo(self.settings.max_num_seqs, max_model_len, 256, kv_tokens, (EOS,))
        self.ended_: list[tuple[Outcome, Verdict]] = []
        self.gone_: list[tuple[str, str]] = []
        self.front = self.new_front()
        if ready:
            self.ready()

    def new_front(self) -> Front:
        return Front(
            self.redis,
            self.group,  # type: ignore[arg-type]
            ByteText(),
            self.settings,
            watcher=self,
            clock=self.clock,
        )

    # front.Watcher
    def ended(self, outcome: Outcome, verdict: Verdict) -> None:
        self.ended_.append((outcome, verdict))

    def gone(self, lease: Lease, reason: str) -> None:
        self.gone_.append((lease.job_id, reason))

    # the test's hands
    def ready(self, epoch: int = 1) -> None:
        self.group.epoch = epoch
        self.front.on_events([Ready(epoch, self.info, 0.1)])
        self.turn()

    def down(self, reason: str = "rank 1 died", *, permanent: bool = False, by_pause: bool = False) -> None:
        self.front.on_events([Down(self.group.epoch, reason, permanent, None if permanent else 0.1, by_pause)])
        self.turn()

    def turn(self, *events: Event, after_s: float = 0.0) -> None:
        self.clock.now += after_s
        self.front.on_events(events)
        self.front.tick()
        for claimed in self.front.take():
            envelope = self.front.open(claimed)
            if envelope is not None:
                self.front.admit(claimed, envelope)
        self.front.flush()

    def step(self, tokens: str = "", *, of: int | None = None, finish: Finish | None = None, **more: Any) -> None:
        """One engine step that gives every byte of `tokens` to one request (default: the newest)."""
        handle = of if of is not None else self.group.admitted[-1].handle
        output = StepOutput(
            tuple(Token(handle, byte, more.get("logprob"), more.get("top", ())) for byte in tokens.encode()),
            ((handle, finish),) if finish else (),
            more.get("faults", ()),
        )
        stats = EngineStats(1, more.get("waiting", 0), 8, 10, 0)
        self.turn(stepped(1, output, stats, epoch=self.group.epoch), after_s=more.get("after_s", 0.1))

    def fault(self, code: str, message: str) -> None:
        self.step(faults=(Fault(self.group.admitted[-1].handle, code, message),))

    def enqueue(
        self, prompt: str = "hello", *, job_id: str = "id-1", deadline_s: float | None = None, **sampling: Any
    ) -> str:
        job = Job(model=MODEL, prompt=prompt, sampling=Sampling(**sampling), deadline_s=deadline_s)
        return self.store.enqueue([job], job_ids=[job_id])[0].job_id

    def run(self, prompt: str = "hello", **more: Any) -> str:
        """Enqueue one job and bring it into the engine."""
        job_id = self.enqueue(prompt, **more)
        self.turn(after_s=0.1)
        return job_id

    def status(self, job_id: str = "id-1") -> Status:
        status = self.store.statuses([job_id])[0]
        assert status is not None
        return status

    def journal(self, job_id: str = "id-1") -> str:
        return "".join(chunk.text for chunk in self.store.chunks(job_id))
