"""What the leader of a planned group is started with.  Pure."""

import json
from pathlib import Path

from .deepspeed import check_hosts
from .errors import CannotStart
from .fleet import Fleet
from .leaders import Order, Seat
from .plan import PlannedGroup
from .variables import check_variables


def leader_order(fleet: Fleet, group: PlannedGroup, *, python: Path, launcher: str = "ssh") -> Order:
    """A Celery worker command, with the group's settings and its place in the environment.  Raises CannotStart for what
    the launcher cannot reach."""
    spec = fleet.model_named(group.model)
    if len(group.hosts) > 1:
        check_variables(fleet.rank_variables, launcher=launcher)
        if launcher == "deepspeed":
            check_hosts(seat.host for seat in group.hosts)
            check_secret(fleet)
    seats = [{"host": seat.host, "devices": seat.devices} for seat in group.hosts]
    place = {
        "REDIS_URL": fleet.redis_url,  # where the commands look, whatever the host's own environment names
        "NAMESPACE": fleet.namespace,
        "GROUP": group.name,
        "HOSTS": json.dumps(seats, separators=(",", ":")),
        "LAUNCHER": launcher if len(seats) > 1 else "local",
        "REMOTE_PYTHON": str(python),
        "SSH_USER": fleet.ssh.user,
        "SSH_PORT": fleet.ssh.port,
        "SSH_IDENTITY_FILE": fleet.ssh.identity_file,
        "SSH_KNOWN_HOSTS_FILE": fleet.ssh.known_hosts_file,
        "SSH_CONNECT_TIMEOUT_S": fleet.ssh.connect_timeout_s,
    }
    said = {f"HORTATOR_{name}": str(value) for name, value in place.items() if value is not None}
    return Order(
        group=group.name,
        argv=celery_command(python, queue=spec.name, group=group.name, quiet=True),
        environment={**fleet.environment, **fleet.worker_environment(spec), **said},
        model=spec.name,
        seats=tuple(Seat(host=seat.host, devices=seat.devices) for seat in group.hosts),
    )


def check_secret(fleet: Fleet) -> None:
    """Keepers that DeepSpeed starts show that they belong to the group.  Raises CannotStart."""
    if "HORTATOR_SECRET_FILE" not in fleet.environment:
        raise CannotStart(
            "launcher=deepspeed: environment.HORTATOR_SECRET_FILE is missing in the fleet file: make a file with"
            " `openssl rand -hex 32`, chmod 600, at the same path on every host, and name it there"
        )


def celery_command(python: Path, *, queue: str, group: str, quiet: bool = False) -> tuple[str, ...]:
    """As one would type it; `quiet`: without Celery's banner."""
    command = (str(python), "-m", "celery", *(("-q",) if quiet else ()), "-A", "hortator.workers", "worker")
    return (*command, "-Q", queue, "-n", f"{group}@%h", "-l", "INFO")


def hosts_of_ranks(group: PlannedGroup) -> tuple[str, ...]:
    """Rank i is on the i-th."""
    return tuple(rank.host for rank in sorted(group.ranks, key=lambda rank: rank.rank))
