"""The Celery protocol-2 message of a job, as kombu's Redis transport reads it from a list."""

import base64
import functools
import hashlib
import json
import re
import socket

from hortator.producer.names import STEP_OF
from hortator.producer.schema import SCHEMA_VERSION, TASK_NAME, Job

MAX_ENVELOPE_BYTES = 65_536
_EMBED = '{"callbacks": null, "errbacks": null, "chain": null, "chord": null}'
_REDACTED = '"(redacted)"'  # Celery's events, Flower and logs show the repr: the prompt must not be in it
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def is_job_id(text: str) -> bool:
    """True when the text may be used in keys as a job's id."""
    return _JOB_ID.fullmatch(text) is not None


@functools.cache
def _origin() -> str:
    return json.dumps(f"hortator@{socket.gethostname()}")


def build(job: Job, job_id: str) -> bytes:
    """The message to LPUSH.  `hortator.record` says that a record was written with it; the id must be a sound one."""
    body = base64.b64encode(f"[[], {job.model_dump_json(exclude_none=True)}, {_EMBED}]".encode()).decode()
    return (
        f'{{"body": "{body}", "content-encoding": "utf-8", "content-type": "application/json", "headers": {{'
        f'"lang": "py", "task": "{TASK_NAME}", "id": "{job_id}", "root_id": "{job_id}", "parent_id": null, "group": null, '
        f'"retries": 0, "eta": null, "expires": null, "timelimit": [null, null], '
        f'"argsrepr": {_REDACTED}, "kwargsrepr": {_REDACTED}, "origin": {_origin()}, "ignore_result": false, "stamps": {{}}, '
        f'"hortator": {{"version": {SCHEMA_VERSION}, "record": true}}}}, '
        f'"properties": {{"correlation_id": "{job_id}", "reply_to": "", "delivery_mode": 2, '
        f'"delivery_info": {{"exchange": "", "routing_key": "{job.model}"}}, "priority": {STEP_OF[job.priority]}, '
        f'"body_encoding": "base64", "delivery_tag": "{job_id}"}}}}'
    ).encode()


def digest(job: Job) -> str:
    """What must be equal for two jobs under one idempotency key."""
    return hashlib.sha256(job.model_dump_json(exclude={"idempotency_key"}).encode()).hexdigest()[:32]
