"""One compose project: brought up as a user does it, spoken to from outside, taken down without a trace."""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tests.containers.daemon import Daemon
from tests.containers.shell import run, succeeds

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_FILE = ROOT / "compose" / "docker-compose.yml"
SUBNET = "10.213.77"
READY_TIMEOUT_S = 120.0


class Stack:
    """`project` names everything that is made, so that all of it can be found again."""

    def __init__(self, daemon: Daemon, directory: Path, *, project: str, images: dict[str, str]) -> None:
        self.daemon = daemon
        self.project = project
        self.api_port, self.redis_port = free_port(), free_port()
        self.images = {"HORTATOR_API_IMAGE": f"{project}-api", "HORTATOR_WORKER_IMAGE": f"{project}-worker"}
        own = {
            "COMPOSE_PROJECT_NAME": project,
            "HORTATOR_API_PUBLISH": f"127.0.0.1:{self.api_port}",
            "HORTATOR_REDIS_PUBLISH": f"127.0.0.1:{self.redis_port}",
        }
        self.env = daemon.env | images | self.images | own
        self._wheels = local_wheels(os.environ.get("PIP_FIND_LINKS", ""))
        if any(wheel.name.startswith("torch-") for wheel in self._wheels):
            self.env.setdefault("PIP_EXTRA_INDEX_URL", "")  # no need of the index of CPU wheels
        self._compose = compose_command(self.env)
        self._override = directory / "override.json"
        self._override.write_text(json.dumps(override()))
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.api_port}", timeout=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "5", check=False)
        self.daemon.docker("image", "rm", "--force", *self.images.values(), check=False)

    def compose(self, *arguments: str, timeout_s: float = 120.0, check: bool = True) -> str:
        files = ("-f", str(COMPOSE_FILE), "-f", str(self._override))
        return run(*self._compose, *files, *arguments, env=self.env, timeout_s=timeout_s, check=check, cwd=str(ROOT))

    def build(self) -> None:
        """Both images, with this host's wheels if pip has some that no index offers."""
        with lent(self._wheels):
            self.compose("build", timeout_s=1500)

    def up(self, *, groups: int = 1) -> None:
        """Started, and every group ready."""
        self.compose("up", "-d", "--no-build", "--scale", f"leader={groups}", "--scale", f"peer={groups}")
        self.wait_for_groups(groups)

    def container(self, service: str, number: int = 1) -> str:
        """The id of a service's container."""
        answer = self.daemon.docker(
            *("ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={self.project}"),
            *("--filter", f"label=com.docker.compose.service={service}"),
            *("--filter", f"label=com.docker.compose.container-number={number}"),
        )
        assert answer.strip(), f"there is no container {number} of {service}"
        return answer.split()[0]

    def inside(self, service: str, *argv: str, number: int = 1, check: bool = True) -> str:
        """Run a command in a container."""
        return self.daemon.docker("exec", self.container(service, number), *argv, check=check)

    def crash(self, service: str, number: int = 1) -> None:
        """Kill all processes of a container at once; Docker's restart policy finds it as after any crash."""
        self.inside(service, "sh", "-c", "kill -9 -1", number=number, check=False)

    def cut(self, service: str, seconds: float) -> None:
        """Take a container off the network for that long; it keeps its address."""
        container = self.container(service)
        network = f"{self.project}_default"
        endpoint = f'{{{{(index .NetworkSettings.Networks "{network}").IPAddress}}}}'
        address = self.daemon.docker("inspect", "--format", endpoint, container).strip()
        began = time.monotonic()
        self.daemon.docker("network", "disconnect", network, container)
        time.sleep(max(0.0, seconds - (time.monotonic() - began)))
        self.daemon.docker("network", "connect", "--ip", address, "--alias", service, network, container)

    # --- what the API says

    def groups(self) -> list[dict[str, Any]]:
        """The groups alive; none while the API or Redis is away."""
        try:
            answer = self.http.get("/v1/queues")
            return [group for queue in answer.json()["queues"] for group in queue["groups"]]
        except (httpx.HTTPError, KeyError):
            return []

    def epochs(self) -> dict[str, int]:
        return {group["group"]: group["epoch"] for group in self.groups()}

    def wait_for_groups(self, number: int) -> None:
        """Until exactly that many are ready."""
        until = time.monotonic() + READY_TIMEOUT_S
        while [group["state"] for group in self.groups()] != ["ready"] * number:
            if time.monotonic() > until:
                logs = self.compose("logs", "--no-color", "--tail=40", check=False)
                raise AssertionError(f"not {number} groups are ready but {self.groups()}\n{logs}")
            time.sleep(0.3)


def compose_command(env: dict[str, str]) -> tuple[str, ...]:
    """Version 2 if it is there, else 1.29."""
    if succeeds(["docker", "compose", "version"], env=env):
        return ("docker", "compose")
    if shutil.which("docker-compose") is None:
        raise RuntimeError("neither `docker compose` nor docker-compose is here")
    return ("docker-compose",)


def override() -> dict[str, Any]:
    """A compose file (JSON is YAML).  With a subnet of its own, a container that comes back can be given its address
    again; and jobs of a killed group, which run one by one at first, are cleared after one token."""
    pool = {"subnet": f"{SUBNET}.0/24"}
    return {
        "networks": {"default": {"ipam": {"config": [pool]}}},
        "services": {"leader": {"environment": {"HORTATOR_PROBATION_TOKENS": "1"}}},
    }


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def local_wheels(places: str) -> list[Path]:
    """Those that pip on this host is told to look for in directories."""
    return [wheel for place in places.split() if Path(place).is_dir() for wheel in Path(place).glob("*.whl")]


@contextmanager
def lent(wheels: list[Path]) -> Iterator[None]:
    """They lie in compose/wheels for as long as this lasts."""
    made = []
    try:
        for wheel in wheels:
            target = ROOT / "compose" / "wheels" / wheel.name
            if not target.exists():
                shutil.copy(wheel, target)
                made.append(target)
        yield
    finally:
        for target in made:
            target.unlink(missing_ok=True)
