"""A front for tests that kill it: runs a group, prints its ranks' pids as JSON when it is ready, and goes on."""

import json
import select
import sys

from hortator.workers.group import Group, Ready
from tests.workers.group_driver import settings


def main() -> None:
    group = Group(settings(**json.loads(sys.argv[1])))
    group.start()
    while True:
        select.select([group], [], [], 1.0)
        for event in group.poll():
            if isinstance(event, Ready):
                print(json.dumps(group.pids), flush=True)


main()
