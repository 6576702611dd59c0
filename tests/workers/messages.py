"""Celery messages as a stock client pushes them."""

import base64
import json
from typing import Any


def message(job_id: str, *args: Any, headers: dict[str, Any] | None = None, **kwargs: Any) -> bytes:
    """What `send_task("llm.generate", args, kwargs)` leaves in the list."""
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    body = base64.b64encode(json.dumps([args, kwargs, embed]).encode()).decode()
    return json.dumps(
        {
            "body": body,
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py", "task": "llm.generate", "id": job_id, "root_id": job_id, "parent_id": None,
                "group": None, "retries": 0, "eta": None, "expires": None, "timelimit": [None, None],
                "argsrepr": "()", "kwargsrepr": "{}", "origin": "test", "ignore_result": None, "stamps": {},
                **(headers or {}),
            },
            "properties": {
                "correlation_id": job_id, "reply_to": "x", "delivery_mode": 2, "priority": 0,
                "delivery_info": {"exchange": "", "routing_key": "m"}, "body_encoding": "base64",
                "delivery_tag": job_id,
            },
        }
    ).encode()  # fmt: skip
