"""The leader is healthy while its group is ready: exit 0 if so, else 1 with what the group says of itself."""

import os
import socket
import sys

from hortator.producer import Client
from hortator.producer.errors import HortatorError
from hortator.producer.settings import StoreSettings


def reason_not_ready(own_name: str) -> str | None:
    """None when the group of this container takes jobs."""
    where = StoreSettings(timeout_s=2.0, connect_timeout_s=2.0)
    try:
        with Client.from_settings(where) as client:
            groups = [group for queue in client.queues() for group in queue.groups]
    except HortatorError as problem:
        return problem.message
    states = [group.state for group in groups if group.group == own_name or group.group.startswith(f"{own_name}-")]
    if "ready" in states:
        return None
    return f"the group is {states[0]}" if states else "the group has not been heard of: it starts, or Redis was away"


if __name__ == "__main__":
    sys.exit(reason_not_ready(os.environ.get("HORTATOR_GROUP", socket.gethostname())))
