"""What other launchers are given, and what a leader is started with."""

import json
import shlex
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from hortator.topology.errors import CannotStart
from hortator.topology.external import KEEPER_PORT, recipe
from hortator.topology.fleet import Fleet, parse_fleet
from hortator.topology.hostfilter import HostSlots
from hortator.topology.orders import hosts_of_ranks, leader_order
from hortator.topology.plan import PlannedGroup, make_plan
from hortator.topology.road import Road
from hortator.workers.settings import WorkerSettings

PYTHON = Path("/opt/hortator/bin/python")
FLEET = """
redis_url = "redis://:sekret@10.0.0.9:6379/0"
environment = { NCCL_DEBUG = "INFO" }
[ssh]
user = "serve"
[[models]]
name = "org/llama"
path = "/models/llama"
tensor_parallel_size = 2
pipeline_parallel_size = 2
replicas = 2
max_num_seqs = 96
"""


@pytest.fixture
def fleet() -> Fleet:
    return parse_fleet(FLEET)


def planned(fleet: Fleet, slots: int = 2) -> PlannedGroup:
    hosts = [HostSlots(f"10.0.0.{n}", tuple(range(slots))) for n in range(1, 5)]
    return make_plan(fleet, hosts, {}).groups[0]


def test_a_leader_is_told_its_group_and_where_its_ranks_are(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    order = leader_order(fleet, planned(fleet), python=PYTHON)
    assert "sekret" not in " ".join(order.argv)
    for name, value in order.environment.items():
        monkeypatch.setenv(name, value)
    settings = WorkerSettings()
    assert (settings.group, settings.queue, settings.max_num_seqs) == ("org.llama-0", "org/llama", 96)
    assert [(node.host, node.devices) for node in settings.hosts] == [("10.0.0.1", (0, 1)), ("10.0.0.2", (0, 1))]
    assert (settings.launcher, settings.ssh_user, settings.remote_python) == ("ssh", "serve", str(PYTHON))
    assert order.environment["NCCL_DEBUG"] == "INFO"
    assert hosts_of_ranks(planned(fleet)) == ("10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2")


def test_what_the_file_does_not_say_of_ssh_is_left_to_sshs_own_configuration(fleet: Fleet) -> None:
    order = leader_order(fleet, planned(fleet), python=PYTHON)
    assert "HORTATOR_SSH_PORT" not in order.environment
    assert "-p" not in Road(fleet.ssh).argv("a", ["true"])


def test_the_time_to_connect_is_the_same_for_us_and_for_the_leaders_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = parse_fleet(FLEET.replace("[ssh]", "[ssh]\nconnect_timeout_s = 45"))
    for name, value in leader_order(slow, planned(slow), python=PYTHON).environment.items():
        monkeypatch.setenv(name, value)
    assert WorkerSettings().ssh_connect_timeout_s == 45
    assert "ConnectTimeout=45" in Road(slow.ssh).argv("a", ["true"])


def test_deepspeed_is_refused_before_anything_starts_where_a_host_has_an_ipv6_address(fleet: Fleet) -> None:
    hosts = [HostSlots(f"fd00::{n}", (0, 1)) for n in range(1, 5)]
    group = make_plan(fleet, hosts, {}).groups[0]
    assert leader_order(fleet, group, python=PYTHON).environment["HORTATOR_LAUNCHER"] == "ssh"
    with pytest.raises(CannotStart, match="launcher=deepspeed cannot reach fd00::1"):
        leader_order(fleet, group, python=PYTHON, launcher="deepspeed")


def test_every_variable_of_the_fleets_environment_is_one_that_all_ranks_get(monkeypatch: pytest.MonkeyPatch) -> None:
    said = 'environment = { FOO_MARK = "1", NCCL_SOCKET_IFNAME = "eth9", HORTATOR_MAX_ATTEMPTS = "3" }'
    fleet = parse_fleet(FLEET.replace('environment = { NCCL_DEBUG = "INFO" }', said))
    for name, value in leader_order(fleet, planned(fleet), python=PYTHON).environment.items():
        monkeypatch.setenv(name, value)
    settings = WorkerSettings()
    assert (settings.rank_variables, settings.max_attempts) == (("FOO_MARK", "NCCL_SOCKET_IFNAME"), 3)


def test_a_group_on_one_host_needs_no_launcher(fleet: Fleet) -> None:
    assert leader_order(fleet, planned(fleet, slots=4), python=PYTHON).environment["HORTATOR_LAUNCHER"] == "local"


def test_torchrun_starts_a_keeper_for_every_rank(fleet: Fleet) -> None:
    text = recipe("torchrun", fleet, planned(fleet), python=PYTHON)
    assert "torch.distributed.run --nnodes 2 --nproc-per-node 2" in text
    assert f"-m hortator.topology.keeper --join 10.0.0.1:{KEEPER_PORT}" in text
    assert "sekret" not in text


def test_an_sbatch_file_is_a_shell_script_with_the_numbers_of_the_group(fleet: Fleet) -> None:
    text = recipe("slurm", fleet, planned(fleet), python=PYTHON)
    asked = {line for line in text.splitlines() if line.startswith("#SBATCH")}
    assert asked >= {
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks=4",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --gpus-per-node=2",
    }
    exports = dict(shlex.split(line)[1].split("=", 1) for line in text.splitlines() if line.startswith("export"))
    assert exports["HORTATOR_LAUNCHER"] == "external"
    assert exports["HORTATOR_FRONT_RANKS"] == "2"
    assert exports["HORTATOR_MODEL"] == "org/llama"
    assert "sekret" not in text


def test_a_manifest_is_a_leader_worker_set_of_the_groups_size(fleet: Fleet) -> None:
    text = recipe("kubernetes", fleet, planned(fleet), python=PYTHON)
    made = yaml.safe_load(text)
    assert (made["apiVersion"], made["kind"]) == ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet")
    assert (made["metadata"]["name"], made["spec"]["replicas"]) == ("org-llama", 2)
    template = made["spec"]["leaderWorkerTemplate"]
    assert template["size"] == 2
    [leader] = template["leaderTemplate"]["spec"]["containers"]
    [peer] = template["workerTemplate"]["spec"]["containers"]
    told = {one["name"]: one.get("value", one.get("valueFrom")) for one in leader["env"]}
    assert told["HORTATOR_TENSOR_PARALLEL_SIZE"] == "2"
    assert told["HORTATOR_REDIS_URL"] == {"secretKeyRef": {"name": "hortator-redis", "key": "url"}}
    assert peer["args"][-1] == "--ranks-per-node=2"
    assert leader["resources"] == peer["resources"] == {"limits": {"nvidia.com/gpu": 2}}
    assert "sekret" not in json.dumps(made)


def test_uneven_hosts_and_unknown_launchers_are_refused_with_what_to_do(fleet: Fleet) -> None:
    group = planned(fleet)
    first, second = group.hosts
    uneven = group.model_copy(update={"hosts": (first, second.model_copy(update={"devices": (0,)}))})
    with pytest.raises(CannotStart, match="as many on each"):
        recipe("slurm", fleet, uneven, python=PYTHON)
    with pytest.raises(CannotStart, match="torchrun, slurm, kubernetes"):
        recipe("mesos", fleet, group, python=PYTHON)
