"""From a group's settings to its launcher, and to what each rank is told."""

import socket
import sys
from collections.abc import Collection, Mapping
from typing import Any

from hortator.topology.address import is_loopback, means_this_host
from hortator.topology.deepspeed import DeepSpeedStarter
from hortator.topology.errors import CannotStart
from hortator.topology.join import read_secret
from hortator.topology.launch import Launcher, LocalLauncher, RankCommand, threads_each
from hortator.topology.muster import Muster
from hortator.topology.network import interface_of
from hortator.topology.placement import Seat, seats, shares
from hortator.topology.remote import Awaited, RemoteLauncher, Starter
from hortator.topology.ssh import SshOptions, SshStarter
from hortator.topology.variables import check_variables

from .rank import CONFIG_VARIABLE, RankConfig
from .settings import WorkerSettings

FORWARDED_VARIABLES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "UCX_")
"""What ranks on other hosts get of the front's environment unasked, except interfaces, which may be called otherwise
there: these have to be named in rank_variables."""


def make_launcher(settings: WorkerSettings, environment: Mapping[str, str]) -> Launcher:
    """The launcher that the settings ask for; its programs run with `environment`.  Raises CannotStart, BadSecret."""
    if num_own(settings) == settings.world_size:
        return LocalLauncher()
    starter, key = _starter(settings, environment)
    return RemoteLauncher(
        lambda first_key: open_muster(settings, first_key),
        starter,
        num_own=num_own(settings),
        shares=shares(settings.hosts),
        key=key,
    )


def open_muster(settings: WorkerSettings, key: bytes) -> Muster:
    """Where keepers join.  Raises PortTaken."""
    return Muster(
        settings.meeting_host,
        settings.keeper_port,
        key=key,
        heartbeat_s=settings.heartbeat_s,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
    )


def num_own(settings: WorkerSettings) -> int:
    """How many ranks, from rank 0 on, the front starts itself."""
    if settings.hosts:
        return len(settings.hosts[0].devices)
    return settings.front_ranks if settings.launcher == "external" else settings.world_size


def check_meeting_host(settings: WorkerSettings) -> None:
    """Other hosts must be able to come here.  Raises CannotStart."""
    if num_own(settings) == settings.world_size:
        return
    host = settings.meeting_host
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise CannotStart(f"control_host: {host} cannot be resolved: {error.strerror}") from None
    external = settings.launcher == "external"
    if address in ("0.0.0.0", "::") or (is_loopback(str(address)) and not (external and _all_here(settings))):
        raise CannotStart(
            f"control_host: {host} is {address} here, where other hosts cannot reach it: set control_host"
            " (HORTATOR_CONTROL_HOST) to this host's address in their network"
            + (", or to 127.0.0.1 if all ranks will be on this host" if external else "")
        )


def _all_here(settings: WorkerSettings) -> bool:
    """Somebody has said that no rank will be elsewhere."""
    said = [node.host for node in settings.hosts] or (
        [settings.control_host] if "control_host" in settings.model_fields_set else []
    )
    return bool(said) and all(map(means_this_host, said))


def rank_commands(
    settings: WorkerSettings,
    *,
    epoch: int,
    key: bytes,
    control: tuple[str, int],
    pipe: socket.socket,
    environment: Mapping[str, str],
) -> list[RankCommand]:
    """How each rank is started: those of this host, and what keepers add to the environment of the others.

    `environment` is the front's.
    """
    own = num_own(settings)
    spread = own < settings.world_size
    placed = dict(enumerate(seats(settings.hosts)))
    commands = []
    for rank in range(settings.world_size):
        seat = placed.get(rank) or (Seat(rank, "", rank, None) if rank < own else None)
        # a keeper knows its devices better: its starter may have renumbered them (CUDA_VISIBLE_DEVICES)
        own_seat = seat if rank < own else None
        config = _config(settings, rank, epoch=epoch, key=key, control=control, seat=own_seat, pipe=pipe)
        env = {CONFIG_VARIABLE: config.model_dump_json()}
        if rank < own:
            interface = _interface(settings, seat) if spread else "lo"
            env |= rank_environment(environment, local_ranks=own, interface=interface)
        else:
            env |= forwarded_environment(
                environment, settings.rank_variables, interface=seat.interface if seat else None
            )
        pass_fds = (pipe.fileno(),) if rank == 0 else ()
        commands.append(RankCommand(rank, (sys.executable, "-m", "hortator.workers.rank"), env, pass_fds))
    return commands


def rank_environment(inherited: Mapping[str, str], *, local_ranks: int, interface: str | None) -> dict[str, str]:
    """What a local rank inherits: not the front's settings (they hold the URL of Redis), but all that libraries read.

    gloo asks the resolver for this host's name unless it is told an interface; ranks of one host need no other than lo.
    """
    defaults = {"PYTHONUNBUFFERED": "1"}
    if interface is not None:
        defaults["GLOO_SOCKET_IFNAME"] = interface
        if interface != "lo":
            defaults["NCCL_SOCKET_IFNAME"] = interface
    kept = {name: value for name, value in inherited.items() if not name.startswith("HORTATOR_")}
    return defaults | kept | {"OMP_NUM_THREADS": threads_each(local_ranks, inherited.get("OMP_NUM_THREADS"))}


def forwarded_environment(
    inherited: Mapping[str, str], names: Collection[str] = (), *, interface: str | None
) -> dict[str, str]:
    """What a rank on another host gets beside what it finds there: what concerns the network, and what is named.

    A named interface wins over what the keeper finds out; the one of this very host wins over that.
    """
    forwarded = {
        name: value
        for name, value in inherited.items()
        if name.startswith(FORWARDED_VARIABLES) and not name.endswith("_SOCKET_IFNAME")
    }
    chosen = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface is not None else {}
    named = {name: inherited[name] for name in names if name in inherited}
    return {"PYTHONUNBUFFERED": "1"} | forwarded | named | chosen


def _starter(settings: WorkerSettings, environment: Mapping[str, str]) -> tuple[Starter, bytes | None]:
    """The starter, and the lasting key of its keepers if they have one."""
    s = settings
    options = SshOptions(
        s.ssh_user,
        s.ssh_port,
        s.ssh_identity_file,
        s.ssh_known_hosts_file,
        s.remote_python,
        connect_timeout_s=s.ssh_connect_timeout_s,
    )
    check_variables(s.rank_variables, launcher=s.launcher)
    if s.launcher == "ssh":
        return SshStarter(options), None
    if s.secret_file is None:
        raise CannotStart(
            f"launcher={s.launcher}: secret_file is not set; make one with `openssl rand -hex 32`, "
            "chmod 600, at the same path on every host"
        )
    key = read_secret(s.secret_file)
    if s.launcher == "deepspeed":
        return DeepSpeedStarter(options, secret_file=s.secret_file, environment=environment), key
    return Awaited(), key


def _interface(settings: WorkerSettings, seat: Seat | None) -> str | None:
    return (seat.interface if seat else None) or interface_of(settings.meeting_host)


def _config(
    settings: WorkerSettings,
    rank: int,
    *,
    epoch: int,
    key: bytes,
    control: tuple[str, int],
    seat: Seat | None,
    pipe: socket.socket,
) -> RankConfig:
    values: dict[str, Any] = settings.model_dump(mode="json", include=set(RankConfig.model_fields))
    if settings.model_path is not None:
        values["model_path"] = str(settings.model_path.absolute())
    return RankConfig.model_validate(
        values
        | {
            "rank": rank,
            "epoch": epoch,
            "local_rank": seat.device if seat else None,
            "pipe_fd": pipe.fileno() if rank == 0 else None,
            "control_host": control[0],
            "control_port": control[1],
            "control_key": key.hex(),
            "store_host": settings.store_host or control[0],
        }
    )
