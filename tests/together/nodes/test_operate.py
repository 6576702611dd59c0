"""Operating a fleet on real machines, each command typed on the first of them: doctor, up, logs, restart, down."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hortator.producer import Sampling
from hortator.producer.embedded import executables
from hortator.producer.schema import State
from tests.together.fleet import alive, wait_for
from tests.together.nodes.cluster import Cluster, secret_in
from tests.together.nodes.machines import REPOSITORY, Machine

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
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stdout + done.stderr

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


DEEPSPEED_FLEET = """
redis_url = "{redis}"
hostfile = "hosts"
environment = {{ HORTATOR_SECRET_FILE = "{secret}", OMP_NUM_THREADS = "1", TMPDIR = "{files}" }}

[ssh]
identity_file = "{identity}"
known_hosts_file = "{known}"

[[models]]
name = "demo"
path = "{model}"
device = "cpu"
tensor_parallel_size = 2
max_model_len = 512
grace_s = 2
restart_backoff_s = 0.2
"""


@pytest.mark.timeout(240)  # two starts by DeepSpeed, which take 10 s each on a quiet machine
def test_deepspeeds_launcher_starts_a_fleet_that_is_steered_and_leaves_nothing_when_killed(
    cluster: Cluster, sh: Shell
) -> None:
    (files := sh.directory / "temporary").mkdir()
    file, state = sh.directory / "deepspeed.toml", ("--dir", str(sh.directory / "state-of-deepspeed"))
    text = DEEPSPEED_FLEET.format(
        redis=cluster.redis.url,
        secret=secret_in(sh.directory),
        files=files,
        identity=cluster.machines.identity_file,
        known=cluster.machines.known_hosts_file,
        model=REPOSITORY / "demo" / "model",
    )
    file.write_text(text)
    assert "demo-0 is ready" in sh("up", str(file), *state, "--launcher", "deepspeed")
    assert len(cluster.first.matching("deepspeed.launcher.runner")) == 1
    first_life = [process.pid for process in cluster.living()]
    assert answer(cluster, "12+30=") == "42"

    assert "demo-0 is ready again" in sh("restart", "demo-0", "--redis-url", cluster.redis.url)
    second_life = [process.pid for process in cluster.living()]
    assert not set(first_life) & set(second_life)
    assert answer(cluster, "count(3,12)=") == "3 4 5 6 7 8 9 10 11 12"
    queues = map(json.loads, sh("status", "--json", "--redis-url", cluster.redis.url).splitlines())
    [group] = [group for queue in queues for group in queue["groups"]]
    assert (group["state"], group["info"]["ranks"]) == ("ready", 2)

    launcher = [process.pid for process in cluster.first.processes() if process.name() in ("pdsh", "pdsh.bin")]
    assert launcher
    os.kill(leader(cluster.first), signal.SIGKILL)
    wait_for("everything to end", lambda: not any(map(alive, (*second_life, *launcher))), 5.0)
    assert list(files.glob("hortator-*")) == []
    assert sh("down", "--fleet", str(file), *state) == ""


def answer(cluster: Cluster, prompt: str) -> str:
    return cluster.client.enqueue(prompt, model="demo", sampling=Sampling(max_tokens=60)).result(timeout_s=20).text


def leader(machine: Machine) -> int:
    [process] = [one for one in machine.matching("hortator.workers") if one.ppid() == machine.init]
    return int(process.pid)


@contextmanager
def redis_for_all(cluster: Cluster) -> Iterator[str]:
    """Its URL: a server that every machine reaches."""
    directory = cluster.directory / "redis-for-all"
    directory.mkdir()
    options = {"bind": "0.0.0.0", "port": "7000", "protected-mode": "no", "dir": str(directory), "save": ""}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    server = cluster.first.popen(str(executables()[0]), *arguments, stdout=subprocess.DEVNULL)
    try:
        yield f"redis://{cluster.first.address}:7000/0"
    finally:
        server.kill()
        server.wait(10)
        for process in cluster.first.matching("7000"):
            process.kill()


def test_up_names_a_leader_on_another_machine_and_a_second_leader_of_its_name_ends(cluster: Cluster, sh: Shell) -> None:
    with redis_for_all(cluster) as redis:
        text = sh.fleet_file.read_text().replace(cluster.redis.url, redis)
        file, state = sh.directory / "single.toml", ("--dir", str(sh.directory / "state-of-single"))
        file.write_text(text.replace("tensor_parallel_size = 2", "tensor_parallel_size = 1"))
        assert "echo-0 is ready" in sh("up", str(file), *state, "-i", "nodeB")
        [rank] = cluster.machines["nodeB"].ranks()
        said = sh("up", str(file), "--dir", str(sh.directory / "elsewhere"), "-i", "nodeA", code=1)
        assert re.search(r"echo-0 is alive \(pid \d+ on nodeB\), but .* on nodeA, where the plan has it, knows", said)
        settings = {"GROUP": "echo-0", "MODEL": "echo", "ENGINE": "echo", "DEVICE": "cpu", "REDIS_URL": redis}
        second = cluster.first.popen(
            *(sys.executable, "-m", "celery", "-A", "hortator.workers", "worker"),
            env=os.environ | {f"HORTATOR_{name}": value for name, value in settings.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        words, _ = second.communicate(timeout=40)
        assert re.search(rb"group echo-0 is led by pid \d+ on nodeB already", words), words
        assert rank.is_running()
        assert "echo-0 runs already" in sh("up", str(file), *state), "it stays on nodeB"
        assert "echo-0 is down" in sh("down", "--fleet", str(file), *state)
        assert not rank.is_running()


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
