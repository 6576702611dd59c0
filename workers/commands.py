"""What can be asked of a leader over Celery's remote control, from any machine that reaches Redis.

Each command is for the groups that it names (none: for all), and every leader answers: those that are not meant only
say who they are.  `fleet_control.py` is the asking side.
"""

import atexit
import logging
import os
import socket
import sys
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from celery.platforms import EX_OK
from celery.worker import control
from celery.worker import state as worker_state

from .pool import EnginePool

logger = logging.getLogger("hortator.front")

LIFE = uuid.uuid4().hex
"""Of this process image: a leader that started again answers with another."""

_told: list[EnginePool] = []
"""Whose leader was told to start again; the wish itself is the pool's, where a later stop takes it back."""


def _command(act: Callable[[EnginePool], None], doc: str, name: str) -> None:
    """Register `act` under `name`; the reply is what the leader was when it was asked."""

    def run(state: Any, groups: Sequence[str] | None = None, **_: Any) -> dict[str, Any]:
        pool = state.consumer.pool
        if not isinstance(pool, EnginePool):
            return {"error": "this worker is no model group"}
        told = describe(pool)
        if not groups or pool.settings.group in groups:
            act(pool)
            told["obeys"] = True
        return told

    control.control_command(name=name, help=doc, variadic="groups", signature="[group1 [group2 ...]]")(run)


def describe(pool: EnginePool) -> dict[str, Any]:
    """Who this leader is and how it stands."""
    settings = pool.settings
    return {
        "group": settings.group,
        "model": pool.queue,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "life": LIFE,
        "state": pool.front.state,
        "running": pool.front.num_live,
        "grace_s": settings.grace_s,
        "start_timeout_s": settings.start_timeout_s,
        "ranks": [[rank, vitals.pid] for rank, vitals in sorted(pool.members.items())],
        "last_failure": pool.front.details()["last_failure"],
        "obeys": False,
    }


def look(_pool: EnginePool) -> None:
    """The reply says it all."""


def drain(pool: EnginePool) -> None:
    logger.info("told to drain: nothing more is claimed")
    pool.drain()


def resume(pool: EnginePool) -> None:
    logger.info("told to resume")
    pool.resume()


def stop(pool: EnginePool) -> None:
    """Celery's warm shutdown, as after SIGTERM.  It wins over a restart that is under way."""
    logger.info("told to stop")
    pool.again = False
    _end(pool)


def restart(pool: EnginePool) -> None:
    """Stop, and then be started anew in the same process: same command, same environment, the code of that time.  Who
    has been told to stop stays told."""
    logger.info("told to restart")
    if worker_state.should_stop is None:
        pool.again = True
        _told.append(pool)
    _end(pool)


def _end(pool: EnginePool) -> None:
    pool.front.stop(again=pool.again)
    if worker_state.should_stop is None:
        worker_state.should_stop = EX_OK


@atexit.register
def _start_again() -> None:
    """After everything has been put away.  Descriptors are not inherited, but for standard output and error."""
    if worker_state.should_stop == EX_OK and any(pool.again for pool in _told):
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606


_command(look, "How the model group of this leader stands.", "group_look")
_command(drain, "Claim nothing more, finish what runs, hand the rest back, stay up.", "group_drain")
_command(resume, "Claim again after group_drain.", "group_resume")
_command(stop, "Finish what runs, hand the rest back, exit.", "group_stop")
_command(restart, "Finish what runs, hand the rest back, start again.", "group_restart")
