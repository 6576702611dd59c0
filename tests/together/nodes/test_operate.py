"""Operating a fleet on real machines, each command typed on the first of them: doctor, up, logs, restart, down."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hortator.producer.schema import State
from tests.together.nodes.cluster import Cluster
from tests.together.nodes.machines import REPOSITORY

NAMES = ["nodeA", "nodeB"]
FLEET = """
redis_url = "{redis}"
hostfile = "hosts"
environment = {{ PYTHONPATH = "{repository}", OMP_NUM_THREADS = "1", FOO_MARK = "7", NCCL_SOCKET_IFNAME = "eth9" }}

[ssh]
identity_file = "{identity}"
known_hosts_file = "{known}"

[[models]]
name = "echo"
engine = "tests.together.engines:slow_echo"
device = "cpu"
tensor_parallel_size = 2
max_model_len = 4096
max_num_seqs = 32
grace_s = 2
restart_backoff_s = 0.2
"""


class Shell:
    """`hortator` as an operator types it on the first machine."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.directory = cluster, cluster.directory
        self.fleet_file = self.directory / "fleet.toml"
        self.fleet_file.write_text(
            FLEET.format(
                redis=cluster.redis.url,
                repository=REPOSITORY,
                identity=cluster.machines.identity_file,
                known=cluster.machines.known_hosts_file,
            )
        )
        (self.directory / "hosts").write_text("".join(f"{name} slots=1\n" for name in NAMES))

    def __call__(self, *arguments: str, code: int = 0) -> str:
        command = self.cluster.first.command(sys.executable, "-m", "hortator", *arguments)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def state(self) -> tuple[str, str]:
        return "--dir", str(self.directory / "state")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("operate"), NAMES) as running:
        yield running


@pytest.fixture(scope="module")
def sh(cluster: Cluster) -> Shell:
    return Shell(cluster)


def test_a_fleet_is_started_read_and_ended_over_ssh(cluster: Cluster, sh: Shell) -> None:
    assert "echo-0 is ready" in sh("up", str(sh.fleet_file), *sh.state())
    ranks = [cluster.machines[name].ranks() for name in NAMES]
    assert [len(found) for found in ranks] == [1, 1]
    told = [found[0].environ() for found in ranks]
    assert [(env["FOO_MARK"], env["NCCL_SOCKET_IFNAME"], env["GLOO_SOCKET_IFNAME"]) for env in told] == [
        ("7", "eth9", "eth0")
    ] * 2
    [job] = cluster.enqueue(["over two machines;"], max_tokens=20)
    assert cluster.finished([job], timeout_s=20)[job].state is State.SUCCEEDED
    [queue] = map(json.loads, sh("status", "--json", "--redis-url", cluster.redis.url).splitlines())
    assert (queue["groups"][0]["info"]["ranks"], queue["hindrance"]) == (2, None)

    said = sh("logs", str(sh.fleet_file), *sh.state(), "-n", "200")
    assert "echo-0 leader nodeA | " in said

    assert "echo-0 is down" in sh("down", "--fleet", str(sh.fleet_file), *sh.state())
    assert cluster.living() == []
    assert cluster.first.matching("hortator.workers") == []


def test_the_doctor_examines_real_machines_and_names_the_slow_link(cluster: Cluster, sh: Shell) -> None:
    model = str(REPOSITORY / "demo" / "model")
    shape = ["qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "40mbit", "burst", "32kbit", "latency", "400ms"]
    cluster.machines["nodeB"].run("tc", *shape)
    said = sh("doctor", str(sh.fleet_file), "--model", model, code=1)
    assert "ok   links echo-0: 2 ranks" in said
    [failure] = [line for line in said.splitlines() if line.startswith("FAIL")]
    assert failure.startswith("FAIL slow link: nodeB -> nodeA carries ")
    cluster.machines["nodeB"].run("tc", "qdisc", "del", "dev", "eth0", "root")
    assert "all 2 hosts answer" in said
    assert f"model {model}: the same on 2 hosts" in said
    assert "suggested for all hosts: GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME==eth0" in said
