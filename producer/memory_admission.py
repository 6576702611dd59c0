"""What the memory twin accepts of an enqueue: idempotency and limits, as enqueue.lua does."""

import math
from collections import Counter
from collections.abc import Sequence

from . import message
from .errors import BadRequest
from .memory_records import Queue, Record, Records
from .names import STEP_OF
from .refused import idempotency_conflict, queue_full, unknown_model
from .schema import Job

RETRY_AFTER_S = 5.0


class Admission:
    """Decides about all jobs of a call before it writes any.  Whoever calls holds the store's lock."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._idempotency: dict[tuple[str, str], tuple[str, str, int]] = {}

    def plan(self, jobs: Sequence[Job], ids: Sequence[str], now: int) -> list[str | None]:
        """For each job the id that it already has, or None for a new one; raises before anything is written."""
        rules, queues = self._records.rules, self._records.queues
        plan: list[str | None] = []
        new_ids: dict[str, str] = {}
        new_keys: dict[tuple[str, str], tuple[str, str]] = {}
        new_models: Counter[str] = Counter()
        new_tenants: Counter[tuple[str, str]] = Counter()
        tidy: set[str] = set()
        for job, job_id in zip(jobs, ids, strict=True):
            message.checked(job, job_id, max_bytes=rules.max_message_bytes)
            queue = queues.get(job.model)
            if rules.require_known_model and not (queue and queue.known):
                raise unknown_model(job.model, [name for name, one in queues.items() if one.known], job_id)
            first = self._first_id(job, job_id, now, new_ids, new_keys)
            plan.append(first)
            if first is not None:
                continue
            new_models[job.model] += 1
            new_tenants[job.model, job.tenant] += 1
            counts = new_models[job.model], new_tenants[job.model, job.tenant]
            if queue and job.model not in tidy and any(self._excess(queue, job, counts)):
                self._records.drop_dead(queue)
                tidy.add(job.model)
            of_model, of_tenant = self._excess(queue or Queue(), job, counts)
            if of_model:
                raise queue_full(f"model {job.model!r}", rules.max_queued_per_model, RETRY_AFTER_S, job_id)
            if of_tenant:
                raise queue_full(f"tenant {job.tenant!r}", rules.max_queued_per_tenant, RETRY_AFTER_S, job_id)
            new_ids[job_id] = job.tenant
            if job.idempotency_key is not None:
                new_keys[job.tenant, job.idempotency_key] = (message.digest(job), job_id)
        return plan

    def _excess(self, queue: Queue, job: Job, new: tuple[int, int]) -> tuple[bool, bool]:
        """Whether so many new ones are too many for the model, for the tenant."""
        rules = self._records.rules
        return (
            queue.num_messages + new[0] > rules.max_queued_per_model,
            queue.num_messages_of(job.tenant) + new[1] > rules.max_queued_per_tenant,
        )

    def _first_id(
        self,
        job: Job,
        job_id: str,
        now: int,
        new_ids: dict[str, str],
        new_keys: dict[tuple[str, str], tuple[str, str]],
    ) -> str | None:
        if job.idempotency_key is not None:
            key = (job.tenant, job.idempotency_key)
            old = self._idempotency.get(key)
            known = old and old[2] > now and self._records.get(old[1]) is not None
            seen = new_keys.get(key) or (old[:2] if old and known else None)
            if seen is not None:
                if seen[0] != message.digest(job):
                    raise idempotency_conflict(job_id)
                return seen[1]
        record = self._records.get(job_id)
        owner = new_ids.get(job_id) or (record.tenant if record else None)
        if owner is not None and owner != job.tenant:
            raise BadRequest("this job id cannot be used: leave ids to hortator", job_id=job_id)
        return job_id if owner is not None else None

    def accept(self, job: Job, job_id: str, now: int) -> None:
        records = self._records
        deadline = records.default_deadline(now) if job.deadline_s is None else now + math.ceil(job.deadline_s * 1000)
        records.by_id[job_id] = Record(
            job.model,
            job.tenant,
            now,
            deadline=deadline,
            metadata=dict(job.metadata),
            step=STEP_OF[job.priority],
            rows=job.sampling.n,
        )
        queue = records.queue(job.model)
        queue.lists[STEP_OF[job.priority]].appendleft(message.build(job, job_id))
        queue.queued[job.tenant] += 1
        if job.idempotency_key is not None:
            ends = now + round(records.rules.idempotency_ttl_s * 1000)
            self._idempotency[job.tenant, job.idempotency_key] = (message.digest(job), job_id, ends)
