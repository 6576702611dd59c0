"""Every queue name and Redis key, in one table.

The namespace is exactly Celery's `global_keyprefix`, of the transport and of the result backend.  Celery puts "_"
behind a result prefix that does not end in one of `: _ - .`, and nothing behind a transport prefix; so that both agree,
a namespace must end in one of these.
"""

import hashlib
import re
from typing import NamedTuple

from .errors import ConfigError
from .schema import Priority

STEP_SEPARATOR = "\x06\x16"  # kombu's, between a queue's name and its priority step
STEPS = (0, 3, 6, 9)  # 0 is served most; 9 comes only from foreign Celery producers
STEP_OF = {Priority.INTERACTIVE: 0, Priority.STANDARD: 3, Priority.BATCH: 6}


class Key(NamedTuple):
    """One kind of key: where it is, what it holds, when it goes."""

    pattern: str
    type: str
    meaning: str
    expiry: str


TABLE: tuple[Key, ...] = (
    # what Celery sees
    Key("{model}", "list", "queue of priority interactive (step 0): Celery messages, LPUSH in, RPOP out", "never"),
    Key("{model}\\x06\\x16{step}", "list", "queues of standard (3), batch (6) and foreign lowest (9)", "never"),
    Key(
        "celery-task-meta-{id}",
        "string",
        "Celery's JSON: STARTED while it runs, then the result with a PUBLISH on the same name",
        "none until terminal, then result_ttl_s",
    ),
    # the job
    Key(
        "hortator:job:{id}",
        "hash",
        "record: state model tenant attempt free enqueued deadline claimed first finished tokens metadata,"
        " and while they apply: step owner alone suspicion cancel rows; at the end: code error seal",
        "none until terminal, then result_ttl_s",
    ),
    Key(
        "hortator:message:{id}",
        "string",
        "the Celery message while it is in no list: running or suspect",
        "with the lease",
    ),
    Key(
        "hortator:journal:{id}",
        "stream",
        "accepted tokens: <tokens so far>-0 c [index,[ids],text,[logprobs]] (journal.py); ends with <tokens>-1 state",
        "none until terminal, then journal_ttl_s",
    ),
    # one model's queue
    Key("hortator:leases:{model}", "zset", "running job -> its lease's end, ms", "never"),
    Key("hortator:suspects:{model}", "list", "jobs that were running when a group died, RPOP next", "never"),
    Key("hortator:alone:{model}", "string", "the owner that makes room for suspects, or tries the last few", "lease_s"),
    Key("hortator:turn:{model}", "string", "where the round of priority classes stands", "never"),
    Key(
        "hortator:depth:{model}",
        "hash",
        "tenant -> queued jobs; !dead, !dead:{tenant} -> messages of jobs that ended queued, !:{id} -> each",
        "never",
    ),
    Key("hortator:pace:{model}", "hash", "since count rate: claims per second lately, for retry_after_s", "never"),
    Key("hortator:rooms:{model}", "hash", "group -> ms and rows that it had for jobs then", "3 s after a beat"),
    # everything
    Key("hortator:deadlines", "zset", "job -> its deadline, ms", "never"),
    Key(
        "hortator:claimed:{owner}",
        "string",
        "the owner's last claim, told again if the reply was lost",
        "15 s or lease_s",
    ),
    Key("hortator:idempotency:{tenant}:{hash}", "string", "digest of the body, id of the job", "idempotency_ttl_s"),
    Key(
        "hortator:letters",
        "stream",
        "dead letters: model job tenant step reason head kept size at",
        "the newest max_letters stay, within max_letters_bytes",
    ),
    Key("hortator:letter:{letter}", "string", "its message, if it is longer than the head", "with the letter"),
    Key("hortator:letters_bytes", "string", "how much of messages the letters keep", "never"),
    Key(
        "hortator:models",
        "hash",
        "model -> last beat of any of its groups, ms; 0: none was ever ready",
        "one that is empty: after result_ttl_s of silence",
    ),
    Key("hortator:groups", "hash", "group -> its last beat as JSON", "a silent group: after an hour"),
    Key("hortator:holder:{group}", "string", "the one leader that has this name: life renewals JSON", "beat_ttl_s"),
    Key("hortator:secret", "string", "signs job ids, so that a gone id is told from a never-issued one", "never"),
)

_NAMESPACE = re.compile(r"[A-Za-z0-9._:-]{0,63}[:_.-]")


class Names:
    """Builds the keys of one namespace."""

    def __init__(self, namespace: str = "") -> None:
        if namespace and not _NAMESPACE.fullmatch(namespace):
            raise ConfigError(
                f"namespace {namespace!r}: letters, digits and . _ : - only, at most 64, and the last one of : _ - ."
                " (Celery adds '_' to other result prefixes, and then its results are not found)"
            )
        self.namespace = namespace
        self.own = f"{namespace}hortator:"

    def queue(self, model: str, step: int = 0) -> str:
        """The list of one priority step."""
        return f"{self.namespace}{model}{STEP_SEPARATOR}{step}" if step else f"{self.namespace}{model}"

    def queues(self, model: str) -> tuple[str, ...]:
        return tuple(self.queue(model, step) for step in STEPS)

    def result(self, job_id: str) -> str:
        """Celery's result key, and the channel on which it is announced."""
        return f"{self.namespace}celery-task-meta-{job_id}"

    def job(self, job_id: str) -> str:
        return f"{self.own}job:{job_id}"

    def message(self, job_id: str) -> str:
        return f"{self.own}message:{job_id}"

    def journal(self, job_id: str) -> str:
        return f"{self.own}journal:{job_id}"

    def leases(self, model: str) -> str:
        return f"{self.own}leases:{model}"

    def suspects(self, model: str) -> str:
        return f"{self.own}suspects:{model}"

    def alone(self, model: str) -> str:
        return f"{self.own}alone:{model}"

    def turn(self, model: str) -> str:
        return f"{self.own}turn:{model}"

    def depth(self, model: str) -> str:
        return f"{self.own}depth:{model}"

    def pace(self, model: str) -> str:
        return f"{self.own}pace:{model}"

    def claimed(self, owner: str) -> str:
        return f"{self.own}claimed:{owner}"

    def idempotency(self, tenant: str, key: str) -> str:
        """The caller's key may hold anything and be long, so its hash is the name."""
        return f"{self.own}idempotency:{tenant}:{hashlib.sha256(key.encode()).hexdigest()[:32]}"

    @property
    def deadlines(self) -> str:
        return f"{self.own}deadlines"

    @property
    def letters(self) -> str:
        return f"{self.own}letters"

    @property
    def models(self) -> str:
        return f"{self.own}models"

    @property
    def groups(self) -> str:
        return f"{self.own}groups"

    @property
    def secret(self) -> str:
        return f"{self.own}secret"
